"""Where the jobs of a launch run: one function per executor, all called alike.

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
from pathlib import Path
from typing import Any, Protocol

from saelab.errors import SettingError, nearest
from saelab.progress import Progress

LOCAL = "local"
#: Name -> module with a function `run_jobs`.
EXECUTORS = {name: f"{__name__}.{name}" for name in (LOCAL, "ray", "slurm")}

#: What a job says how far it is with: an amount of work done since it last did, and a line for
#: metrics.jsonl or none.
Advance = Callable[..., None]
Work = Callable[[Any, Advance, dict[str, Any]], None]


class RunJobs(Protocol):
    """What an executor is."""

    def __call__(
        self,
        function: Work,
        jobs: Sequence[Any],
        workers: int,
        logs: Path,
        bar: AbstractContextManager[Progress],
        beside: Iterable[None] = (),
        device: str = "cpu",
    ) -> None:
        """Calls `function(job, advance, state)` for every job.

        Args:
            function: importable; `state` is a dictionary that a worker keeps between its jobs.
            jobs: picklable, the longest first.
            workers: how many work at a time, where this machine decides that.
            logs: folder for what workers print.
            bar: advanced by the amounts that the jobs pass to `advance`; their lines are told.
            beside: work for this process meanwhile, in steps.
            device: what a job needs: a core ('cpu') or a GPU.

        Raises: what a job or a step raises; StudyFailure when workers die.
        """
        ...


def executor(name: str = "") -> RunJobs:
    """The executor of that name, by default SAELAB_EXECUTOR or the local one.

    Raises: SettingError for an unknown one.
    """
    setting = "executor" if name else "SAELAB_EXECUTOR"
    name = name or executor_name()
    if name not in EXECUTORS:
        known = f"use one of {', '.join(EXECUTORS)}{nearest(name, EXECUTORS)}"
        raise SettingError(setting, name, known)
    return importlib.import_module(EXECUTORS[name]).run_jobs


def executor_name() -> str:
    """What SAELAB_EXECUTOR names, else 'local'."""
    return os.environ.get("SAELAB_EXECUTOR") or LOCAL
