"""The table of formats: one line per format. A new one is one file here and one line in `TABLE`.

Only JSON and safetensors are read from files that others wrote; a format that keeps pickles is read
only where it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, nearest
from saelab.formats import dictionary_learning, own, saelens, sparsify
from saelab.formats.base import Loaded, Origin, Plain, understood
from saelab.sae import SAE

__all__ = ["TABLE", "Format", "Loaded", "Origin", "Plain", "find", "load", "saver"]

Save = Callable[[SAE, Path, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Format:
    """How a kind of directory is known, read and written.

    Args:
        files: that it must hold.
        load: raises a UsageError that names the remedy.
        save: None where it is not written.
        by_name: read only where it is named, because it holds pickles.
    """

    files: tuple[str, ...]
    load: Callable[[Path], Loaded]
    save: Save | None = None
    by_name: bool = False


TABLE: dict[str, Format] = {
    "saelab": Format(own.FILES, own.load),
    "saelens": Format(saelens.FILES, saelens.load, saelens.save),
    "sparsify": Format(sparsify.FILES, sparsify.load),
    "dictionary_learning": Format(
        dictionary_learning.FILES, dictionary_learning.load, by_name=True
    ),
}


def find(folder: Path, named: str = "") -> str:
    """The format of a directory: the named one, or the one whose files are there.

    Raises: SettingError for an unknown name; SourceError when the directory holds no SAE.
    """
    if named:
        if named not in TABLE:
            remedy = f"known: {', '.join(TABLE)}{nearest(named, TABLE)}"
            raise SettingError("format", named, remedy)
        return named
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise SourceError(f"{folder} {what}: name the directory of a saved SAE")
    for name in TABLE:
        if not TABLE[name].by_name and _holds(folder, TABLE[name]):
            return name
    raise SourceError(f"{folder} holds no sae.json and no SAE of another tool{_hint(folder)}")


def _holds(folder: Path, format: Format) -> bool:
    return all((folder / name).is_file() for name in format.files)


def _hint(folder: Path) -> str:
    for name, format in TABLE.items():
        if format.by_name and _holds(folder, format):
            return f": say --format {name} to read its pickle (tensors alone)"
    inside = [child.name for child in sorted(folder.iterdir()) if child.is_dir()]
    below = [n for n in inside for f in TABLE.values() if _holds(folder / n, f)]
    if below:
        return f": name one of the folders in it, such as {below[0]!r}"
    some = [f for format in TABLE.values() for f in format.files if (folder / f).is_file()]
    if some:
        rest = [" and ".join(f.files) for f in TABLE.values() if some[0] in f.files]
        return f" ({some[0]} alone is not enough): it needs {', or '.join(rest)}"
    if (folder / "module.safetensors").is_file():
        return " but a user's own module, whose code is not here: choose other arms with --arm"
    if any(p.suffix in (".pt", ".pth", ".bin", ".pkl") for p in folder.iterdir()):
        return " (pickles are not read): save it as safetensors"
    return ": name the folder of a saved SAE"


def load(folder: str | Path, named: str = "") -> Loaded:
    """The SAE in a directory, in evaluation mode; raises as `find`, and as its format."""
    folder = Path(folder)
    with understood(folder):
        name = find(folder, named)
        found = TABLE[name].load(folder)
    if TABLE[name].save is None and name != "saelab":  # not told as SAELens tells its training
        return replace(found, about={**found.about, "format": name})
    return found


def saver(named: str) -> Save:
    """Raises: SettingError for a format that is not written."""
    written = {name: format.save for name, format in TABLE.items() if format.save is not None}
    if named not in written:
        remedy = f"is not written; known: {', '.join(written)}{nearest(named, written)}"
        raise SettingError("format", named, remedy)
    return written[named]
