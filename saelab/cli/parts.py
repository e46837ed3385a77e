"""Commands about the parts of an SAE: which there are, and whether one keeps the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from saelab.cli.common import EXPERIMENT, Json, read_runs, show


def check_part(
    file: Annotated[
        Path, Argument(help="The experiment.py that defines parts with saelab.register.")
    ] = EXPERIMENT,
    json_: Json = False,
) -> None:
    """Run the checks of all parts on those that an experiment.py defines."""
    from saelab.checks.battery import check_new_parts

    findings = check_new_parts(file, lambda: read_runs(file))
    show(json_, [finding.as_dict() for finding in findings], (f.line() for f in findings))
