"""Well-known releases of SAEs by name: the table saelab/assets/releases.toml.

A name in it stands for several releases where it has choices, {size:2b|9b}. An SAE is named by its
id in the release, or by its path in the release's repository.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saelab.assets import EMBEDDED_MODEL
from saelab.config import read_toml
from saelab.errors import SettingError, nearest

TABLE = EMBEDDED_MODEL.parent / "releases.toml"
#: End of SAELens' names of releases whose SAEs are those called 'canonical'.
CANONICAL = "-canonical"
_CHOICE = re.compile(r"\{(\w+):([^}]+)\}")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A kind of SAE in a release, as patterns with fields in braces.

    Args:
        id: its name in the release.
        path: its folder or file in the repository; a * stands for the L0 nearest to `l0`.
        hook: hook point.
        l0: None where the path has no *.
    """

    id: str
    path: str
    hook: str
    l0: int | None = None


@dataclass(frozen=True, kw_only=True)
class Release:
    """SAEs that were published together.

    Args:
        name: of the release.
        repo: 'owner/name' on the hub.
        format: name in the table of formats.
        model: name of the language model on the hub.
        saes: the kinds of SAEs in it.
    """

    name: str
    repo: str
    format: str
    model: str
    saes: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The place of an SAE, and what its release states about it.

    Args:
        release: its name.
        repo, path: on the hub.
        format, model, hook: as in `Release` and `Entry`.
        l0: see `Entry`.
    """

    release: str
    repo: str
    path: str
    format: str
    model: str
    hook: str
    l0: int | None = None


@functools.cache
def releases() -> dict[str, Release]:
    """Returns every release of the table, by name."""
    each = [release for row in read_toml(TABLE)["releases"] for release in _expanded(row)]
    return {release.name: release for release in each}


@functools.cache
def _models() -> Mapping[str, str]:
    return read_toml(TABLE)["models"]


def model_on_hub(name: str) -> str:
    """Returns the hub's name of a model that files or other tools name otherwise."""
    return _models().get(name, name)


def sae_of(release: str, sae: str) -> Stated:
    """Returns the SAE of a release, by its id or its path.

    Raises: SettingError for a name that the table does not have.
    """
    table = releases()
    short = release.removesuffix(CANONICAL)
    if release not in table and short not in table:
        remedy = f"no such release{nearest(release, table)}: name one of saelab/assets/"
        raise SettingError("release", release, f"{remedy}{TABLE.name}, or owner/name on the hub")
    one = table.get(release) or table[short]
    for entry in one.saes:
        for pattern in (entry.id, entry.path):
            values = _match(pattern, sae)
            if values is not None and "*" not in sae:
                return _stated(one, entry, values)
    forms = " or ".join(entry.id for entry in one.saes)
    raise SettingError("sae_id", sae, f"the SAEs of {one.name} are named {forms}")


def at(repo: str, path: str) -> Stated | None:
    """Returns what a release states about the SAE at a path of a repository; None for others."""
    for release in releases().values():
        if release.repo == repo:
            for entry in release.saes:
                values = _match(entry.path, path)
                if values is not None and "*" not in entry.path:
                    return _stated(release, entry, values)
    return None


def _stated(release: Release, entry: Entry, values: Mapping[str, str]) -> Stated:
    return Stated(
        release=release.name,
        repo=release.repo,
        path=_filled(entry.path, values),
        format=release.format,
        model=release.model,
        hook=_filled(entry.hook, values),
        l0=entry.l0,
    )


def _match(pattern: str, text: str) -> dict[str, str] | None:
    """Returns the fields of a text that a pattern describes; None for another text."""
    expression = ""
    for i, piece in enumerate(_FIELD.split(pattern)):
        if i % 2 == 0:
            expression += re.escape(piece)
        elif f"(?P<{piece}>" in expression:
            expression += f"(?P={piece})"
        else:
            expression += rf"(?P<{piece}>\d+)" if piece == "layer" else rf"(?P<{piece}>[^/]+)"
    match = re.fullmatch(expression, text)
    return match.groupdict() if match else None


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    """Returns a pattern with its fields replaced; a field without a value stays."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), pattern)


def _expanded(row: Mapping[str, Any]) -> list[Release]:
    """Returns a release for each combination of the choices in a row's name."""
    choices = [(name, values.split("|")) for name, values in _CHOICE.findall(row["name"])]
    pattern = _CHOICE.sub(r"{\1}", row["name"])
    expanded = []
    for combination in itertools.product(*(values for _, values in choices)):
        values = dict(zip((name for name, _ in choices), combination, strict=True))
        entries = [
            Entry(
                id=_filled(entry["id"], values),
                path=_filled(entry.get("path", entry["id"]), values),
                hook=_filled(entry["hook"], values),
                l0=entry.get("l0"),
            )
            for entry in row["saes"]
        ]
        release = Release(
            name=_filled(pattern, values),
            repo=_filled(row["repo"], values),
            format=row["format"],
            model=model_on_hub(_filled(row["model"], values)),
            saes=tuple(entries),
        )
        expanded.append(release)
    return expanded
