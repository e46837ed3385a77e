"""State that a cell needs in order to continue exactly: named tensors and plain values.

The state of a module is its `state_dict`, the buffers that are not part of that, and plain
attributes of its submodules that are tensors, numbers or torch generators. Anything else that a
module holds (a list, say) is not saved: running state belongs in buffers. Reading a state copies
nothing; restoring one copies into the module's existing tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import DamageError


@dataclass(eq=False)
class State:
    """Tensors and JSON values by name; floats are stored as text, so that no bit is lost."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, part: State) -> None:
        """Adds another state, with its names under a prefix."""
        self.tensors |= {f"{prefix}/{name}": tensor for name, tensor in part.tensors.items()}
        self.plain |= {f"{prefix}/{name}": value for name, value in part.plain.items()}

    def part(self, prefix: str) -> State:
        """Returns the state that `add` put under a prefix."""
        start = f"{prefix}/"
        tensors = {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}
        plain = {n.removeprefix(start): v for n, v in self.plain.items() if n.startswith(start)}
        return State(tensors, plain)

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor of that name.

        Raises: DamageError when there is none.
        """
        if name not in self.tensors:
            raise DamageError(f"the state has no {name}")
        return self.tensors[name]

    def value(self, name: str) -> Any:
        """Returns the plain value of that name.

        Raises: DamageError when there is none.
        """
        if name not in self.plain:
            raise DamageError(f"the state has no {name}")
        return self.plain[name]

    def copy_into(self, name: str, target: Tensor) -> None:
        """Copies a tensor into `target`, which must have its shape and dtype.

        Raises: DamageError when the shape or the dtype differs.
        """
        source = self.tensor(name)
        if source.shape != target.shape or source.dtype != target.dtype:
            raise DamageError(f"the state's {name} has another shape or dtype")
        with torch.no_grad():
            target.copy_(source)


def module_state(module: nn.Module) -> State:
    """Returns the state of a module in training; its tensors are not copies.

    Raises: TypeError when its state_dict holds a value that is neither a tensor nor JSON.
    """
    state = State()
    for name, value in module.state_dict().items():
        (state.tensors if isinstance(value, Tensor) else state.plain)[f"own/{name}"] = value
    for name, buffer in module.named_buffers():
        if f"own/{name}" not in state.tensors:
            state.tensors[f"buffer/{name}"] = buffer
    for name, value in _attributes(module):
        if isinstance(value, torch.Generator):
            state.tensors[f"generator/{name}"] = value.get_state()
        elif isinstance(value, Tensor):
            state.tensors[f"attribute/{name}"] = value
        else:
            state.plain[f"attribute/{name}"] = as_plain(value)
    return state


def restore_module(module: nn.Module, state: State) -> None:
    """Brings a module to a state of a module that was built alike.

    Raises: DamageError when the state does not fit.
    """
    parameters = state.part("own")
    try:
        module.load_state_dict({**parameters.tensors, **parameters.plain})
    except RuntimeError as error:
        raise DamageError(f"the state does not fit its module ({error})") from None
    for name, buffer in module.named_buffers():
        if f"buffer/{name}" in state.tensors:
            state.copy_into(f"buffer/{name}", buffer)
    modules = dict(module.named_modules())
    for name, tensor in state.part("generator").tensors.items():
        path, _, attribute = name.rpartition(".")
        getattr(modules[path], attribute).set_state(tensor)
    attributes = state.part("attribute")
    for name, value in {**attributes.tensors, **attributes.plain}.items():
        path, _, attribute = name.rpartition(".")
        old = vars(modules[path]).get(attribute)
        if isinstance(old, Tensor) and isinstance(value, Tensor) and old.shape == value.shape:
            state.copy_into(f"attribute/{name}", old)
        elif isinstance(value, Tensor):
            setattr(modules[path], attribute, value.clone())
        else:
            setattr(modules[path], attribute, as_number(value))


def as_plain(value: bool | int | float) -> bool | int | str:
    """Returns a number in a form that JSON reproduces bit for bit: a float as text."""
    return float(value).hex() if isinstance(value, float) else value


def as_number(value: bool | int | str) -> bool | int | float:
    """Returns the number that `as_plain` was given."""
    return float.fromhex(value) if isinstance(value, str) else value


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the tensors, numbers and generators that modules hold as plain attributes, with names
    as in a state_dict."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            saved = isinstance(value, (bool, int, float, Tensor, torch.Generator))
            if saved and name != "training":
                yield (f"{path}.{name}" if path else name), value
