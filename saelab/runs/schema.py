"""Names that every reader and writer of a run's files shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "control:"


CHANNELS, FROZEN, PLANTED = "model channels", "frozen decoder", "planted effect"

#: Facts of one learned scalar begin with this; the scalar's name follows.
REACH = "scalar_reach."


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The controls among evaluation rows, in their order."""
    found = dict.fromkeys(row["arm"] for row in rows)
    return [name for name in found if name.startswith(PREFIX)]
