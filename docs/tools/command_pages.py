"""Pages of docs/reference about the command line: commands.md and json.md, from the code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from saelab.cli import COMMANDS, app, lm_group, plan_group
from saelab.cli.outputs import error_schema, schema_of

NOTE = "<!-- Written by `python docs/tools/reference.py` from the code: do not edit. -->\n"
ABOUT_COMMANDS = f"""\
{NOTE}
# Commands

Every command with its arguments, options and defaults; the option `-h` of each prints the same.
Their output with `--json` is in [json.md](json.md).

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the study has no usable result, or a file is damaged |
| 2 | bad input: one sentence on stderr names the setting, its value and the remedy |
| 130, 143 | ended by SIGINT or SIGTERM; the same command goes on where it stopped |
"""
ABOUT_JSON = f"""\
{NOTE}
# Output for programs

Every command has `--json`. Stdout then holds one JSON value and nothing else; progress, tables and
warnings go to stderr. A number that is missing or not finite is `null`. Paths are as they were
given.
`saelab schema` prints the JSON Schemas (draft 2020-12) that this page is made of, and
`saelab schema verdict` that of one command. Fields may be added in later versions; a field that
changes its meaning is named in CHANGELOG.md.

`verdict` gives a list with one item for each run, also for one; so does `run` where a plan has
several settings. `check-part` prints its list also where a check fails, with exit code 2. The words
of a run, and whether they may be cited:

<!-- not run: needs a complete run; tests/e2e/test_json_outputs.py runs it -->

```python
import json, subprocess

done = subprocess.run(["saelab", "verdict", "run_1", "--json"], capture_output=True, text=True)
for run in json.loads(done.stdout):
    for one in run["comparisons"]:
        print(run["run"], one["arm"], one["word"], one["mean_diff"], one["low"], one["high"])
    if run["quick"]:
        print("a quick form: no part of the study")
```

A command that is refused or fails has the exit code 2 or 1 and prints one object:

"""
GROUPS = {id(app): "", id(plan_group): "plan ", id(lm_group): "lm "}
#: JSON's name of a type -> the page's.
TYPES = {"string": "text", "integer": "whole number", "boolean": "true or false", "null": "null"}


def command_names() -> list[str]:
    """Returns every command in the order of `saelab --help`."""
    return [GROUPS[id(group)] + name for group, name, _ in COMMANDS]


def commands_page() -> str:
    parts = [ABOUT_COMMANDS, *("\n".join(_command(name)) for name in command_names())]
    return "\n".join(parts)


def _command(name: str) -> Iterator[str]:
    command: Any = get_command(app)
    for word in name.split():
        command = command.commands[word]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    yield f"## saelab {name}\n"
    for paragraph in (command.help or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith(("saelab ", "torchrun ", "val_fvu", "decision:")):
            yield f"<!-- not run: an example of the help text -->\n\n    {text}\n"
        else:
            yield f"{_plain(text)}\n"
    if arguments:
        yield "| argument | default | meaning |\n|---|---|---|"
        for one in arguments:
            shown = (one.metavar or one.name.upper()) + (" ..." if one.nargs == -1 else "")
            default = "required" if one.required else _default(one)
            yield f"| {shown} | {default} | {_plain(one.help or '')} |"
        yield ""
    yield "| option | value | default | meaning |\n|---|---|---|---|"
    for one in options:
        names = ", ".join(f"`{opt}`" for opt in [*one.opts, *one.secondary_opts])
        value = "" if one.is_flag else _value(one)
        default = "required" if one.required else _default(one)
        yield f"| {names} | {value} | {default} | {_plain(one.help or '')} |"
    yield ""


def _value(option: Any) -> str:
    annotation = option.type_descriptor.annotation
    (inside,) = get_args(annotation) or (annotation,)
    words = {str: "text", int: "whole number", float: "number", Path: "path"}
    return words[inside] + (", may be repeated" if option.multiple else "")


def _default(option: Any) -> str:
    value = option.default
    if value is None or value in ("", (), []) or callable(value):
        return ""
    if value is False:
        return "off"
    return "on" if value is True else f"`{value}`"


def json_page() -> str:
    lines = [ABOUT_JSON + "\n".join(_tables(error_schema()))]
    for name in command_names():
        lines.append(f"\n## saelab {name} --json\n")
        lines += _tables(schema_of(name))
    return "\n".join(lines).rstrip("\n") + "\n"


def _tables(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yields the shape of the value, then a table for each object in it."""
    if "properties" not in schema:
        yield f"{_plain(_type(schema)).capitalize()}.\n"
    objects = [(schema.get("title", ""), schema)] if "properties" in schema else []
    objects += list(schema.get("$defs", {}).items())
    for title, one in objects:
        yield f"**{title}**: {_plain(one.get('description', ''))}\n"
        yield "| field | type | meaning |\n|---|---|---|"
        for name, field in one.get("properties", {}).items():
            yield f"| `{name}` | {_plain(_type(field))} | {_plain(field.get('description', ''))} |"
        yield ""


def _type(field: Mapping[str, Any]) -> str:
    """Returns the type of a value in words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"]))
    kind = field.get("type")
    if kind == "array":
        inside = field.get("items", {})
        pairs = [_type(one) for one in field.get("prefixItems", ())]
        return f"list of [{', '.join(pairs)}]" if pairs else f"list of {_type(inside) or 'values'}"
    if kind == "object":
        inside = field.get("additionalProperties")
        of = _type(inside) if isinstance(inside, Mapping) else ""
        return f"object of {of}" if of else "object"
    if "enum" in field or "const" in field:
        words = field.get("enum", [field.get("const")])
        return ", ".join(repr(word) for word in words)
    return TYPES.get(str(kind), "" if kind is None else str(kind))


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, in a cell of a table too."""
    for sign in ("\\", "|", "*", "<", ">", "[", "]", "_"):
        text = text.replace(sign, f"\\{sign}")
    return text


PAGES = {"commands.md": commands_page, "json.md": json_page}
