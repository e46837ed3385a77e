"""Executors run the jobs of a launch; each is one function, and all are called alike.

local    worker processes of this machine
ray      tasks of a Ray cluster                     (extra `ray`)
slurm    a job array of a Slurm cluster             (extra `slurm`)

A new executor is one file here and one line in `EXECUTORS`. Wherever a job runs, it has one thread
on a CPU and its own named random streams, so the bits of a result do not depend on the executor.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, nearest
from saelab.progress import Progress

LOCAL = "local"
#: Name -> module with a function `run_jobs`.
EXECUTORS = {name: f"{__name__}.{name}" for name in (LOCAL, "ray", "slurm")}

#: How a job reports its progress: with the amount of work done since its last call, and optionally
#: a line for metrics.jsonl.
Advance = Callable[..., None]
Work = Callable[[Any, Advance, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class JobSet:
    """Jobs of a launch, and how they are run: `function(job, advance, state)` for every job.

    Args:
        function: importable; `state` is a dictionary that a worker keeps between its jobs.
        jobs: picklable, the longest first.
        workers: how many work at a time, if this machine decides that.
        logs: folder for what workers print.
        bar: advanced by the amounts that the jobs pass to `advance`; their lines are reported.
        local_work: work for this process while the jobs run, in steps.
        device: what a job needs: a core ('cpu') or a GPU.
    """

    function: Work
    jobs: Sequence[Any]
    workers: int
    logs: Path
    bar: AbstractContextManager[Progress]
    local_work: Iterable[None] = ()
    device: str = "cpu"


#: An executor: does all jobs and the local work. It raises what a job or a step of the local work
#: raises, and StudyFailure when workers die.
RunJobs = Callable[[JobSet], None]


def executor(name: str = "") -> RunJobs:
    """Returns the executor of that name, by default that of SAELAB_EXECUTOR, else the local one.

    Raises: SettingError for an unknown name.
    """
    return importlib.import_module(EXECUTORS[check_executor(name)]).run_jobs


def check_executor(name: str = "") -> str:
    """Returns the name of the executor that `executor` returns.

    Raises: SettingError for an unknown name.
    """
    setting = "executor" if name else "SAELAB_EXECUTOR"
    name = name or executor_name()
    if name not in EXECUTORS:
        remedy = f"use one of {', '.join(EXECUTORS)}{nearest(name, EXECUTORS)}"
        raise SettingError(setting, name, remedy)
    return name


def executor_name() -> str:
    """Returns the value of SAELAB_EXECUTOR, or 'local' if it is not set."""
    return os.environ.get("SAELAB_EXECUTOR") or LOCAL
