"""The command that lists settings, and those of a config with what it leaves at the defaults."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli.common import MOST_COLUMNS, Json, OwnParts, Set, parse_changes, register_parts, show


def settings(
    names: Annotated[
        list[str] | None,
        Argument(help="Beginnings of names, 'train' or 'sae.d_sae', or parts; all by default."),
    ] = None,
    shown: Annotated[
        Path | None,
        Option("--show", help="A config: prints all its settings, as a config that is complete."),
    ] = None,
    set_: Set = None,
    experiment: OwnParts = None,
    json_: Json = False,
) -> None:
    """List every setting with type, range, default and meaning; with --show those of a config.

    saelab settings train sae.d_sae l0_target

    saelab settings --show configs/embedded.toml
    """
    from saelab.errors import SettingError
    from saelab.preflight.list_of_settings import find_settings, lines_of_settings, resolved_lines

    register_parts(experiment)
    if shown is None:
        if set_:
            raise SettingError("--set", set_, "changes a config: name one with --show")
        rows = find_settings(names or ())
        columns = min(shutil.get_terminal_size((100, 24)).columns, MOST_COLUMNS)
        show(json_, [asdict(row) for row in rows], lines_of_settings(rows, columns))
        return
    if names:
        raise SettingError("NAMES", names, "--show prints all settings: leave them out")
    from saelab.api import settings as read

    base = read(shown, parse_changes(set_))
    show(json_, base.model_dump(mode="json"), resolved_lines(base))
