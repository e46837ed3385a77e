"""The formats of saved SAEs. A new format is one file here and one line in `TABLE`.

Of files that others wrote only JSON and safetensors are read; a format that holds pickles is read
only if it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, nearest
from saelab.formats import dictionary_learning, own, saelens, sparsify
from saelab.formats.base import Loaded, Origin, Plain, errors_as_source_error
from saelab.sae import SAE

__all__ = ["TABLE", "Format", "Loaded", "Origin", "Plain", "find", "load", "saver"]

Save = Callable[[SAE, Path, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Format:
    """A kind of directory: its files, and the functions that read and write it.

    Args:
        files: the files that it must hold.
        load: reads a directory; raises a UsageError that names the remedy.
        save: writes a directory; None if the format is not written.
        by_name: whether it is read only if it is named, because it holds pickles.
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


def find(folder: Path, format_name: str = "") -> str:
    """Returns the format of a directory: the named one, or the one whose files the directory has.

    Raises: SettingError for an unknown name; SourceError when the directory holds no SAE.
    """
    if format_name:
        if format_name not in TABLE:
            remedy = f"use one of {', '.join(TABLE)}{nearest(format_name, TABLE)}"
            raise SettingError("format", format_name, remedy)
        return format_name
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise SourceError(f"{folder} {problem}: name the directory of a saved SAE")
    for name in TABLE:
        if not TABLE[name].by_name and _has_files(folder, TABLE[name]):
            return name
    raise SourceError(f"{folder} holds no sae.json and no SAE of another tool{_hint(folder)}")


def _has_files(folder: Path, format: Format) -> bool:
    return all((folder / name).is_file() for name in format.files)


def _hint(folder: Path) -> str:
    """Ends the message about a directory without an SAE: says what it holds, and the remedy."""
    for name, format in TABLE.items():
        if format.by_name and _has_files(folder, format):
            return f": use --format {name} to read its pickle (only tensors are read)"
    children = [child.name for child in sorted(folder.iterdir()) if child.is_dir()]
    saes = [n for n in children for f in TABLE.values() if _has_files(folder / n, f)]
    if saes:
        return f": name one of the folders in it, such as {saes[0]!r}"
    files = [f for format in TABLE.values() for f in format.files if (folder / f).is_file()]
    if files:
        complete = [" and ".join(f.files) for f in TABLE.values() if files[0] in f.files]
        return f" ({files[0]} alone is not enough): it needs {', or '.join(complete)}"
    if (folder / "module.safetensors").is_file():
        return " but a user's own module, whose code is not here: choose other arms with --arm"
    if any(p.suffix in (".pt", ".pth", ".bin", ".pkl") for p in folder.iterdir()):
        return " (pickles are not read): save it as safetensors"
    return ": name the folder of a saved SAE"


def load(folder: str | Path, format_name: str = "") -> Loaded:
    """Loads the SAE in a directory, in evaluation mode.

    Raises: as `find`, and as the `load` of its format.
    """
    folder = Path(folder)
    with errors_as_source_error(folder):
        name = find(folder, format_name)
        loaded = TABLE[name].load(folder)
    if TABLE[name].save is None and name != "saelab":  # `about` is not SAELens metadata
        return replace(loaded, about={**loaded.about, "format": name})
    return loaded


def saver(format_name: str) -> Save:
    """Returns the function that writes the named format.

    Raises: SettingError for a format that is not written.
    """
    written = {name: format.save for name, format in TABLE.items() if format.save is not None}
    if format_name not in written:
        remedy = f"is not written: use one of {', '.join(written)}{nearest(format_name, written)}"
        raise SettingError("format", format_name, remedy)
    return written[format_name]
