"""Commands that carry a study out: run, tune, template, watch, attempts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from saelab.cli.common import (
    EXPERIMENT,
    Json,
    Quick,
    RunTable,
    SeedsOfArms,
    Set,
    Tokens,
    messages_on_stderr,
    parse_changes,
    read_runs,
    show,
)


def run(
    names: Annotated[
        list[str],
        Argument(
            help="Runs of the table in experiment.py, 'run_1'. The cells of several runs are "
            "trained together, each once."
        ),
    ],
    force: Annotated[bool, Option(help="Replace a complete run.")] = False,
    executor: Annotated[
        str,
        Option(
            help="Where cells are trained: local, ray (RAY_ADDRESS) or slurm (SAELAB_SLURM); by "
            "default the one that SAELAB_EXECUTOR names, else local."
        ),
    ] = "",
    quick: Quick = False,
    seeds: SeedsOfArms = None,
    tokens: Tokens = None,
    set_: Set = None,
    json_: Json = False,
    experiment: RunTable = EXPERIMENT,
) -> None:
    """Train, evaluate and judge all arms of a run (as `python experiment.py --out_dir=NAME`).

    saelab run run_1 --quick

    Options that change the plan or the base settings are shown as deviations from what the study
    has registered.
    """
    from saelab.launch.entry import run_one, train_all
    from saelab.study.launch_options import LaunchOptions
    from saelab.verdict.review import review

    options = LaunchOptions(seeds=seeds, tokens=tokens, changes=parse_changes(set_), quick=quick)
    runs, file = read_runs(experiment)
    folders = [Path(name) for name in names]
    with messages_on_stderr(json_):
        train_all(runs, file, folders, force, executor, options)
        for folder in folders:
            run_one(runs, file, folder, force, executor=executor, options=options)
    if json_:
        verdicts = [review(options.place(folder)).as_dict() for folder in folders]
        show(json_, verdicts[0] if len(verdicts) == 1 else verdicts, ())


def tune(
    name: Annotated[str, Argument(help="A run of the table, 'run_10'.")] = "run_10",
    json_: Json = False,
    experiment: RunTable = EXPERIMENT,
) -> None:
    """Try three learning rates for each arm that is to be tuned.

    Tuned are the baseline and the primary arm of the confirming run, and all arms of a run with
    tuned = True. The trials use seeds that no verdict uses; the best rate of each arm is written
    to tuned.json.
    """
    from saelab.launch.entry import tune_one

    runs, file = read_runs(experiment)
    with messages_on_stderr(json_):
        tuned = tune_one(runs, file, name)
    lines = [*_tuned_lines(tuned), f"written to tuned.json; next: `saelab run {name}`"]
    show(json_, tuned, lines)


def _tuned_lines(tuned: Mapping[str, Any]) -> Iterator[str]:
    from saelab.study.tuning import describe_edge

    for arm, best in tuned.items():
        if isinstance(best, dict):
            yield f"{arm}: train.lr = {best['train.lr']:g} of {best['trials']}"
            if note := describe_edge(best["train.lr"], [float(rate) for rate in best["trials"]]):
                yield f"  {note}"
            for rate, reason in best["left_out"].items():
                yield f"  {rate} is left out: {reason}"


def template(
    folder: Annotated[Path, Argument(help="The folder to make.")],
    run_0: Annotated[
        Path | None, Option("--run-0", help="A complete run of the baselines, copied there.")
    ] = None,
    train: Annotated[
        bool, Option("--train", help="Train run_0 there now, as `saelab run run_0` would.")
    ] = False,
    minimal: Annotated[
        bool,
        Option("--minimal", help="Only run table, plan and base settings: one arm, one question."),
    ] = False,
    json_: Json = False,
) -> None:
    """Write a folder for a study: run table, plan, pictures, and what an autonomous driver reads.

    Without an option it copies run_0 from this folder, if there is one.
    """
    if minimal:
        _template_minimal(folder, run_0, train, json_)
        return
    from saelab.launch.entry import run_one
    from saelab.launch.template import BASELINE_RUN, write_template

    here = Path(BASELINE_RUN)
    if run_0 is None and not train and (here / "final_info.json").is_file():
        run_0 = here
    write_template(folder, run_0)
    lines = []
    if train:
        runs, file = read_runs(folder / EXPERIMENT)
        with messages_on_stderr(json_):
            run_one(runs, file, folder / BASELINE_RUN)
    elif run_0 is None:
        lines = [f"{folder} has no run_0 yet: python experiment.py --out_dir=run_0 makes it"]
    show(json_, _template_data(folder), lines)


def _template_data(folder: Path) -> dict[str, Any]:
    """Returns what --json prints of the folder of a study."""
    from saelab.launch.template import BASELINE_RUN

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder) for path in files]
    own = [name.as_posix() for name in names if name.parts[0] not in (BASELINE_RUN, ".saelab")]
    there = (folder / BASELINE_RUN / "final_info.json").is_file()
    return {"folder": str(folder), "files": own, "has_baseline": there}


def _template_minimal(folder: Path, run_0: Path | None, train: bool, json_: bool) -> None:
    from saelab.errors import SettingError
    from saelab.launch.template import write_minimal

    if train or run_0 is not None:
        option = "--train" if train else "--run-0"
        raise SettingError(option, train or str(run_0), "--minimal has no run_0: leave it out")
    write_minimal(folder)
    line = (
        f"{folder}: experiment.py (arms), plan.toml (how they are judged), configs/embedded.toml; "
        f"next: `cd {folder}`, `saelab plan check`, `saelab run run_1 --quick`"
    )
    show(json_, _template_data(folder), [line])


def watch(
    folder: Annotated[
        Path, Argument(help="Folder of a run that is running or has ended, 'run_3'.")
    ],
    json_: Json = False,
) -> None:
    """Follow a run: stage, cells, tokens/s, losses, time left. With --json its state now."""
    from saelab.progress.watch import WatchedRun
    from saelab.progress.watch import watch as follow

    if json_:
        watched = WatchedRun(folder)
        show(json_, watched.as_dict(watched.update()), ())
    else:
        follow(folder)


def attempts(json_: Json = False) -> None:
    """List every attempt at a run of the study in this folder, and what its comparisons cost."""
    from saelab.study.registry import as_dicts
    from saelab.study.registry import attempts as read_attempts
    from saelab.verdict.error_budget.ledger import read_ledger

    rows, ledger = read_attempts(Path()), read_ledger(Path())
    lines = [attempt.line() for attempt in rows]
    show(json_, as_dicts(rows), [*lines, *(ledger.lines() if ledger else ())])
