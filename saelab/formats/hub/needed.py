"""The files of a repository that a format reads, chosen by their names before any is downloaded."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saelab.errors import SourceError, nearest
from saelab.formats.hub.reference import Reference

if TYPE_CHECKING:
    from saelab.formats import Format

#: Names that a message lists.
MOST_LISTED = 4


class NoSAEError(SourceError):
    """The files of a repository are not those of an SAE that was named."""


@dataclass(frozen=True)
class Needed:
    """The files of one SAE.

    Args:
        format: name in the table of formats.
        path: of the SAE in the repository: its folder, or its one file.
        names: files, those without which there is no SAE last.
    """

    format: str
    path: str
    names: tuple[str, ...]


def choose(
    reference: Reference, names: Collection[str], table: Mapping[str, Format], format_name: str
) -> Needed:
    """Chooses the files of an SAE.

    Args:
        reference: the SAE.
        names: all files of its repository.
        table: formats by name.
        format_name: the format; '' recognises it by the files.

    Raises: NoSAEError when there is no SAE of that format at the path; SourceError when there are
        several, or it is a pickle and its format is not named.
    """
    path = _with_nearest(reference, names)
    formats = {format_name: table[format_name]} if format_name else table
    fitting = {name: group for name, f in formats.items() if (group := _groups(f, path, names))}
    plain = [name for name in fitting if format_name or not table[name].by_name]
    if plain:
        groups = fitting[plain[0]]
        if len(groups) > 1:
            listed = _listed(group[-1] for group in groups)
            raise SourceError(f"{reference} holds several SAEs ({listed}): name one of them")
        place = groups[0][-1] if table[plain[0]].pattern else path
        return Needed(plain[0], place, groups[0])
    if fitting:
        options = " or ".join(f"--format {name}" for name in fitting)
        remedy = f"use {options} to read its pickle (only tensors are read)"
        raise SourceError(f"{reference} holds no SAE of an open format: {remedy}")
    return _below(reference, path, names, formats)


def _below(
    reference: Reference, path: str, names: Collection[str], formats: Mapping[str, Format]
) -> Needed:
    """Returns the files of the only SAE in the folders below a path.

    Raises: NoSAEError when there is none; SourceError when there are several.
    """
    start = f"{path}/" if path else ""
    below = sorted({posixpath.dirname(name) for name in names if name.startswith(start)})
    saes: dict[str, Needed] = {}
    for folder in below:
        for name, format in formats.items():
            if format.files and not format.by_name and (groups := _groups(format, folder, names)):
                saes.setdefault(folder, Needed(name, folder, groups[0]))
    if len(saes) == 1:
        return next(iter(saes.values()))
    if saes:
        raise SourceError(f"{reference} holds several SAEs ({_listed(saes)}): name one after a ':'")
    if path and path not in names and not any(name.startswith(start) for name in names):
        above = posixpath.dirname(path)
        siblings = {_child(name, above) for name in names if _is_in(name, above)}
        remedy = f"name a file or folder of it{nearest(path, siblings)}"
        raise NoSAEError(f"{reference} does not exist in its repository: {remedy}")
    kinds = f"of the format {next(iter(formats))}" if len(formats) == 1 else "that can be read"
    held = _listed(sorted({_child(name, path) for name in names if _is_in(name, path)}))
    raise NoSAEError(f"{reference} holds no SAE {kinds} ({held or 'it is empty'}): name another")


def _groups(format: Format, path: str, names: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the files of each SAE of a format at a path: none, one, or several in a folder."""
    if not format.pattern:
        files = tuple(_join(path, name) for name in format.files)
        if not all(name in names for name in files):
            return []
        return [(*_present(format.also, path, names), *files)]
    candidates = [path] if path in names else [n for n in names if posixpath.dirname(n) == path]
    groups: dict[frozenset[str], tuple[str, ...]] = {}
    for name in sorted(candidates):
        if match := re.fullmatch(format.pattern, posixpath.basename(name)):
            also = [match.expand(one) for one in format.also]
            more = _present(also, posixpath.dirname(name), names)
            group = (*(one for one in more if one != name), name)
            groups.setdefault(frozenset(group), group)
    return list(groups.values())


def _present(also: Iterable[str], folder: str, names: Collection[str]) -> list[str]:
    places = (_join(folder, name) for name in also)
    return [place for place in places if place in names]


def _join(folder: str, name: str) -> str:
    """Returns a name relative to a folder, which may go to folders above it."""
    return posixpath.normpath(posixpath.join(folder, name))


def _with_nearest(reference: Reference, names: Collection[str]) -> str:
    """Returns the path, with its * replaced by the number there is that is nearest to `l0`.

    Raises: NoSAEError when there is none.
    """
    path, l0 = reference.path, reference.l0
    if l0 is None:
        return path
    pattern = re.escape(path).replace(r"\*", r"(\d+)") + "/"
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if not numbers:
        raise NoSAEError(f"{reference} does not exist in its repository: name another SAE of it")
    return path.replace("*", str(min(numbers, key=lambda number: (abs(number - l0), number))))


def _is_in(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _child(name: str, folder: str) -> str:
    """Returns the path of the file or folder directly in a folder through which a name goes."""
    rest = name.removeprefix(f"{folder}/") if folder else name
    return _join(folder, rest.split("/")[0])


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:MOST_LISTED]) + ", ..." * (len(every) > MOST_LISTED)
