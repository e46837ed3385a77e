"""One launch in every setting of its plan: first the further settings, then the plan's own base.

    run_i/settings/<name>/   a complete run of its own: cells, gate, verdict, seal
    run_i/                   the run in the plan's own base, and all arms judged over the settings

Every setting is an ordinary launch with its own harvest, seeds and batches, which all arms there
share. `run_i/` is completed last, so an interrupted launch leaves no run that looks complete, and
the same command goes on with the cells that are not in the cache. A setting whose baseline has no
valid cell is shown as missing; the others go on.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from saelab.errors import StudyFailure, naming_setting
from saelab.launch.launch import check_launch, check_open, launch
from saelab.preflight.preview import RunCheck
from saelab.runs.folder import INFO, MANIFEST
from saelab.runs.schema import SETTINGS
from saelab.runtime.safe_text import visible
from saelab.storage.cache import cache_folder, has_activations
from saelab.storage.links import refuse_links
from saelab.storage.lock import lock_folder
from saelab.study.setting_bases import setting_bases
from saelab.study.task import Launch
from saelab.study.tuning import declare_twins
from saelab.verdict.judge import Comparison


def launch_over_settings(task: Launch) -> list[Comparison]:
    """Runs one launch in every setting of its plan; without settings it is `launch`.

    Returns: the comparisons in the plan's own base.

    Raises: as `launch`, before anything is trained for a setting that is impossible; BusyError
        while another process makes the run.
    """
    others = setting_launches(task)
    if not others:
        return launch(task)
    refuse_links(task.out_dir)
    with lock_folder(task.out_dir / SETTINGS, f"is making {task.label}"):
        return _launch_all(task, others)


def _launch_all(task: Launch, others: Sequence[Launch]) -> list[Comparison]:
    check_open(task)
    check = check_over_settings(task)
    if task.base.activations is None and not has_activations(cache_folder(task.root)):
        check.check_limit()
    start = time.monotonic()
    if task.force:
        _remove_last(task)
    for i, other in enumerate(others, start=1):
        print(f"{other.label}: setting {i} of {len(others) + 1}", file=sys.stderr)
        try:
            launch(_with_time_left(other, start))
        except StudyFailure as error:
            print(f"{visible(str(error))}; the other settings go on", file=sys.stderr)
    print(f"{task.label}: the plan's own base", file=sys.stderr)
    return launch(_with_time_left(task, start))


def setting_launches(task: Launch) -> list[Launch]:
    """Returns the launches of the plan's further settings, in their order; [] for one of those.

    Raises: as `setting_bases`.
    """
    if not task.further_settings:
        return []
    bases = setting_bases(task.plan, task.base, task.root, task.run)
    return [
        replace(
            task,
            setting=name,
            base=base,
            run=declare_twins(task.run, base) if task.purpose == "confirm" else task.run,
            based_on=None,
            out_dir=task.out_dir / SETTINGS / name,
            force=True,  # what an earlier attempt left is made anew from the cache
        )
        for name, base in bases.items()
    ]


def check_over_settings(task: Launch) -> RunCheck:
    """Describes a launch in every setting; nothing is trained.

    Raises: UsageError for what is impossible, naming the setting.
    """
    whole = check_launch(task)
    return replace(whole, settings=tuple(map(_check_setting, setting_launches(task))))


def all_launches(tasks: Sequence[Launch]) -> list[Launch]:
    """Returns the launches with those of their further settings."""
    return [one for task in tasks for one in (*setting_launches(task), task)]


def _check_setting(other: Launch) -> RunCheck:
    with naming_setting(f"settings {other.setting!r}: "):
        return check_launch(other)


def _with_time_left(task: Launch, start: float) -> Launch:
    return replace(task, limit=task.limit - (time.monotonic() - start))


def _remove_last(task: Launch) -> None:
    """Removes what makes a replaced run look complete, and its settings."""
    for name in (INFO, MANIFEST):
        (task.out_dir / name).unlink(missing_ok=True)
    shutil.rmtree(task.out_dir / SETTINGS, ignore_errors=True)
