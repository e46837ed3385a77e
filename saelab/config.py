"""Settings as frozen data: unknown names are refused with the nearest known one.

`Frozen` is the base of every configuration class. A configuration is owned by the module that
builds from it; derived values are properties; `patched` changes the named fields and nothing else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from saelab.errors import SettingError, SourceError, nearest
from saelab.storage.atomic import digest

#: Said of a text with a character that no file and no module has in its name.
NUL = "a text can't hold the character NUL: leave it out"


class Frozen(BaseModel):
    """Base of all settings: immutable, no extra fields, defaults checked too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def parse(cls, data: dict[str, Any], where: str = "") -> Self:
        """Builds from plain data.

        Raises: SettingError naming the setting, its value and the remedy.
        """
        leaves = list(_leaves(data))
        for path, value in leaves:
            if isinstance(value, str) and "\0" in value:
                raise SettingError(_name(where, path), value, NUL)
        try:
            made = cls.model_validate(data)
        except ValidationError as error:
            raise _setting_error(cls, error, where) from None
        for path, value in leaves:  # True and False would pass for 1 and 0
            if isinstance(value, bool) and type(_at(made, path)) in (int, float):
                raise SettingError(_name(where, path), value, "should be a number, not a boolean")
        return made

    def patched(self, changes: dict[str, Any]) -> Self:
        """The same settings with dotted names replaced: {"sae.d_sae": 512}.

        A value of None removes an optional part; a dict replaces the part as a whole; a name that
        ends in "+" appends to a list: {"sae.losses+": {"kind": "auxk"}}.
        """
        data = self.model_dump()
        for name, value in changes.items():
            append = name.endswith("+")
            *parents, last = name.removesuffix("+").split(".")
            node: Any = data
            for depth, key in enumerate(parents):
                child = _child(node, key, name, value)
                if not isinstance(child, (dict, list, tuple)):
                    where = ".".join(parents[: depth + 1])
                    raise SettingError(name, value, f"{where} is {child!r} here and has no fields")
                if isinstance(child, tuple):
                    child = list(child)
                    node[int(key) if isinstance(node, list) else key] = child
                node = child
            old = _child(node, last, name, value)
            if append and not isinstance(old, (list, tuple)):
                raise SettingError(name, value, "is no list to append to: leave out the '+'")
            new = [*old, value] if append else value
            node[int(last) if isinstance(node, list) else last] = new
        return type(self).parse(data)

    def digest(self) -> str:
        """A 16-character content hash of all settings."""
        return digest(self.model_dump(mode="json"))


def _child(node: Any, key: str, name: str, value: Any) -> Any:
    if isinstance(node, list):
        if key.isdigit() and int(key) < len(node):
            return node[int(key)]
        raise SettingError(name, value, f"this list has {len(node)} entries, counted from 0")
    if key not in node:
        raise SettingError(name, value, f"no such setting{nearest(key, node)}")
    return node[key]


def _leaves(data: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every name and every value in plain data that is no container, and where it lies."""
    left: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while left:  # not by recursion: data may be nested as deeply as a file's reader allows
        path, value = left.pop()
        if isinstance(value, Mapping):
            yield from ((path, name) for name in value)
            left += [((*path, name), each) for name, each in value.items()]
        elif isinstance(value, (list, tuple)):
            left += [((*path, i), each) for i, each in enumerate(value)]
        else:
            yield path, value


def _at(made: Any, path: tuple[str | int, ...]) -> Any:
    """What settings hold at a place of the data that they were made from."""
    for key in path:
        if isinstance(made, BaseModel):
            made = getattr(made, str(key), None)
        elif isinstance(made, Mapping):
            made = made.get(key)
        else:
            made = made[key] if isinstance(made, tuple) and isinstance(key, int) else None
    return made


def _name(where: str, path: tuple[str | int, ...]) -> str:
    return ".".join([*([where] if where else []), *map(str, path)])


def read_toml(path: Path) -> dict[str, Any]:
    """Raises: SourceError when the file is missing or is no TOML."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: name an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is no valid TOML ({error}): mend the file") from None


def _setting_error(cls: type[BaseModel], error: ValidationError, where: str) -> SettingError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    name = _name(where, first["loc"])
    if first["type"] == "extra_forbidden":
        remedy = f"no such setting{nearest(location[-1], _fields(cls, location[:-1]))}"
    elif first["type"] == "union_tag_invalid":
        tags = first.get("ctx", {}).get("expected_tags", "")
        given = str(first.get("ctx", {}).get("tag", ""))
        names = [tag.strip(" '") for tag in tags.split(",")]
        remedy = f"unknown kind {given!r}{nearest(given, names)}; known: {', '.join(names)}"
    else:
        remedy = first["msg"][0].lower() + first["msg"][1:]
    return SettingError(name, first.get("input"), remedy)


def _fields(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields at `path` below `cls`, over all members of unions."""
    names: list[str] = []

    def visit(kind: Any, rest: list[str]) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not rest:
                names.extend(kind.model_fields)
            elif rest[0] in kind.model_fields:
                visit(kind.model_fields[rest[0]].annotation, rest[1:])
            elif "kind" in kind.model_fields and rest[0] in get_args(
                kind.model_fields["kind"].annotation  # the tag of a union is in the path
            ):
                visit(kind, rest[1:])
        else:
            for argument in get_args(kind):
                visit(argument, rest[1:] if rest and rest[0].isdigit() else rest)

    visit(cls, path)
    return names
