"""Examples of parts, and the SAE in which each is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from saelab.parts import AROUND_AN_EXAMPLE, SEAMS, TABLE
from saelab.parts.base import Dims, Example, Part, PartConfig
from saelab.sae import SAE, SAEConfig

#: Field of the SAE's settings in which the parts of each seam stand.
FIELDS = {
    "scaling": "scaling",
    "activation": "activation",
    "loss": "losses",
    "controller": "controllers",
    "constraint": "constraints",
    "observer": "observers",
}


@dataclass(frozen=True)
class Case:
    """One example of a part.

    Args:
        seam: of the part.
        example: as the part gives it.
        index: among the part's examples.
    """

    seam: str
    example: Example
    index: int = 0

    @property
    def part(self) -> PartConfig:
        return self.example.part

    @property
    def kind(self) -> str:
        return self.part.kind

    def __str__(self) -> str:
        """Returns the seam and the kind, with a number from the second example on."""
        return f"{self.seam}-{self.kind}" + (f"-{self.index + 1}" if self.index else "")

    def settings(self, d_sae: int, **changes: Any) -> SAEConfig:
        """Returns an SAE with the part in its place and everything that must stand beside it.

        Args:
            d_sae: number of latents, the one that the example was asked for.
            changes: fields of the settings that are replaced as a whole.
        """
        data: dict[str, Any] = {"d_sae": d_sae, **AROUND_AN_EXAMPLE}
        field = FIELDS[self.seam]
        several = field.endswith("s")
        data[field] = [*_without(self.part, data.get(field, ())), self.part]
        data[field] = data[field] if several else self.part
        for name, value in self.example.beside.items():
            added = isinstance(value, (list, tuple))
            data[name] = [*data.get(name, ()), *value] if added else value
        return SAEConfig.parse(data | changes)

    def part_of(self, sae: SAE) -> Part:
        """Returns the part that was built from the example in an SAE of `settings`."""
        place = getattr(sae, FIELDS[self.seam])
        return cast(Part, place[self.kind] if FIELDS[self.seam].endswith("s") else place)


def _without(part: PartConfig, others: tuple[PartConfig, ...]) -> Iterator[PartConfig]:
    """Yields the others but those of the same kind, and controllers of the same setting."""
    for other in others:
        names = getattr(other, "name", None), getattr(part, "name", "")
        if type(other) is not type(part) and names[0] != names[1]:
            yield other


def cases(
    d_sae: int,
    *seams: str,
    table: Mapping[str, Mapping[str, type[PartConfig]]] = TABLE,
    first: bool = False,
    with_model: bool = False,
) -> list[Case]:
    """Returns every example of every registered part at a width.

    Args:
        d_sae: number of latents.
        seams: of the parts; all where none is given.
        table: the parts by seam and kind.
        first: whether only the first example of each part is wanted.
        with_model: takes parts that need the language model too. No trial of a part has one, and
            tests of their own train them.
    """
    return [
        Case(seam, example, i)
        for seam in seams or SEAMS
        for config in table[seam].values()
        for i, example in enumerate(config.examples(d_sae))
        if not (first and i) and (with_model or not _needs_model(example.part, d_sae))
    ]


def _needs_model(part: PartConfig, d_sae: int) -> bool:
    with torch.device("meta"):
        return part.build(Dims(2, d_sae)).needs_model
