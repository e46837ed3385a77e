"""Reads the files of a finished run and checks them: unchanged since the launch, expected types.

    manifest.json     sealed (`atomic.write_sealed`); holds the checksums of the others
    final_info.json, metrics.parquet, curves.parquet, gate.json, summary.md, cells/...

Each reader decides what a missing file means, since a driver may copy final_info.json alone. A file
that is there must be as it was written. A manifest without a seal was written by an older version
or by hand; `RunFiles.sealed` is then False, and `saelab verdict` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from saelab.errors import DamageError, SourceError
from saelab.storage.atomic import (
    json_text,
    read_json,
    read_sealed,
    sha256,
    write_sealed,
    write_text,
)
from saelab.storage.parquet import Kind, read_rows
from saelab.storage.validation import Loose, Name, Number, Whole, check

MANIFEST, INFO, GATE = "manifest.json", "final_info.json", "gate.json"
METRICS, CURVES = "metrics.parquet", "curves.parquet"
#: Files with checksums in the manifest, besides those of single cells that carry none themselves.
SEALED = (INFO, METRICS, CURVES, GATE, "summary.md")
OF_CELLS = ("latents.parquet", "module.safetensors")
#: Key of file -> checksum in the manifest. A manifest with it and without a digest was changed.
SUMS = "sha256"
REMEDY = "make the run again, or take the folder from where it was copied"


class _Arm(Loose):
    comment: str = ""
    changes: dict[str, Any] = Field(default_factory=dict)
    against: str = "baseline"


class _Comparison(Loose):
    arm: str
    n: Whole
    detectable: Number | None = None


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
    plan: dict[str, Any] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)
    deviations: list[str] = Field(default_factory=list)
    comparisons: list[_Comparison] = Field(default_factory=list)
    sha256: dict[str, str] = Field(default_factory=dict)


Plain = Number | str | bool | None


class _Group(Loose):
    means: dict[str, Plain] = Field(default_factory=dict)
    stderrs: dict[str, Number | None] = Field(default_factory=dict)
    final_info_dict: dict[str, list[Plain] | Plain] = Field(default_factory=dict)


class _Cell(Loose):
    arm: str
    seed: Whole
    level: Number
    expected: list[str]
    facts: dict[str, Plain]


@dataclass(frozen=True)
class RunFiles:
    """Folder of a run; every method raises DamageError for a file that is not as it was written."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Content of manifest.json; {} if there is none."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        data = check(read_json(path), _Manifest, path, REMEDY)
        if "digest" in data or SUMS in data:
            data = check(read_sealed(path, REMEDY), _Manifest, path, REMEDY)
        return data

    @cached_property
    def _sums(self) -> dict[str, str]:
        return self.manifest.get(SUMS, {})

    @property
    def sealed(self) -> bool:
        """True if the manifest holds the checksums of the other files."""
        return bool(self._sums)

    def needed(self, *names: str) -> dict[str, Any]:
        """Returns the manifest; raises SourceError when it lacks one of the names."""
        for name in names:
            if name not in self.manifest:
                remedy = "name the folder of a complete run of this version"
                raise SourceError(f"{self.folder / MANIFEST} has no {name}: {remedy}")
        return self.manifest

    def file(self, name: str) -> Path:
        """Returns the path of a file that is as it was written or has no checksum here."""
        path, expected = self.folder / name, self._sums.get(name)
        if expected is not None and path.is_file() and sha256(path) != expected:
            raise DamageError(f"{path} was changed after the run wrote it: {REMEDY}")
        return path

    def info(self) -> dict[str, dict[str, Any]]:
        """Reads final_info.json; raises SourceError when it is missing."""
        path = self.file(INFO)
        return check(read_json(path), dict[str, _Group], path, REMEDY)

    def gates(self) -> dict[str, dict[str, Any]]:
        """Reads gate.json, the facts of each cell by its name; raises SourceError when it is
        missing."""
        path = self.file(GATE)
        return check(read_json(path), dict[str, _Cell], path, REMEDY)

    def rows(
        self, name: str, columns: Mapping[str, Kind], only: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Reads rows of a table, see `read_rows`; none if the file is missing."""
        path = self.file(name)
        return read_rows(path, columns, only, REMEDY) if path.is_file() else []


def seal_run(folder: Path, manifest: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Writes the manifest of a run whose other files are all there, then final_info.json, which
    makes the run complete."""
    cells = sorted(p for name in OF_CELLS for p in (folder / "cells").glob(f"*/*/{name}"))
    names = [*SEALED, *(file.relative_to(folder).as_posix() for file in cells)]
    present = [name for name in names if name != INFO and (folder / name).is_file()]
    sums = {name: sha256(folder / name) for name in present}
    text = json_text(info)
    sums[INFO] = hashlib.sha256(text.encode()).hexdigest()
    write_sealed(folder / MANIFEST, json.loads(json.dumps(manifest)) | {SUMS: sums})
    write_text(folder / INFO, text)
