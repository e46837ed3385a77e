"""The content hash of a cell: settings, seed, data, and the code that computes it."""

from __future__ import annotations

import ast
import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from saelab.config import digest
from saelab.data.activations.store import Source
from saelab.errors import SettingError
from saelab.kernels import kernels_name
from saelab.parts.base import Dims
from saelab.storage.cache import package_digest
from saelab.study.plan import CellSpec


@dataclass(frozen=True)
class Key:
    """Contents of a cell's hash, except for the training activations.

    Their digest is known once they are complete, so a worker may train first and hash then.

    Args:
        settings: of the SAE and its training, seed and level.
        data: what else the cell's numbers depend on.
        code: that computes them.
        control: name of a control subject, '' for a cell.
    """

    settings: list[Any]
    data: dict[str, Any]
    code: list[str]
    control: str = ""

    def hash(self, train: str) -> str:
        """The content hash, with the digest of the training activations."""
        own = digest([*self.settings, self.data | {"train": train}, self.code])
        return digest([self.control, own]) if self.control else own


def cell_key(spec: CellSpec, data: dict[str, Any]) -> Key:
    """The key of a cell: settings, seed, data, and the code that computes it."""
    code = [package_digest(), torch.__version__, kernels_name(), *_foreign_code(spec)]
    sae, training = spec.sae.model_dump(mode="json"), spec.train.model_dump(mode="json")
    return Key([sae, training, spec.id.seed, spec.id.level], data, code)


def _foreign_code(spec: CellSpec) -> list[str]:
    """Code outside the package that the cell runs: the files that define its parts and module."""
    owners: list[Any] = [spec.module] if spec.module else []
    for part in spec.sae.all_parts():
        if not type(part).__module__.startswith("saelab."):
            owners += [type(part), type(part.build(Dims(2, spec.sae.d_sae)))]
    files = {_file_of(owner) for owner in owners}
    return [_code(file, spec.id.arm if spec.module else None) for file in sorted(files)]


def _file_of(owner: Any) -> Path:
    """The file that defines a class, a function or what a callable is made of.

    Raises: SettingError when there is none, as for code typed into an interpreter.
    """
    while isinstance(owner, functools.partial):
        owner = owner.func
    owner = owner if isinstance(owner, (type, FunctionType)) else type(owner)
    try:
        return Path(inspect.getfile(owner)).resolve(strict=True)
    except (TypeError, OSError):
        remedy = "its source can't be read, so its cells could be mistaken for older ones: keep it "
        raise SettingError("code", owner.__qualname__, f"{remedy}in a file") from None


def _code(file: Path, arm: str | None) -> str:
    """A file's code without comments and without its run table; of that, the entry of `arm`."""
    kept: list[ast.AST] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not _of_table(node):
            kept.append(node)
        elif arm is not None:
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            kept += [call for call in calls if _names(call, arm)] or [node]
    return "\n".join(map(ast.unparse, kept))


def _of_table(node: ast.stmt) -> bool:
    """Returns True if a statement fills RUNS, or is the file's `if __name__ == "__main__"`."""
    places = [getattr(node, name, None) for name in ("target", "test")]
    places += getattr(node, "targets", [])
    inside = [part for place in places if place is not None for part in ast.walk(place)]
    return any(isinstance(part, ast.Name) and part.id in ("RUNS", "__name__") for part in inside)


def _names(call: ast.Call, arm: str) -> bool:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(value, ast.Constant) and value.value == arm for value in values)


def cell_folder(cache: Path, key: Key, train: str) -> Path:
    """A cell's place in the cache, with the digest of the training activations."""
    return cache / "cells" / key.hash(train)


def resume_folder(cache: Path, key: Key, train: Source, foreign: bool) -> Path:
    """Folder of a cell's checkpoints while it is trained; known before its training activations
    are complete, by all that decides them."""
    return cache / "resume" / key.hash(train.digest if foreign else digest(train.header))
