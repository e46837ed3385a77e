"""The formats of saved SAEs. A new one is one file, here or in `published`, and a line in `TABLE`.

Of files that others wrote only JSON, safetensors and arrays of numbers (npz) are read; a format
that holds pickles is read only if it is named, and then only tensors are unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, nearest
from saelab.formats import dictionary_learning, own, saelens, sparsify
from saelab.formats.base import Loaded, Plain, errors_as_source_error
from saelab.formats.hub import fetch
from saelab.formats.hub.reference import Reference, is_reference, parse
from saelab.formats.published import (
    cross_layer_transcoder,
    deepseek_r1,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    hook_z,
    layer_transcoder,
    llama_scope,
    llama_scope_r1,
    openai,
    qwen_scope,
    temporal,
)
from saelab.origin import Origin
from saelab.sae import SAE

__all__ = ["TABLE", "Format", "Loaded", "Origin", "Plain", "find", "load", "pinned", "saver"]

Save = Callable[[SAE, Path, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Format:
    """A kind of directory: its files, and the functions that read and write it.

    Args:
        files: the files that it must hold.
        pattern: regular expression of the name of the one file that it must hold; then the format
            reads that file by its own path too.
        load: reads a directory; raises a UsageError that names the remedy.
        save: writes a directory; None if the format is not written.
        by_name: whether it is read only if it is named, because it holds pickles.
        also: files next to them that are read where they are there; after a pattern, \\1 is its
            first group.
    """

    files: tuple[str, ...]
    load: Callable[[Path], Loaded]
    save: Save | None = None
    by_name: bool = False
    pattern: str = ""
    also: tuple[str, ...] = ()

    def fits(self, path: Path) -> bool:
        """Returns whether the path is of this kind, by names alone."""
        if self.pattern:
            files = [path] if path.is_file() else path.iterdir() if path.is_dir() else []
            return any(re.fullmatch(self.pattern, file.name) for file in files)
        return all((path / name).is_file() for name in self.files)


TABLE: dict[str, Format] = {
    "saelab": Format(own.FILES, own.load, own.save),
    "saelens": Format(
        saelens.FILES, saelens.load, saelens.save, also=(saelens.SCALER, saelens.WHITENING)
    ),
    "sparsify": Format(sparsify.FILES, sparsify.load, also=("../config.json", "../../config.json")),
    "gemma_scope": Format(gemma_scope.FILES, gemma_scope.load),
    "gemma_scope_2": Format(gemma_scope_2.FILES, gemma_scope_2.load, also=(gemma_scope_2.CONFIG,)),
    "llama_scope": Format(llama_scope.FILES, llama_scope.load),
    "llama_scope_r1": Format(llama_scope_r1.FILES, llama_scope_r1.load),
    "temporal": Format(temporal.FILES, temporal.load),
    "layer_transcoder": Format(
        (),
        layer_transcoder.load,
        pattern=layer_transcoder.PATTERN,
        also=(layer_transcoder.CONFIG,),
    ),
    "cross_layer_transcoder": Format(
        (),
        cross_layer_transcoder.load,
        pattern=cross_layer_transcoder.PATTERN,
        also=(cross_layer_transcoder.CONFIG, *cross_layer_transcoder.BOTH),
    ),
    "gemma_scope_2_clt": Format(
        (),
        cross_layer_transcoder.load_gemma,
        pattern=cross_layer_transcoder.GEMMA_PATTERN,
        also=(gemma_scope_2.CONFIG,),
    ),
    "dictionary_learning": Format(
        dictionary_learning.FILES, dictionary_learning.load, by_name=True
    ),
    "goodfire": Format((), goodfire.load, by_name=True, pattern=goodfire.PATTERN),
    "deepseek_r1": Format((), deepseek_r1.load, by_name=True, pattern=deepseek_r1.PATTERN),
    "qwen_scope": Format((), qwen_scope.load, by_name=True, pattern=qwen_scope.PATTERN),
    "hook_z": Format((), hook_z.load, by_name=True, pattern=hook_z.PATTERN, also=(r"\1_cfg.json",)),
    "openai": Format((), openai.load, by_name=True, pattern=openai.PATTERN),
}


def check_name(format_name: str) -> None:
    """Raises: SettingError for a name that is not '' and not that of a format."""
    if format_name and format_name not in TABLE:
        remedy = f"use one of {', '.join(TABLE)}{nearest(format_name, TABLE)}"
        raise SettingError("format", format_name, remedy)


def find(folder: Path, format_name: str = "") -> str:
    """Returns the format of a directory: the named one, or the one whose files the directory has.

    Raises: SettingError for an unknown name; SourceError when the directory holds no SAE.
    """
    check_name(format_name)
    if format_name:
        return format_name
    fitting = [name for name, format in TABLE.items() if format.fits(folder)]
    for name in fitting:
        if not TABLE[name].by_name:
            return name
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        if fitting:
            remedy = f"use {_options(fitting)} (only tensors are read)"
            raise SourceError(f"{folder} is a pickle, which must be named: {remedy}")
        raise SourceError(f"{folder} {problem}: name the directory of a saved SAE")
    if fitting:
        remedy = f"use {_options(fitting)} to read its pickle (only tensors are read)"
        raise SourceError(f"{folder} holds no sae.json and no SAE of another tool: {remedy}")
    raise SourceError(f"{folder} holds no sae.json and no SAE of another tool{_hint(folder)}")


def _options(names: list[str]) -> str:
    return " or ".join(f"--format {name}" for name in names)


def _hint(folder: Path) -> str:
    """Ends the message about a directory without an SAE: says what it holds, and the remedy."""
    inside = next(_folders_with_saes(folder), None)
    if inside is not None:
        return f": name one of the folders in it, such as {inside.relative_to(folder).as_posix()!r}"
    files = [f for format in TABLE.values() for f in format.files if (folder / f).is_file()]
    if files:
        formats = [f for f in TABLE.values() if files[0] in f.files]
        complete = [" and ".join(f.files) for f in formats]
        return f" ({files[0]} alone is not enough): it needs {', or '.join(complete)}"
    if (folder / "module.safetensors").is_file():
        return " but a user's own module, whose code is not here: choose other arms with --arm"
    if any(p.suffix in (".pt", ".pth", ".bin", ".pkl") for p in folder.iterdir()):
        return " (pickles are not read): save it as safetensors"
    return ": name the folder of a saved SAE"


def _folders_with_saes(folder: Path, depth: int = 4) -> Iterator[Path]:
    """Yields the folders inside, as deep as a run has them (cells/ARM/SEED), that hold an SAE."""
    children = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    for child in children:
        if any(format.fits(child) for format in TABLE.values()):
            yield child
    for child in children if depth > 1 else ():
        yield from _folders_with_saes(child, depth - 1)


def load(folder: str | Path | Reference, format_name: str = "") -> Loaded:
    """Loads the SAE in a directory, or one on the hub, in evaluation mode.

    Raises: as `find`, and as the `load` of its format; for one on the hub as `fetch.fetch`.
    """
    if isinstance(folder, Reference):
        return _load_from_hub(folder, format_name)
    if is_reference(folder):
        return _load_from_hub(parse(folder), format_name)
    folder = Path(folder)
    with errors_as_source_error(folder):
        return _loaded(find(folder, format_name), folder)


def _loaded(name: str, path: Path) -> Loaded:
    loaded = replace(TABLE[name].load(path), format=name)
    if TABLE[name].save is None and name != "saelab":  # `about` is not SAELens metadata
        return replace(loaded, about={**loaded.about, "format": name})
    return loaded


def _load_from_hub(reference: Reference, format_name: str) -> Loaded:
    """Loads an SAE on the hub; its files go to the hub's cache.

    What its release states about it completes what the files say, and contradictions are among the
    peculiarities of its origin.
    """
    check_name(format_name)
    fetched = fetch.fetch(reference, TABLE, format_name)
    with errors_as_source_error(Path(str(fetched.reference))):
        loaded = _loaded(fetched.format, fetched.place)
    about = {**loaded.about, "hub": str(fetched.reference)}
    return replace(loaded, about=about, origin=fetch.stated_origin(loaded.origin, fetched))


def pinned(path: Path, format_name: str = "") -> Path:
    """Returns a path as it is; a name on the hub with its commit and the exact place of the SAE,
    which is downloaded, so that each time the same is read.

    Raises: as `fetch.fetch`.
    """
    if not is_reference(path):
        return path
    check_name(format_name)
    return Path(str(fetch.fetch(parse(path), TABLE, format_name).reference))


def saver(format_name: str) -> Save:
    """Returns the function that writes the named format.

    Raises: SettingError for a format that is not written.
    """
    written = {name: format.save for name, format in TABLE.items() if format.save is not None}
    if format_name not in written:
        remedy = f"is not written: use one of {', '.join(written)}{nearest(format_name, written)}"
        raise SettingError("format", format_name, remedy)
    return written[format_name]
