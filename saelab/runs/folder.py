"""A run folder, opened once: its files, unchanged since the launch, and its cells.

    manifest.json     is sealed (`storage.atomic.write_sealed`) and holds the others' checksums
    final_info.json, metrics.parquet, curves.parquet, documents.parquet, gate.json, summary.md
    cells/<arm>/seed<s>-l0_<level>/
    settings/<name>/                 a run folder for each further setting of the plan

Each file is read and checked once, when it is first asked for, and through no link. The manifest
decides which cells the run has; other folders among its cells are named and ignored. Whether a
missing file is an error is up to its reader: a driver may copy final_info.json alone. A file that
exists must be as it was written, of the types that it is written with. A manifest without a seal
comes from an older version or was made by hand; `sealed` says so, and `saelab verdict` reports it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from saelab.errors import DamageError, SettingError, SourceError, nearest
from saelab.runs.schema import (
    CELLS,
    CURVE_COLUMNS,
    DOCUMENT_COLUMNS,
    METRIC_COLUMNS,
    OPTIONAL,
    SETTINGS,
    CellId,
    level_of,
)
from saelab.seeding import study_seeds
from saelab.storage.atomic import (
    json_text,
    read_json,
    read_sealed,
    sha256,
    write_sealed,
    write_text,
)
from saelab.storage.links import inside, refuse_links
from saelab.storage.parquet import Kind, column_types, read_rows
from saelab.storage.validation import Int64, Loose, Name, Number, validate

MANIFEST, INFO, GATE = "manifest.json", "final_info.json", "gate.json"
SUMMARY = "summary.md"
METRICS, CURVES, DOCUMENTS = "metrics.parquet", "curves.parquet", "documents.parquet"
#: Files that the manifest holds checksums of: of the run, and of each of its cells.
SEALED = (INFO, METRICS, CURVES, DOCUMENTS, GATE, SUMMARY)
OF_CELLS = ("sae.safetensors", "sae.json", "module.safetensors", "latents.parquet")
#: Key of file -> checksum in the manifest. A manifest with it and without a digest was changed.
SUMS = "sha256"
REMEDY = "make the run again, or take the folder from where it was copied"


class _Arm(Loose):
    comment: str = ""
    changes: dict[str, Any] = Field(default_factory=dict)
    against: str = "baseline"


class _Comparison(Loose):
    arm: str
    n: Int64
    detectable: Number | None = None


class _Level(Loose):
    number: Int64
    level: Annotated[float, Field(gt=0, lt=0.5)]
    look: Int64


class _Budget(Loose):
    left: Number
    next_level: Number
    comparisons: Int64
    planned: Int64
    discoveries: Int64
    lost: list[str] = Field(default_factory=list)


class _SettingEffect(Loose):
    setting: str
    word: str
    mean_diff: Number | None = None
    low: Number | None = None
    high: Number | None = None
    reason: str = ""


class _Across(Loose):
    arm: str
    metric: str
    level: Number
    sesoi: Number
    settings: Annotated[list[_SettingEffect], Field(min_length=1)]
    mean: Number | None = None
    low: Number | None = None
    high: Number | None = None
    new_low: Number | None = None
    new_high: Number | None = None
    word: str = ""
    reason: str = ""


class _Scalar(Loose):
    meaning: str = ""
    unit: str = ""


Plain = Number | str | bool | None


class _Cell(Loose):
    arm: str
    seed: Int64
    level: Number
    expected: list[str]
    facts: dict[str, Plain]


class _Manifest(Loose):
    """Types of the entries that a manifest may have."""

    run: str = ""
    title: str = ""
    study: str = ""
    baseline: str = ""
    primary: str = ""
    purpose: str = ""
    target_l0: Number | None = None
    arms: dict[Name, _Arm] = Field(default_factory=dict)
    cells: dict[str, str] = Field(default_factory=dict)
    scalars: dict[str, _Scalar] = Field(default_factory=dict)
    plan: dict[str, Any] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)
    settings: list[Name] = Field(default_factory=list)
    across: list[_Across] = Field(default_factory=list)
    deviations: list[str] = Field(default_factory=list)
    comparisons: list[_Comparison] = Field(default_factory=list)
    error_levels: dict[str, _Level] = Field(default_factory=dict)
    budget: _Budget | None = None
    twin: dict[str, _Cell] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)


class _Group(Loose):
    means: dict[str, Plain] = Field(default_factory=dict)
    stderrs: dict[str, Number | None] = Field(default_factory=dict)
    final_info_dict: dict[str, list[Plain] | Plain] = Field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One cell of a run: its folder, and which cell it is."""

    folder: Path
    id: CellId


@dataclass(frozen=True)
class RunFolder:
    """A run on disk; every reader raises DamageError for a file that is not as it was written."""

    folder: Path

    @classmethod
    def of(cls, path: Path) -> RunFolder | None:
        """The run that the path is, or lies in as one of its cells; None for any other path."""
        path = path.resolve()
        if (path / MANIFEST).is_file():
            return cls(path)
        above = path.parents[2] if len(path.parents) > 2 else path
        inside = path.parent.parent.name == CELLS and (above / MANIFEST).is_file()
        return cls(above) if inside else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json; {} where there is none."""
        path = inside(self.folder, MANIFEST)
        if not path.is_file():
            return {}
        data = validate(read_json(path), _Manifest, path, REMEDY)
        if "digest" in data or SUMS in data:
            data = validate(read_sealed(path, REMEDY), _Manifest, path, REMEDY)
        return data

    @cached_property
    def _sums(self) -> dict[str, str]:
        return self.manifest.get(SUMS, {})

    @property
    def sealed(self) -> bool:
        """Returns True if the manifest holds checksums of the other files."""
        return bool(self._sums)

    def required(self, *names: str) -> dict[str, Any]:
        """The manifest; raises SourceError when it lacks one of the names."""
        for name in names:
            if name not in self.manifest:
                remedy = "name the folder of a complete run of this version"
                raise SourceError(f"{self.folder / MANIFEST} has no {name}: {remedy}")
        return self.manifest

    def has(self, *names: str) -> bool:
        """Returns True if all the named files are there."""
        return all((self.folder / name).is_file() for name in names)

    def with_files(self, *names: str) -> RunFolder:
        """Returns this folder, for whoever would say something else without the files.

        Raises: DamageError for one that the run wrote and that is gone.
        """
        for name in names:
            if name in self._sums and not self.has(name):
                raise DamageError(f"{self.folder / name} is missing: {REMEDY}")
        return self

    def file(self, name: str) -> Path:
        """Path of a file that is as it was written, or that the manifest has no checksum of.

        Raises: DamageError for a changed file, SourceError for a link.
        """
        path, expected = inside(self.folder, name), self._sums.get(name)
        if expected is not None and path.is_file() and sha256(path) != expected:
            raise DamageError(f"{path} was changed after the run wrote it: {REMEDY}")
        return path

    @cached_property
    def info(self) -> dict[str, dict[str, Any]]:
        """Reads final_info.json; raises SourceError when it is missing."""
        path = self.file(INFO)
        return validate(read_json(path), dict[str, _Group], path, REMEDY)

    @cached_property
    def gates(self) -> dict[str, dict[str, Any]]:
        """gate.json: cell -> the facts that the gate looked at; raises SourceError without it."""
        path = self.file(GATE)
        return validate(read_json(path), dict[str, _Cell], path, REMEDY)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.parquet, see `schema.METRIC_COLUMNS`; none without the file."""
        return self._rows(METRICS, METRIC_COLUMNS)

    @cached_property
    def curves(self) -> list[dict[str, Any]]:
        """All rows of curves.parquet, see `schema.CURVE_COLUMNS`; none without the file."""
        return self._rows(CURVES, CURVE_COLUMNS)

    @cached_property
    def documents(self) -> list[dict[str, Any]]:
        """All rows of documents.parquet, see `schema.DOCUMENT_COLUMNS`; none for a run without it.

        Raises: DamageError when the run had the file, which is a reason for other words.
        """
        return self.with_files(DOCUMENTS)._rows(DOCUMENTS, DOCUMENT_COLUMNS)

    def _rows(self, name: str, columns: Mapping[str, Kind]) -> list[dict[str, Any]]:
        path = self.file(name)
        if not path.is_file():
            return []
        absent = OPTIONAL - set(column_types(path, REMEDY))
        present: dict[str, Kind] = {n: kind for n, kind in columns.items() if n not in absent}
        empty = dict.fromkeys(absent & columns.keys())
        return [row | empty for row in read_rows(path, present, remedy=REMEDY)]

    @cached_property
    def settings(self) -> dict[str, RunFolder]:
        """Runs of the plan's further settings, by name; {} for a run without.

        Raises: DamageError for one that is missing or was made anew without this run.
        """
        runs = {}
        for name in self.manifest.get("settings", ()):
            if not self.file(f"{SETTINGS}/{name}/{MANIFEST}").is_file():
                raise DamageError(f"{self.folder / SETTINGS / name} is missing: {REMEDY}")
            runs[name] = RunFolder(self.folder / SETTINGS / name)
        return runs

    @property
    def target_level(self) -> float:
        """Level of the cells at the plan's target L0."""
        return level_of(self.manifest.get("target_l0"))

    @property
    def probing_seed(self) -> int:
        """Seed of the probing examples that its cells were measured on."""
        return study_seeds(self.required("study")["study"], "evaluation", 1)[0]

    @cached_property
    def cells(self) -> tuple[Member, ...]:
        """All cells that the manifest names, in the order of the arms; () where no folder of a cell
        was copied with the run. Other folders among them are named on stderr."""
        manifest = self.required("arms", "cells")
        if self.leftovers:
            print(_leftovers_line(self.folder / CELLS, self.leftovers), file=sys.stderr)
        if not (self.folder / CELLS).is_dir():
            return ()
        arms = list(manifest["arms"])
        members = [Member(self.folder / CELLS / cell.folder, cell) for cell in self._cell_ids]
        return tuple(sorted(members, key=lambda m: (arms.index(m.id.arm), m.folder.name)))

    @cached_property
    def _cell_ids(self) -> list[CellId]:
        """Cells that the manifest names, of arms that it names."""
        path, ids = self.folder / MANIFEST, []
        for name in self.manifest.get("cells", {}):
            try:
                ids.append(CellId.parse(name))
            except ValueError as error:
                raise DamageError(f"{path} is damaged ({error}): {REMEDY}") from None
            if ids[-1].arm not in self.manifest["arms"]:
                raise DamageError(f"{path} names the cell {name!r} of no arm: {REMEDY}")
        return ids

    @cached_property
    def leftovers(self) -> list[str]:
        """Folders of cells that the manifest does not name, as 'A1/seed7-l0_32': another launch,
        with more arms or seeds, has left them."""
        named = {cell.folder.as_posix() for cell in self._cell_ids}
        arms = (self.folder / CELLS).glob("[!.]*")
        found = [cell for arm in arms if not arm.is_symlink() for cell in arm.glob("[!.]*")]
        names = (cell.relative_to(self.folder / CELLS).as_posix() for cell in found)
        return sorted(name for name in names if name not in named)

    def check_cells(self, members: Iterable[Member]) -> None:
        """Compares all files of cells with their checksums in the manifest.

        Raises: DamageError for a cell of which a file is missing or changed, SourceError for a link
            or for a cell that the manifest does not name.
        """
        known = set(self._cell_ids)
        for member in members:
            place = f"{CELLS}/{member.id.folder}/"
            if member.id not in known:
                remedy = "another launch has left it: name a cell of this run, or copy it elsewhere"
                raise SourceError(f"{self.folder / MANIFEST} does not name {place[:-1]}: {remedy}")
            for name in (name for name in self._sums if name.startswith(place)):
                if not self.file(name).is_file():
                    raise DamageError(f"{self.folder / name} is missing: {REMEDY}")
            refuse_links(inside(self.folder, place))

    def choose(self, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Member]:
        """The cells at the plan's L0: of the named arms and seeds, or all of them.

        Raises: SettingError for an arm or seed that the run does not have; SourceError where it has
            no cell.
        """
        target = self.target_level
        at_target = [cell for cell in self.cells if f"{cell.id.level:g}" == f"{target:g}"]
        if not at_target:
            raise SourceError(f"{self.folder} has no cell at L0 {target:g}: name a complete run")
        for name in arms:
            present = dict.fromkeys(cell.id.arm for cell in at_target)
            if name not in present:
                remedy = f"no such arm{nearest(name, present)}; the run has {', '.join(present)}"
                raise SettingError("arm", name, remedy)
        chosen = [cell for cell in at_target if not arms or cell.id.arm in arms]
        for seed in seeds:
            present = sorted({cell.id.seed for cell in chosen})
            if seed not in present:
                listed = ", ".join(map(str, present))
                raise SettingError("seed", seed, f"no such seed; the run has {listed}")
        return [cell for cell in chosen if not seeds or cell.id.seed in seeds]


def run_cells(
    path: Path, arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Member] | None:
    """The cells that a run folder stands for, checked; None when the path is not a run folder.

    A path that is a cell of a run is checked as well.

    Raises: what `RunFolder.choose` and `check_cells` do; SettingError when arms or seeds are chosen
        of another folder.
    """
    if (path / MANIFEST).is_file():
        run = RunFolder(path)
        chosen = run.choose(arms, seeds)
        run.check_cells(chosen)
        return chosen
    if arms or seeds:
        remedy = f"{path} is not a run folder, so it has no arms or seeds to choose: leave it out"
        raise SettingError("arm" if arms else "seed", (arms or seeds)[0], remedy)
    _check_lone_cell(path)
    return None


def _check_lone_cell(path: Path) -> None:
    """Checks a cell that is named by its folder in a run; see `RunFolder.check_cells`."""
    place = path.absolute()  # links are not followed
    above = place.parents[2] if len(place.parents) > 2 else place
    if place.parent.parent.name == CELLS and (above / MANIFEST).is_file():
        cell = CellId.of_folder(place.parent.name, place.name)
        if cell is None:
            raise SourceError(f"{path} is not the folder of a cell: name one of {above}")
        RunFolder(above).check_cells([Member(place, cell)])


def _leftovers_line(folder: Path, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    plural = "s" if len(names) > 1 else ""
    listed = f"{len(names)} folder{plural} ({', '.join(names[:3])}{more})"
    return f"{folder} holds {listed} that the run's manifest does not name: ignored"


def seal_run(folder: Path, manifest: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes the manifest of a run whose other files are all there, then final_info.json, with
    which the run is complete."""
    cells = (f"{CELLS}/{CellId.parse(name).folder}" for name in sorted(manifest.get("cells", {})))
    names = [*SEALED, *(f"{cell}/{name}" for cell in cells for name in OF_CELLS)]
    names += [f"{SETTINGS}/{name}/{MANIFEST}" for name in manifest.get("settings", ())]
    present = [name for name in names if name != INFO and (folder / name).is_file()]
    sums = {name: sha256(folder / name) for name in present}
    text = json_text(info)
    sums[INFO] = hashlib.sha256(text.encode()).hexdigest()
    write_sealed(folder / MANIFEST, json.loads(json.dumps(manifest)) | {SUMS: sums})
    write_text(folder / INFO, text)
