"""What a cell must keep to go on exactly: tensors by name, and plain numbers beside them.

A module's state is its `state_dict`, its buffers that are not part of that, and what its modules
hold as plain attributes: tensors, numbers and torch generators. Whatever else a module holds (a
list, say) is not kept: running state goes into buffers. Reading a state copies nothing; restoring
one copies into the tensors that are there.
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
    """Tensors, and JSON values, by name; a float may be infinite or NaN and is kept as text."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, part: State) -> None:
        """Takes another state in, its names under a prefix."""
        self.tensors |= {f"{prefix}/{name}": tensor for name, tensor in part.tensors.items()}
        self.plain |= {f"{prefix}/{name}": value for name, value in part.plain.items()}

    def part(self, prefix: str) -> State:
        """What `add` took in under a prefix."""
        start = f"{prefix}/"
        tensors = {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}
        plain = {n.removeprefix(start): v for n, v in self.plain.items() if n.startswith(start)}
        return State(tensors, plain)

    def tensor(self, name: str) -> Tensor:
        """Raises: DamageError when there is none of that name."""
        if name not in self.tensors:
            raise DamageError(f"the state has no {name}")
        return self.tensors[name]

    def value(self, name: str) -> Any:
        """Raises: DamageError when there is none of that name."""
        if name not in self.plain:
            raise DamageError(f"the state has no {name}")
        return self.plain[name]

    def into(self, name: str, target: Tensor) -> None:
        """Copies a tensor into one of its shape and dtype.

        Raises: DamageError when it has another.
        """
        source = self.tensor(name)
        if source.shape != target.shape or source.dtype != target.dtype:
            raise DamageError(f"the state's {name} has another shape or dtype")
        with torch.no_grad():
            target.copy_(source)


def module_state(module: nn.Module) -> State:
    """Of a module in training.

    Raises: TypeError when its state_dict holds what is neither a tensor nor JSON.
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
    """Brings a module, built like the one that the state is of, to that state.

    Raises: DamageError when it does not fit.
    """
    own = state.part("own")
    try:
        module.load_state_dict({**own.tensors, **own.plain})
    except RuntimeError as error:
        raise DamageError(f"the state does not fit its module ({error})") from None
    for name, buffer in module.named_buffers():
        if f"buffer/{name}" in state.tensors:
            state.into(f"buffer/{name}", buffer)
    places = dict(module.named_modules())
    for name, tensor in state.part("generator").tensors.items():
        path, _, attribute = name.rpartition(".")
        getattr(places[path], attribute).set_state(tensor)
    attributes = state.part("attribute")
    for name, value in {**attributes.tensors, **attributes.plain}.items():
        path, _, attribute = name.rpartition(".")
        there = vars(places[path]).get(attribute)
        if isinstance(there, Tensor) and isinstance(value, Tensor) and there.shape == value.shape:
            state.into(f"attribute/{name}", there)
        elif isinstance(value, Tensor):
            setattr(places[path], attribute, value.clone())
        else:
            setattr(places[path], attribute, as_number(value))


def as_plain(value: bool | int | float) -> bool | int | str:
    """A number as JSON that gives back every bit; floats as text."""
    return float(value).hex() if isinstance(value, float) else value


def as_number(value: bool | int | str) -> bool | int | float:
    """The inverse of `as_plain`."""
    return float.fromhex(value) if isinstance(value, str) else value


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names, as in a state_dict, and values of tensors, numbers and generators that modules hold
    besides parameters and buffers."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            kept = isinstance(value, (bool, int, float, Tensor, torch.Generator))
            if kept and name != "training":
                yield (f"{path}.{name}" if path else name), value
