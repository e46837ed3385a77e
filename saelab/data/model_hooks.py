"""Hooks of a language model: calls functions at hook points, and skips modules.

A hook point is the input or the output of one module. The functions get one tensor, also where the
module's output is a tuple or its input a keyword argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from saelab.errors import SettingError


@dataclass(frozen=True)
class HookPoint:
    """Place in the model: the input or the output of one module."""

    name: str
    module: nn.Module
    side: Literal["input", "output"]


@contextmanager
def run_hooks(functions: Mapping[HookPoint, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Calls each function on its activation within the block.

    A tensor that a function returns replaces the activation.
    """
    handles = []
    try:
        for point, function in functions.items():
            if point.side == "input":
                hook = _input_hook(point.name, function)
                handles.append(point.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(
                    point.module.register_forward_hook(_output_hook(point.name, function))
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_modules(modules: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """Makes the modules return `output` without computing within the block; their hooks run."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.forward = lambda *args, **kwargs: output
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _output_hook(name: str, function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, (tuple, list)) and output:
            new = function(_tensor(output[0], name, module, "output"))
            return None if new is None else type(output)([new, *output[1:]])
        return function(_tensor(output, name, module, "output"))

    return hook


def _input_hook(name: str, function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(_tensor(args[0], name, module, "input"))
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(_tensor(kwargs.get("hidden_states"), name, module, "input"))
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook


def _tensor(x: Any, name: str, module: nn.Module, side: str) -> Tensor:
    """Returns x; raises SettingError unless it is a tensor."""
    if not isinstance(x, Tensor):
        problem = f"the {side} of its module ({type(module).__name__}) is {type(x).__name__}, "
        raise SettingError("hook_name", name, f"{problem}not a tensor: name another module")
    return x


def with_contexts(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns [contexts * positions, d] as [contexts, positions, d], and anything else unchanged.

    Args:
        x: a module's activation; OPT's code joins contexts and positions.
        shape: number of contexts and positions.
    """
    joined = x.dim() == 2 and len(x) == shape[0] * shape[1]
    return x.view(*shape, x.shape[1]) if joined else x


def keep_shape_and_dtype(
    function: Callable[[Tensor], Tensor], shape: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """Returns a function that applies a splice in float32 and keeps the activation's dtype.

    Args:
        function: the splice, of activations [contexts, positions, d].
        shape: number of contexts and positions.

    Raises: ValueError, when it is called, if the splice changes the shape.
    """

    def replace(x: Tensor) -> Tensor:
        given = with_contexts(x.float(), shape)
        new = function(given)
        if new.shape != given.shape:
            raise ValueError(
                f"a splice must keep the shape {list(given.shape)}, not {list(new.shape)}"
            )
        return new.to(x.dtype).view_as(x)

    return replace


def check_shape(x: Tensor, ids: Tensor, name: str) -> Tensor:
    """Returns x as [contexts, positions, d]; raises SettingError if it is anything else."""
    x = with_contexts(x, ids.shape)
    if x.dim() != 3 or x.shape[:2] != ids.shape:
        shape = f"its output has shape {list(x.shape)}, not [contexts, positions, d]"
        raise SettingError("hook_name", name, f"{shape}: name another module")
    return x
