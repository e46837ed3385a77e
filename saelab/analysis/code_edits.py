"""Edits of a code: latents are scaled, set or raised at chosen positions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.runtime.counting import count

#: Positions of a text, counted from 0: one, a slice, several, or None for all.
Positions = int | slice | Iterable[int] | None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Change of one latent.

    Args:
        latent: its index.
        kind: 'scale' multiplies its value, 'set' replaces it, 'add' adds to it.
        value: in the unit of the code, but for 'scale'.
        positions: where it is changed; a slice has no negative bounds.
    """

    latent: int
    kind: Literal["scale", "set", "add"]
    value: float
    positions: slice | frozenset[int]

    def apply(self, f: Tensor, positions: Tensor) -> Tensor:
        """Returns the changed code; gradients pass through.

        Args:
            f: code, [n, d_sae].
            positions: of its rows in their texts, int64 [n].
        """
        column = f[:, self.latent]
        if self.kind == "scale":
            changed = column * self.value
        elif self.kind == "add":
            changed = column + self.value
        else:
            changed = torch.full_like(column, self.value)
        out = f.clone()
        out[:, self.latent] = torch.where(self._contains(positions), changed, column)
        return out

    def _contains(self, positions: Tensor) -> Tensor:
        if isinstance(self.positions, frozenset):
            return torch.isin(positions, positions.new_tensor(sorted(self.positions)))
        first, stop, step = self.positions.start or 0, self.positions.stop, self.positions.step or 1
        inside = (positions >= first) & ((positions - first) % step == 0)
        return inside if stop is None else inside & (positions < stop)


def check_latent(latent: int, d_sae: int) -> int:
    """Returns the latent; raises SettingError unless it is one of d_sae."""
    if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < d_sae:
        remedy = f"the SAE has {count(d_sae, 'latent')}, counted from 0: the last is {d_sae - 1}"
        raise SettingError("latent", latent, remedy)
    return latent


def check_value(value: float, name: str = "value") -> float:
    """Returns the value; raises SettingError unless it is a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingError(name, value, "use a finite number, such as 4")
    return float(value)


def parse_positions(positions: Positions) -> slice | frozenset[int]:
    """Returns positions as an `Edit` has them.

    Raises: SettingError for one below 0, whose place is not known while a text is generated.
    """
    if positions is None:
        return slice(None)
    if isinstance(positions, slice):
        numbers = [n for n in (positions.start, positions.stop, positions.step) if n is not None]
        bad = positions.step is not None and positions.step < 1
    else:
        numbers = [positions] if isinstance(positions, int) else [int(n) for n in positions]
        bad = False
    if bad or any(n < 0 for n in numbers):
        given = positions if isinstance(positions, (int, slice)) else min(numbers)
        remedy = "count positions from 0 at the start of the text, forwards"
        raise SettingError("positions", str(given), remedy)
    return positions if isinstance(positions, slice) else frozenset(numbers)
