"""Every setting with its type, default, range and meaning, read from the code; a config resolved.

A meaning is the line of the setting in the docstring of its class: under `Args:`, or where that has
no such block as in 'k: active latents per row; momentum: of the mean'.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from saelab.config import Frozen
from saelab.errors import SettingError, nearest
from saelab.parts import TABLE
from saelab.parts.base import PartConfig
from saelab.study.plan import BaseConfig, PlanConfig

#: Where base settings and those of a plan stand.
BASE, PLAN = "base settings (configs/*.toml)", "plan.toml"
#: Columns from which settings are shown as a table. Our choice: its columns hold whole phrases.
WIDE = 110
#: Bounds of annotations -> how they are shown.
BOUNDS = {"gt": "> ", "ge": ">= ", "lt": "< ", "le": "<= "}
#: An entry of a docstring: 'name, other: meaning'.
ENTRY = re.compile(r"^ *([a-zA-Z_][\w]*(?:, [\w]+)*): (.*)$")

#: Meanings of settings that the docstrings of some parts leave out.
GENERAL = {"coefficient": "factor of the loss term."}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Args:
        where: the file that it stands in, or the part that it is of, 'loss l1'.
        name: dotted; '[]' after a name stands for each entry of a list, 'NAME' for a free name.
        type: as it is written in TOML.
        default: as it is written in TOML; 'required' where there is none, 'not set' for None.
        range: bounds and words that it may have; '' for any.
        meaning: one sentence.
    """

    where: str
    name: str
    type: str
    default: str
    range: str
    meaning: str


def all_settings() -> list[Setting]:
    """Returns the settings of a base, of a plan, and of every registered part."""
    rows = [*_settings_of(BaseConfig, BASE), *_settings_of(PlanConfig, PLAN)]
    for seam, kinds in TABLE.items():
        for kind, config in kinds.items():
            of_part = _settings_of(config, f"{seam} {kind}")
            rows += [row for row in of_part if row.name != "kind"]
    return rows


def find_settings(names: Sequence[str]) -> list[Setting]:
    """Returns the settings whose name begins with one of the names, or that are of such a part; all
    of them where none is named.

    Raises: SettingError for a name that fits none.
    """
    rows = all_settings()
    for name in names:
        if not any(_fits(row, name) for row in rows):
            known = [word for row in rows for word in (row.name, row.where.split()[-1])]
            remedy = f"no such setting{nearest(name, known)}: `saelab settings` lists all"
            raise SettingError("NAME", name, remedy)
    return [row for row in rows if not names or any(_fits(row, name) for name in names)]


def _fits(row: Setting, name: str) -> bool:
    of_part = row.where not in (BASE, PLAN) and name in row.where.split()
    return (
        of_part
        or name == row.where
        or row.name == name
        or row.name.startswith((f"{name}.", f"{name}["))
    )


def lines_of_settings(rows: Sequence[Setting], columns: int) -> Iterator[str]:
    """Yields settings under the places that they stand in; no text is cut.

    Args:
        columns: width of the terminal; from `WIDE` on a table, below it an entry of some lines.
    """
    for where, group in groupby(rows, key=lambda row: row.where):
        yield where
        yield from (_table if columns >= WIDE else _list)(list(group), columns)
        yield ""


def _kind(row: Setting) -> str:
    """Returns type and range in one text."""
    if row.type == "text" and row.range:
        return row.range
    return f"{row.type}, {row.range}" if row.range else row.type


def _list(rows: Sequence[Setting], columns: int) -> Iterator[str]:
    for row in rows:
        yield from _wrap(
            f"{row.name}: {_kind(row)}; default: {row.default}", columns, "  ", "      "
        )
        yield from _wrap(row.meaning, columns, "    ", "    ")


def _table(rows: Sequence[Setting], columns: int) -> Iterator[str]:
    first = max(len(row.name) for row in rows)
    kind, default = (columns - first) // 4, (columns - first) // 5
    widths = (first, kind, default, columns - first - kind - default - 2 * 3 - 2)
    for row in rows:
        texts = (row.name, _kind(row), row.default, row.meaning)
        cells = [list(_wrap(text, width)) for text, width in zip(texts, widths, strict=True)]
        for line in zip_longest(*cells, fillvalue=""):
            parts = (part.ljust(width) for part, width in zip(line, widths, strict=True))
            yield f"  {'  '.join(parts)}".rstrip()


def _wrap(text: str, columns: int, first: str = "", rest: str = "") -> Iterator[str]:
    yield from textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=rest) or [""]


# ---- types, ranges and meanings --------------------------------------------------------------


def _settings_of(config: type[Frozen], where: str, prefix: str = "") -> Iterator[Setting]:
    for name, field in config.model_fields.items():
        path = f"{prefix}{name}"
        inner = _inner(field.annotation)
        if inner is not None and not issubclass(inner, PartConfig):
            suffix = {tuple: "[].", dict: ".NAME."}.get(get_origin(field.annotation) or object, ".")
            yield from _settings_of(inner, where, path + suffix)
            continue
        bounds, words = _bounds(field.annotation, field.metadata), _words(field.annotation)
        yield Setting(
            where=where,
            name=path,
            type=_type_text(field.annotation),
            default=_default_text(field),
            range=" or ".join([*([", ".join(bounds)] if bounds else []), *words]),
            meaning=_meaning(config, name),
        )


def _inner(annotation: Any) -> type[Frozen] | None:
    """Returns the class of settings that an annotation holds, alone or in a list or table."""
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        return annotation
    arguments = get_args(annotation)
    return next((found for one in arguments if (found := _inner(one)) is not None), None)


def _bounds(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    """Returns the bounds of an annotation's numbers, each once."""
    arguments: tuple[Any, ...] = get_args(annotation)
    if get_origin(annotation) is Annotated:
        arguments, metadata = arguments[:1], [*metadata, *arguments[1:]]
    found = [
        f"{sign}{_number(getattr(one, name))}"
        for entry in metadata
        for one in getattr(entry, "metadata", [entry])  # of a FieldInfo
        for name, sign in BOUNDS.items()
        if isinstance(getattr(one, name, None), (int, float))
    ]
    if get_origin(annotation) is not Literal:
        found += [bound for one in arguments if one is not Ellipsis for bound in _bounds(one)]
    return list(dict.fromkeys(found))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _words(annotation: Any) -> list[str]:
    """Returns the values that an annotation allows by name."""
    if get_origin(annotation) is Literal:
        return [toml_value(word) for word in get_args(annotation)]
    inner = [word for one in get_args(annotation) if one is not Ellipsis for word in _words(one)]
    return list(dict.fromkeys(inner))


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return " or ".join(dict.fromkeys(_name_of(type(word)) for word in arguments))
    if origin in (Union, types.UnionType):
        texts = [_type_text(one) for one in arguments if one is not type(None)]
        return " or ".join(dict.fromkeys(texts))
    if origin is tuple:
        texts = [_type_text(one) for one in arguments if one is not Ellipsis]
        return f"list of {' and '.join(dict.fromkeys(texts))}"
    if origin is dict:
        return f"table of {_type_text(arguments[1])}"
    return _name_of(annotation)


def _name_of(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, PartConfig):
        return "part"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(kind, "any")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "not set" if value is None else toml_value(_as_data(value))


def _meaning(config: type[Frozen], name: str) -> str:
    """Returns the line of a setting in the docstring of its class or of one that it extends."""
    for cls in config.__mro__:
        if isinstance(cls, type) and issubclass(cls, Frozen) and name in cls.model_fields:
            text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
            meaning = entries_of(text).get(name, "see `")
            if not meaning.startswith("see `"):
                return meaning
            if match := re.search(rf"`{name}` is ([^.]*)", text):
                return " ".join(match[1].split())
    first = inspect.cleandoc(config.__doc__ or "").split("\n")[0]
    return GENERAL.get(name, first) if ENTRY.match(first) else first


def entries_of(text: str) -> dict[str, str]:
    """Returns name -> meaning of a docstring."""
    _, of_args, block = text.partition("Args:\n")
    joined: list[str] = []
    for line in block.split("\n\n")[0].split("\n") if of_args else _clauses(text):
        if line.startswith("     ") and joined:
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    entries = {}
    for line in joined:
        if match := ENTRY.match(line):
            entries |= {name: match[2] for name in match[1].split(", ")}
    return entries


def _clauses(text: str) -> list[str]:
    return [clause.strip() for clause in re.split(r"; |\. (?=[a-z])", " ".join(text.split()))]


# ---- a config, resolved ----------------------------------------------------------------------


def resolved_lines(settings: Frozen) -> Iterator[str]:
    """Yields every setting with its value as a line of TOML, which is a config again; a comment
    says what another default would be, or that a setting is not set."""
    yield from _lines(settings, "")


def _lines(settings: Frozen, prefix: str) -> Iterator[str]:
    for name, field in type(settings).model_fields.items():
        value, path = getattr(settings, name), f"{prefix}{name}"
        if isinstance(value, Frozen) and not isinstance(value, PartConfig):
            yield from _lines(value, f"{path}.")
        elif value is None:
            yield f"# {path} is not set"
        else:
            line, default = f"{path} = {toml_value(_as_data(value))}", _default_text(field)
            same = default == toml_value(_as_data(value))
            yield line if same else f"{line}  # default: {default}"


def _as_data(value: Any) -> Any:
    """Returns plain data without what is not set, which TOML has no word for."""
    if isinstance(value, Frozen):
        fields = type(value).model_fields
        return {
            name: _as_data(part) for name in fields if (part := getattr(value, name)) is not None
        }
    if isinstance(value, Mapping):
        return {name: _as_data(part) for name, part in value.items() if part is not None}
    return [_as_data(part) for part in value] if isinstance(value, (list, tuple)) else value


def toml_value(value: Any) -> str:
    """Returns plain data as a value of TOML on one line."""
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(name)} = {toml_value(item)}" for name, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
