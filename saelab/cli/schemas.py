"""The command that describes what commands print with --json: schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from typer import Argument

from saelab.cli.common import Json


def schema(
    command: Annotated[
        list[str] | None, Argument(help="A command, 'verdict' or 'plan check'; all by default.")
    ] = None,
    json_: Json = False,
) -> None:
    """Print the JSON Schema of what commands print with --json; it is JSON in any case.

    saelab schema verdict

    A command that is refused prints one object {"error": ...} on stdout and its sentence on stderr.
    """
    from saelab.cli.outputs import OUTPUTS, error_schema, schema_of
    from saelab.errors import SettingError, nearest

    if command is None:
        made = {"commands": {name: schema_of(name) for name in OUTPUTS}, "error": error_schema()}
        typer.echo(json.dumps(made, indent=1))
        return
    name = " ".join(command)
    if name not in OUTPUTS:
        hint = f"{nearest(name, OUTPUTS)}; use one of {', '.join(OUTPUTS)}"
        raise SettingError("COMMAND", name, f"is not a command{hint}")
    typer.echo(json.dumps(schema_of(name), indent=1))
