"""Hooks of a language model: calls functions at hook points, and skips modules.

A hook point is the input or the output of one module. The functions get one tensor, also where the
module's output is a tuple or its input a keyword argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


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
                hook = _input_hook(function)
                handles.append(point.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(point.module.register_forward_hook(_output_hook(function)))
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


def _output_hook(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            new = function(output[0])
            return None if new is None else (new, *output[1:])
        return function(output)

    return hook


def _input_hook(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook


def keep_shape_and_dtype(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a function that applies a splice in float32 and keeps the activation's dtype.

    Raises: ValueError, when it is called, if the splice changes the shape.
    """

    def replace(x: Tensor) -> Tensor:
        new = function(x.float())
        if new.shape != x.shape:
            raise ValueError(f"a splice must keep the shape {list(x.shape)}, not {list(new.shape)}")
        return new.to(x.dtype)

    return replace
