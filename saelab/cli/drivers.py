"""Commands for programs that try one idea after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from saelab.cli.common import Json, Set, messages_on_stderr, parse_changes, show


def try_(
    file: Annotated[Path, Option("--file", help="The file that defines ARM.")] = Path(
        "candidate.py"
    ),
    seeds: Annotated[
        int | None,
        Option(
            help="Seeds of both sides, when the decision on this candidate was 'more-seeds N'; "
            "only the new ones are trained."
        ),
    ] = None,
    set_: Set = None,
    name: Annotated[str, Option(help="Name of the arm that --set makes.")] = "candidate",
    limit: Annotated[
        float, Option(help="Refuse the try if it is expected to take more seconds than this.")
    ] = 7000,
    executor: Annotated[str, Option(help="Where cells are trained, as for `saelab run`.")] = "",
    json_: Json = False,
) -> None:
    """Try one candidate against the baseline; the last line says keep, discard or more-seeds N.

    The candidate is the ARM of candidate.py, or what --set changes in the base settings. It is
    trained in a new folder tries/try_N next to the baseline, on the same batches and seeds, and
    judged by the plan. The output ends with

    val_fvu: 0.178312

    decision: keep {"arm": "candidate", "effect": -0.0061, "low": -0.0066, ...}

    keep: it is better, and an effect that matters is not excluded. discard: it is not better, or
    not by as much as matters.
    more-seeds N: N seeds could tell, so repeat the command with --seeds N. The exit code of all
    three is 0; that of bad input is 2. Every try, also a repeated one under another name, is
    accounted for in the study's error budget, so what does nothing is not kept by trying often.
    """
    from dataclasses import asdict

    from saelab.drivers.candidate import candidate_of, read_candidate
    from saelab.drivers.tries import Options, try_candidate

    changes = parse_changes(set_)
    if changes:
        place = file if file.is_file() else Path("experiment.py")
        candidate = candidate_of(changes, place.resolve(), name)
    else:
        candidate = read_candidate(file)
    with messages_on_stderr(json_):
        done = try_candidate(candidate, Options(seeds=seeds, limit=limit, executor=executor))
    show(json_, asdict(done), ())
