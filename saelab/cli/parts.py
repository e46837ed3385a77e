"""Commands about the parts of an SAE: which there are, and whether one keeps the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit

from saelab.cli.common import EXPERIMENT, Json, OwnParts, read_runs, register_parts, say, show


def check_part(
    file: Annotated[
        Path, Argument(help="The experiment.py that defines parts with saelab.register.")
    ] = EXPERIMENT,
    json_: Json = False,
) -> None:
    """Run the checks of all parts on those that an experiment.py defines."""
    from saelab.checks.battery import check_new_parts, lines_of

    findings = check_new_parts(file, lambda: read_runs(file))
    failed = sum(bool(finding.mistake) for finding in findings)
    show(json_, [finding.as_dict() for finding in findings], lines_of(findings))
    if failed:
        say(f"{failed} of {len(findings)} checks fail: correct the part", err=True)
        raise Exit(2)


def parts(
    name: Annotated[str | None, Argument(help="A part to describe, for example jumprelu.")] = None,
    experiment: OwnParts = None,
    json_: Json = False,
) -> None:
    """List the parts of an SAE; of one, its equation and source, its settings and its export."""
    from saelab.checks.list_of_parts import as_dicts, describe, lines_of, lines_of_all

    register_parts(experiment)
    if name is None:
        show(json_, as_dicts(), lines_of_all())
    else:
        answers = describe(name)
        show(json_, answers, lines_of(answers))
