"""Names that every reader and writer of a run's files shares: cells, columns, controls.

A cell is an arm at one seed and one sparsity level; its name, 'A1/seed 7/L0 32', stands in
gate.json and in the manifest, its folder, 'A1/seed7-l0_32', below `cells/`. Where every arm is left
at the L0 that its settings give, the level is 0, and the names are 'A1/seed 7/own L0' and
'A1/seed7'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from saelab.storage.parquet import Kind

#: Folder of the cells inside a run folder.
CELLS = "cells"
#: Folder of a run's further settings inside a run folder: each is a run folder of its own.
SETTINGS = "settings"
#: Purpose of the quick form of a run, which names its stream of seeds and its folder too.
QUICK = "quick"
#: Beginning of the title of every quick form.
MARK = "QUICK FORM, no result of the study"
#: What the name of every control subject begins with.
CONTROL = "control:"
CHANNELS, FROZEN, PLANTED = "model channels", "frozen decoder", "planted effect"
#: The baseline at its initialisation: a random code at the target L0.
UNTRAINED = "untrained"
#: The baseline at fresh seeds under another name (A/A twin).
TWIN = "twin"
#: The level of a cell that is left at its own L0, in words.
OWN_L0 = "own L0"
_FOLDER = re.compile(r"seed(\d+)(?:-l0_(.+))?")

#: Facts of one learned scalar begin with these; the scalar's name follows. Its distance from its
#: start, in all and as a share of how far it could have moved; and the standard deviation of that
#: distance over the seeds of its arm.
MOVED, REACH, MOVED_SPREAD = "scalar_moved.", "scalar_reach.", "scalar_spread."


def control_arm(name: str) -> str:
    """Name of a control subject in the column `arm`."""
    return f"{CONTROL}{name}"


def level_of(target_l0: float | None) -> float:
    """Level of the cells at a plan's target L0; 0 where every arm is left at its own L0."""
    return target_l0 or 0.0


def check_level(level: float) -> float:
    """Returns a level of L0 that the name of a cell holds without rounding.

    Raises: ValueError for any other, since two levels could then share one folder.
    """
    if float(f"{level:g}") != level:
        raise ValueError(f"is named {level:g} in files: use at most 6 digits")
    return level


#: Level of sparsity in a study's settings, in active latents per token.
Level = Annotated[float, Field(gt=0, le=2**26), AfterValidator(check_level)]


@dataclass(frozen=True)
class CellId:
    """Identity of a cell: the name of its arm, its seed, and its L0 level in latents per token."""

    arm: str
    seed: int
    level: float

    @property
    def name(self) -> str:
        """'A1/seed 7/L0 32'."""
        return f"{self.arm}/seed {self.seed}/{self.level_text}"

    @property
    def level_text(self) -> str:
        """'L0 32', or 'own L0' of a cell that is not brought to a level."""
        return f"L0 {self.level:g}" if self.level else OWN_L0

    @classmethod
    def parse(cls, name: str) -> CellId:
        """The inverse of `name`; an arm's name may hold any of its signs.

        Raises: ValueError for a text that is not a cell's name.
        """
        arm, _, rest = name.rpartition("/seed ")
        seed, _, level = rest.partition("/")
        level = "0" if level == OWN_L0 else level.removeprefix("L0 ")
        if not arm:
            raise ValueError(f"{name!r} is not the name of a cell")
        return cls(arm, int(seed), float(level))

    @property
    def folder(self) -> PurePosixPath:
        """'A1/seed7-l0_32', below `CELLS`."""
        level = f"-l0_{self.level:g}" if self.level else ""
        return PurePosixPath(self.arm, f"seed{self.seed}{level}")

    @classmethod
    def of_folder(cls, arm: str, folder: str) -> CellId | None:
        """The inverse of `folder`; None for a folder of another name."""
        match = _FOLDER.fullmatch(folder)
        return cls(arm, int(match[1]), float(match[2] or 0)) if match else None

    def as_dict(self) -> dict[str, Any]:
        """The columns that name the cell in every table."""
        return {"arm": self.arm, "seed": self.seed, "level": self.level}


#: Columns of metrics.parquet that say where a number was measured; runs that differ in one are not
#: compared.
PROVENANCE = (
    *("model_digest", "tokenizer", "hook_name", "context", "mask", "dtype"),
    *("tokens", "text_digest"),
)
_CELL: dict[str, Kind] = {"arm": "text", "seed": "whole", "level": "number"}
#: Columns of metrics.parquet: one row for each measured number, a missing one with its reason.
METRIC_COLUMNS: dict[str, Kind] = {
    **_CELL,
    **{"metric": "text", "slice": "text", "value": "number?", "definition": "text"},
    "reason": "text?",
    **dict.fromkeys(PROVENANCE, "any"),
}
#: Columns of curves.parquet: the logged values of every cell over training, thinned.
CURVE_COLUMNS: dict[str, Kind] = {
    **_CELL,
    **{"step": "whole", "tokens": "whole", "name": "text", "value": "number?"},
}
#: Columns of documents.parquet: of each cell at the target what its core metrics are made of, for
#: each document of the held-out text, or each context where documents are not known.
_TEXT_SUMS = ("tokens", "error", "power", "active", "cosine")
_LOSS_SUMS = ("loss_tokens", "ce_clean", "ce_zero", "ce_mean", "ce_spliced")
DOCUMENT_COLUMNS: dict[str, Kind] = {
    **_CELL,
    **{"cluster": "whole", "kind": "text"},
    **dict.fromkeys(_TEXT_SUMS, "number"),
    **dict.fromkeys(_LOSS_SUMS, "number?"),
}
#: Columns that a table may lack, as older versions wrote it; their values are then None.
OPTIONAL = {"reason", "step", "definition", *PROVENANCE, *_LOSS_SUMS}
#: Arrow types of those columns, as they are written.
CURVE_TYPES = {"arm": "string", "seed": "int64", "level": "float64"}
CURVE_TYPES |= {"step": "int64", "tokens": "int64", "name": "string", "value": "float64"}


#: What the slice of a row begins with whose value belongs to the cell and another seed of its arm.
PAIR = "seed="
#: What the name of a metric begins with whose value is the last logged value of a scalar.
SCALAR = "scalar."
#: Definition of those rows and of `final_loss`: the value of the last training step.
SCALARS_DEFINITION = "last_logged/1"
#: The same of a scalar whose sign is free: its absolute value.
UNSIGNED_DEFINITION = "last_logged_absolute/1"


def control_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Arms of the control subjects among evaluation rows, in their order."""
    return [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm.startswith(CONTROL)]


#: Words of the verdict's first edition, in older files -> today's; 'no evidence' meant equivalence.
OLD_WORDS = {"no evidence": "equivalent", "cannot tell": "cannot tell yet"}
