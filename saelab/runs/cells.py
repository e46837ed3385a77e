"""The cells of a finished run, found again by arm, seed and level, and what they were measured on.

    run_1/manifest.json                       settings, study, target L0
    run_1/cells/<arm>/seed<s>-l0_<level>/     one cell

A cell's own folder is known by the same path, so that it finds its run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, nearest
from saelab.runs.folder import MANIFEST, RunFiles
from saelab.seeding import study_seeds
from saelab.study.plan import BaseConfig

CELLS = "cells"
_CELL = re.compile(r"seed(\d+)-l0_(.+)")


@dataclass(frozen=True)
class Member:
    """One cell of a run: where it lies, and which it is."""

    folder: Path
    arm: str
    seed: int
    level: float

    @property
    def place(self) -> Path:
        """Its folder inside the run's cells."""
        return Path(self.arm) / self.folder.name


@dataclass(frozen=True)
class RunFolder:
    """A complete run."""

    folder: Path

    @classmethod
    def of(cls, path: Path) -> RunFolder | None:
        """The run that is, or holds, the path; None where it is no part of a run."""
        path = path.resolve()
        if (path / MANIFEST).is_file():
            return cls(path)
        above = path.parents[2] if len(path.parents) > 2 else path
        inside = path.parent.parent.name == CELLS and (above / MANIFEST).is_file()
        return cls(above) if inside else None

    @cached_property
    def files(self) -> RunFiles:
        """What the run wrote, compared with its checksums when it is read."""
        return RunFiles(self.folder)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Raises: DamageError when it was changed or holds other types."""
        return self.files.needed("base", "study", "arms")

    @cached_property
    def base(self) -> BaseConfig:
        """Its settings, the run's changes included."""
        return BaseConfig.parse(self.manifest["base"], where=str(self.folder / MANIFEST))

    @property
    def probing_seed(self) -> int:
        """Of the probing examples that its cells were measured on."""
        return study_seeds(self.manifest["study"], "evaluation", 1)[0]

    @cached_property
    def cells(self) -> tuple[Member, ...]:
        """All of them, in the order of the arms."""
        found = []
        for arm in self.manifest["arms"]:
            for folder in sorted((self.folder / CELLS / arm).glob("seed*")):
                name = _CELL.fullmatch(folder.name)
                if name:
                    found.append(Member(folder, arm, int(name[1]), float(name[2])))
        return tuple(found)

    def chosen(self, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Member]:
        """The cells at the plan's L0; of the named arms and seeds, or of all.

        Raises: SettingError for an arm or seed that the run has not; SourceError without any cell.
        """
        target = self.manifest.get("target_l0") or 0.0
        at_target = [cell for cell in self.cells if cell.level == target]
        if not at_target:
            raise SourceError(f"{self.folder} has no cell at L0 {target:g}: name a complete run")
        for name in arms:
            known = dict.fromkeys(cell.arm for cell in at_target)
            if name not in known:
                remedy = f"no such arm{nearest(name, known)}; the run has {', '.join(known)}"
                raise SettingError("arm", name, remedy)
        found = [cell for cell in at_target if not arms or cell.arm in arms]
        for seed in seeds:
            had = sorted({cell.seed for cell in found})
            if seed not in had:
                raise SettingError("seed", seed, f"no such seed; there are {_listed(had)}")
        return [cell for cell in found if not seeds or cell.seed in seeds]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def members(path: Path, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Member] | None:
    """The cells that a run folder stands for; None when the path is no run folder.

    Raises: what `RunFolder.chosen` does; SettingError when arms or seeds are chosen of another
        folder.
    """
    if (path / MANIFEST).is_file():
        return RunFolder(path).chosen(arms, seeds)
    if arms or seeds:
        remedy = f"{path} is no run folder, of which arms and seeds could be chosen: leave it out"
        raise SettingError("arm" if arms else "seed", (arms or seeds)[0], remedy)
    return None
