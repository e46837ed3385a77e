"""The front door: `python experiment.py --out_dir=run_3`, and the same from the command line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.errors import SaelabError, SettingError, nearest
from saelab.runtime import exhaustion
from saelab.runtime.signals import exit_on_signal

with exit_on_signal():  # torch is loaded here, which takes seconds
    from saelab.runs.schema import QUICK
    from saelab.study.launch_options import LaunchOptions, quick_name
    from saelab.study.plan import Confirmation, Run, find_run, read_base, read_plan
    from saelab.study.registry import attempt

if TYPE_CHECKING:
    from saelab.preflight.preview import RunCheck
    from saelab.study.task import Launch

#: No choice besides what the run table and plan.toml say.
DEFAULTS = LaunchOptions()
#: The run whose seeds are used nowhere else.
CONFIRMING = "run_10"
USAGE = "usage: python experiment.py --out_dir=run_1     (no other argument)"


def main(runs: Mapping[str, Run], experiment: str) -> None:
    """Runs one entry of the run table and ends the process with its exit code.

    0: every cell finished or was declared invalid; 1: the baseline has no valid cell; 2: bad input;
    130 and 143: SIGINT and SIGTERM. The last line of stderr says what, where and the remedy.
    """
    with exit_on_signal():
        try:
            out_dir = parse_out_dir(sys.argv[1:], list(runs))
            with exhaustion.as_usage_error():
                run_one(runs, Path(experiment).resolve(), out_dir)
        except SaelabError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        except Exception as error:  # a driver shows the end of stderr, so the last line must say it
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(1)


def parse_out_dir(arguments: list[str], runs: list[str]) -> Path:
    """The folder that --out_dir names.

    Raises: SettingError for any other argument.
    """
    if arguments in (["--help"], ["-h"]):
        print(f"{USAGE}\nruns: {', '.join(runs)}")
        sys.exit(0)
    joined = [a for argument in arguments for a in argument.split("=", 1)]
    if len(joined) != 2 or joined[0] != "--out_dir" or not joined[1]:
        hint = nearest(joined[0], ["--out_dir"]) if joined else ""
        raise SettingError("arguments", " ".join(arguments), f"{USAGE}{hint}")
    return Path(joined[1])


def run_one(
    runs: Mapping[str, Run],
    experiment: Path,
    out_dir: Path,
    force: bool = False,
    plan_file: Path | None = None,
    executor: str = "",
    options: LaunchOptions = DEFAULTS,
) -> None:
    """One launch of the run that the last part of `out_dir` names."""
    plan_file = plan_file or experiment.parent / "plan.toml"
    task = task_of(runs, experiment, out_dir, force, plan_file, options=options)
    start(replace(task, executor=executor))


def start(task: Launch) -> None:
    """One launch in every setting of its plan, which is written down as an attempt unless it is a
    quick form."""
    from saelab.launch.over_settings import launch_over_settings

    with attempt(task.root, task.name) if task.judged else nullcontext():
        launch_over_settings(task)


def train_all(
    runs: Mapping[str, Run],
    experiment: Path,
    folders: Sequence[Path],
    force: bool = False,
    executor: str = "",
    options: LaunchOptions = DEFAULTS,
) -> None:
    """Trains the cells of several runs together, each once; `run_one` then judges each of them.

    A confirming run is left out: its arm is known when the others are complete.

    Raises: SettingError before anything is trained when a run is complete and not forced.
    """
    from saelab.launch.launch import check_open, train_together
    from saelab.launch.over_settings import all_launches

    plan_file, tasks = experiment.parent / "plan.toml", []
    for folder in folders:
        if options.quick or not isinstance(find_run(runs, folder.name), Confirmation):
            task = task_of(runs, experiment, folder, force, plan_file, options=options)
            check_open(task)
            tasks.append(replace(task, executor=executor))
    if len(tasks) > 1:
        train_together(all_launches(tasks))


def tune_one(runs: Mapping[str, Run], experiment: Path, name: str) -> dict[str, Any]:
    """Tries learning rates for arms of a run, on seeds of their own.

    All arms of a `tuned` run are tried; of any other run, the baseline and the primary arms.

    Returns: what it wrote into tuned.json, which a `Confirmation` and a `tuned` run then use.
    Raises: as a launch.
    """
    from saelab.launch.launch import launch
    from saelab.runs.folder import RunFolder
    from saelab.study.tuning import arms_to_tune, keep_best, trial_plan, trials

    plan_file = experiment.parent / "plan.toml"
    task = task_of(runs, experiment, Path(name), True, plan_file, at_best_rates=False)
    arms, names = arms_to_tune(task.run)
    folder = task.root / ".saelab" / "tuning" / name
    trying = replace(
        task,
        run=trials(replace(task.run, arms=arms), task.base, names),
        plan=trial_plan(task.plan),
        out_dir=folder,
        purpose="tune",
    )
    launch(trying)
    info = RunFolder(folder).info
    return keep_best(task.root, name, task.run, task.base, task.plan, info, names)


def check_one(
    runs: Mapping[str, Run], experiment: Path, name: str, options: LaunchOptions = DEFAULTS
) -> RunCheck:
    """Describes what a run will be, before anything is trained.

    Raises: as the launch would for what is impossible.
    """
    from saelab.launch.over_settings import check_over_settings
    from saelab.study.tuning import is_run_tuned

    plan_file = experiment.parent / "plan.toml"
    tuned = is_run_tuned(plan_file.parent, name)
    task = task_of(runs, experiment, Path(name), True, plan_file, tuned, options)
    return check_over_settings(task)


def task_of(
    runs: Mapping[str, Run],
    experiment: Path,
    out_dir: Path,
    force: bool,
    plan_file: Path,
    at_best_rates: bool = True,
    options: LaunchOptions = DEFAULTS,
) -> Launch:
    """Reads what the run table and plan.toml say about one run.

    Args:
        at_best_rates: a `tuned` run has its arms at the rates of tuned.json.
        options: what the command line changes.

    Raises: SettingError when the table has no such run, or for an arm of a `tuned` run that is not
        tuned; SourceError for a missing file.
    """
    from saelab.launch.confirmation import resolve_confirmation
    from saelab.study.task import Launch
    from saelab.study.tuning import with_best_rates

    planned_as, root = read_plan(plan_file), plan_file.parent
    based_on, run = read_base(root / planned_as.base), find_run(runs, out_dir.name)
    run = options.change_run(run, out_dir.name)
    plan, base = options.change_plan(planned_as), options.change_base(based_on, planned_as)
    if isinstance(run, Confirmation):
        run = resolve_confirmation(run, runs, root, base, out_dir.name)
    elif at_best_rates and not options.quick:
        run = with_best_rates(run, base, root, out_dir.name)
    purpose = "confirm" if out_dir.name == CONFIRMING else "explore"
    return Launch(
        name=quick_name(out_dir.name) if options.quick else out_dir.name,
        run=run,
        plan=plan,
        base=base,
        out_dir=options.place(out_dir),
        root=root,
        experiment=experiment,
        purpose=QUICK if options.quick else purpose,
        force=force or options.quick,  # it is there to be looked at, and made again
        table=runs,
        planned_as=planned_as if options != DEFAULTS else None,
        based_on=based_on if options != DEFAULTS else None,
    )
