"""Settings as frozen data; an unknown name is refused with a hint at the nearest existing one.

`Frozen` is the base of every configuration class. A configuration belongs to the module that
builds from it; derived values are properties; `patched` changes the named fields and nothing else.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from saelab.errors import SettingError, SourceError, nearest
from saelab.storage.atomic import digest
from saelab.storage.small_files import check_depth, is_unicode, read_small_text

#: Type of pydantic's errors that hold a SettingError.
AT_PLACE = "setting_at_place"
#: Remedy for a text with the one character that no name of a file or a module can contain.
NUL_REMEDY = "a text can't hold the character NUL: leave it out"
#: Remedy for a text with half a surrogate pair, which no file in UTF-8 can hold.
SURROGATE_REMEDY = "a text can't hold half a character (a surrogate): write the whole one"
#: Whole numbers of settings are below this, so that each is a float and a tensor's size.
MOST = 2**53
#: Other numbers are below this, so that each is finite in float32, which SAEs compute with.
MOST_FLOAT = 3e38
#: Columns of the lines of `repr`. Our choice: it fits most terminals.
LINE = 88


@dataclass(frozen=True)
class Macro:
    """A name that stands for several settings: they hold what it stands for, and never the name.

    Args:
        apply: settings, value of the name -> settings with what it stands for.
        refusal: value of the name; path of another changed setting from the same settings on;
            True where that is changed after it; True where that is appended to a list ->
            the remedy, or None where both can be changed together.
    """

    apply: Callable[[Any, Any], Any]
    refusal: Callable[[Any, Sequence[str], bool, bool], str | None]


class Frozen(BaseModel):
    """Base of all settings: immutable, without extra fields; defaults are validated too."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )
    #: Fields that JSON leaves out while they have their default: those that came after studies had
    #: been registered, whose digests and cell keys hold for it.
    added_later: ClassVar[frozenset[str]] = frozenset()
    #: Fields that `repr` shows even where they have their default.
    always_shown: ClassVar[frozenset[str]] = frozenset()
    #: Names that `patched` takes besides the fields.
    macros: ClassVar[Mapping[str, Macro]] = {}

    @model_serializer(mode="wrap")
    def _without_later_defaults(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        data = handler(self)
        if info.mode == "json":
            for name in self.added_later:
                if getattr(self, name) == type(self).model_fields[name].default:
                    data.pop(name, None)
        return data

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yields the fields that are not at their defaults, and those of `always_shown`."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            default = field.get_default(call_default_factory=True, validated_data={})
            if name in self.always_shown or value != default:
                yield name, value

    def __repr__(self) -> str:
        return _laid_out(self)

    def __str__(self) -> str:
        return _laid_out(self)

    @classmethod
    def parse(cls, data: dict[str, Any], where: str = "") -> Self:
        """Builds the settings from plain data.

        Args:
            data: names and values, as read from TOML or JSON.
            where: prefix of the names in error messages, such as the name of a file.

        Raises: SettingError naming the setting, its value and the remedy.
        """
        leaves = list(_leaves(data))
        for path, value in leaves:
            if isinstance(value, str) and (remedy := _text_remedy(value)):
                raise SettingError(_name(where, path), value, remedy)
            most = MOST if isinstance(value, int) else MOST_FLOAT
            if isinstance(value, (int, float)) and most <= abs(value) != math.inf:
                raise SettingError(_name(where, path), value, f"use a number below {most:g}")
        try:
            settings = cls.model_validate(data)
        except ValidationError as error:
            raise _setting_error(cls, error, where) from None
        for path, value in leaves:  # True and False would pass for 1 and 0
            if isinstance(value, bool) and type(_at(settings, path)) in (int, float):
                raise SettingError(_name(where, path), value, "should be a number, not a boolean")
        return settings

    def patched(self, changes: dict[str, Any]) -> Self:
        """Returns a copy in which the settings with these dotted names are replaced.

        Args:
            changes: dotted name -> new value, as in {"sae.d_sae": 512}. None removes an optional
                part; a dict replaces the part as a whole; a name that ends in "+" appends to a
                list: {"sae.losses+": {"kind": "auxk"}}. A name of `macros` stands for several.

        Raises: SettingError for a name that does not exist or a value that is refused.
        """
        data = self.model_dump()
        macros = self._macros_in(changes)
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
            if name in macros:
                cls = type(_at(self, tuple(parents)))
                node.update(_apply(cls, node, macros[name], name, value).model_dump())
                continue
            old = _child(node, last, name, value, self._macros_at(parents))
            if append and not isinstance(old, (list, tuple)):
                raise SettingError(name, value, "is not a list to append to: leave out the '+'")
            new = [*old, value] if append else value
            node[int(last) if isinstance(node, list) else last] = new
        return type(self).parse(data)

    def _macros_in(self, changes: Mapping[str, Any]) -> dict[str, Macro]:
        """Returns the names among the changes that are macros.

        Raises: SettingError for another change that can't stand next to one of them.
        """
        macros = {}
        for name in changes:
            *parents, last = name.split(".")
            if last in (of_settings := self._macros_at(parents)):
                macros[name] = of_settings[last]
        order = list(changes)
        for name, macro in macros.items():
            parents = name.split(".")[:-1]
            for other in order:
                path = other.removesuffix("+").split(".")
                below = path[len(parents) :]
                if other == name or path[: len(parents)] != parents or not below:
                    continue
                after = order.index(other) > order.index(name)
                remedy = macro.refusal(changes[name], below, after, other.endswith("+"))
                if remedy:
                    raise SettingError(other, changes[other], remedy)
        return macros

    def _macros_at(self, path: Sequence[str]) -> Mapping[str, Macro]:
        return getattr(type(_at(self, tuple(path))), "macros", {})

    def digest(self) -> str:
        """Returns a 16-character content hash of all settings."""
        return digest(self.model_dump(mode="json"))


def _laid_out(value: Any, indent: int = 0) -> str:
    """Returns settings as text: on one line where they fit, else with a line for each field; of
    settings under names of their own the names alone."""
    if isinstance(value, Frozen):
        named = list(value.__repr_args__())
        before, after = f"{type(value).__name__}(", ")"
    elif isinstance(value, tuple) and any(isinstance(item, Frozen) for item in value):
        named, before, after = [("", item) for item in value], "(", ",)" if len(value) == 1 else ")"
    elif isinstance(value, Mapping) and any(isinstance(item, Frozen) for item in value.values()):
        texts, before, after = [f"{name!r}: ..." for name in value], "{", "}"
        return _on_lines(texts, before, after, indent)
    else:
        return repr(value)
    texts = [f"{name}={text}" if name else text for name, text in _texts(named, indent + 4)]
    return _on_lines(texts, before, after, indent)


def _on_lines(texts: Sequence[str], before: str, after: str, indent: int) -> str:
    line = before + ", ".join(texts) + after
    if "\n" not in line and len(line) + indent <= LINE:
        return line
    space = " " * (indent + 4)
    return f"{before}\n{space}" + f",\n{space}".join(texts) + f",\n{' ' * indent}{after[-1]}"


def _texts(named: Iterable[tuple[str, Any]], indent: int) -> Iterator[tuple[str, str]]:
    return ((name, _laid_out(value, indent)) for name, value in named)


def _apply(cls: type[Frozen], data: Any, macro: Macro, name: str, value: Any) -> Frozen:
    """Returns the settings at a place, as they are in `data` by now, after a macro."""
    try:
        return macro.apply(cls.parse(data), value)
    except SettingError as error:
        parent = name.rpartition(".")[0]
        raise SettingError(_name(parent, (error.setting,)), error.value, error.remedy) from None


def _child(node: Any, key: str, name: str, value: Any, also: Iterable[str] = ()) -> Any:
    if isinstance(node, list):
        if key.isdigit() and int(key) < len(node):
            return node[int(key)]
        raise SettingError(name, value, f"this list has {len(node)} entries, counted from 0")
    if key not in node:
        raise SettingError(name, value, f"no such setting{nearest(key, [*node, *also])}")
    return node[key]


def _text_remedy(text: str) -> str:
    """Returns what to do about a text that can't be stored, '' for any other."""
    if "\0" in text:
        return NUL_REMEDY
    return "" if is_unicode(text) else SURROGATE_REMEDY


def _leaves(data: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yields each name, and each value that is not a container, with its path in plain data."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while stack:  # not by recursion: data may be nested as deeply as a file's reader allows
        path, value = stack.pop()
        if isinstance(value, Mapping):
            yield from ((path, name) for name in value)
            stack += [((*path, name), item) for name, item in value.items()]
        elif isinstance(value, (list, tuple)):
            stack += [((*path, i), item) for i, item in enumerate(value)]
        else:
            yield path, value


def _at(settings: Any, path: tuple[str | int, ...]) -> Any:
    """Returns the value of the settings at a path of the data that they were built from."""
    node = settings
    for key in path:
        if isinstance(node, BaseModel):
            node = getattr(node, str(key), None)
        elif isinstance(node, Mapping):
            node = node.get(key)
        else:
            node = node[key] if isinstance(node, tuple) and isinstance(key, int) else None
    return node


def _name(where: str, path: tuple[str | int, ...]) -> str:
    return ".".join([*([where] if where else []), *map(str, path)])


def read_toml(path: Path) -> dict[str, Any]:
    """Parses a TOML file.

    Raises: SourceError when the file is missing, can't be read or is not valid TOML.
    """
    try:
        data = tomllib.loads(read_small_text(path))
        check_depth(data)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: name an existing TOML file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(f"{path} can't be read ({reason}): name a TOML file") from None
    except RecursionError:
        raise SourceError(f"{path} is nested too deeply: fix the file") from None
    except ValueError as error:  # not TOML, not UTF-8, too large, or a number of too many digits
        raise SourceError(f"{path} is not valid TOML ({error}): fix the file") from None
    return data


def setting_error_at_place(error: SettingError) -> PydanticCustomError:
    """Turns the error of a part of the settings into one to which pydantic adds the place."""
    ctx = {"setting": error.setting, "value": error.value, "remedy": error.remedy}
    return PydanticCustomError(AT_PLACE, "{remedy}", ctx)


def _setting_error(cls: type[BaseModel], error: ValidationError, where: str) -> SettingError:
    """Returns the first of pydantic's findings as setting, value and remedy."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    name = _name(where, first["loc"])
    if first["type"] == "extra_forbidden":
        remedy = f"no such setting{nearest(location[-1], _fields(cls, location[:-1]))}"
    elif first["type"] == "union_tag_invalid":
        tags = first.get("ctx", {}).get("expected_tags", "")
        tag = str(first.get("ctx", {}).get("tag", ""))
        names = [kind.strip(" '") for kind in tags.split(",")]
        remedy = f"unknown kind {tag!r}{nearest(tag, names)}; known: {', '.join(names)}"
    elif first["type"] == AT_PLACE:
        inner = first.get("ctx", {})
        place = (*first["loc"], *([inner["setting"]] if inner["setting"] else []))
        return SettingError(_name(where, place), inner["value"], inner["remedy"])
    else:
        remedy = first["msg"][0].lower() + first["msg"][1:]
    return SettingError(name, first.get("input"), remedy)


def _fields(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Returns the names of the fields at `path` below `cls`, over all members of unions."""
    names: list[str] = []

    def visit(kind: Any, rest: list[str]) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not rest:
                names.extend([*kind.model_fields, *getattr(kind, "macros", ())])
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
