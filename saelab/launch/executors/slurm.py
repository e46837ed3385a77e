"""Jobs as one job array of a Slurm cluster, through submitit: `--executor slurm` (extra `slurm`).

SAELAB_SLURM holds what the cluster wants to know, as `name=value` with commas between them:
partition=gpu,account=me,timeout_min=240,mem_gb=16. A job that Slurm preempts, or that reaches its
time limit, is put into the queue again and goes on from its last checkpoint.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, StudyFailure
from saelab.launch.executors.remote import Tally, Task
from saelab.progress import Progress

#: Seconds between two looks at the queue, and minutes that a job may take unless told. Our choice.
POLL, MINUTES = 2.0, 240
#: Names that submitit takes for every cluster; all others are Slurm's own.
COMMON = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "name")


class Requeued(Task):
    """A task that submitit hands in again when it is preempted."""

    def checkpoint(self) -> Any:
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


def run_jobs(
    function: Any,
    jobs: Sequence[Any],
    workers: int,
    logs: Path,
    bar: AbstractContextManager[Progress],
    beside: Iterable[None] = (),
    device: str = "cpu",
) -> None:
    """See `executors.RunJobs`; `beside` ends before the first job starts.

    Raises: SettingError without submitit or for a bad SAELAB_SLURM; StudyFailure when a job ends
        without a result.
    """
    parameters = settings(os.environ.get("SAELAB_SLURM", ""))
    cluster = parameters.pop("cluster", None)
    try:
        submitit: Any = importlib.import_module("submitit")
    except ImportError:
        remedy = "submitit is not installed: pip install 'saelab[slurm]'"
        raise SettingError("executor", "slurm", remedy) from None
    for _ in beside:
        pass
    folder = (logs / f"slurm-{os.getpid()}").absolute()
    queue = submitit.AutoExecutor(folder=folder, cluster=cluster)
    needs = {"cpus_per_task": 1, "gpus_per_node": int(device != "cpu"), "timeout_min": MINUTES}
    queue.update_parameters(**needs | parameters)
    tally = folder / "tally"
    with queue.batch():
        handed = [
            queue.submit(Requeued.of(function, job, number, tally))
            for number, job in enumerate(jobs)
        ]
    try:
        with bar as shown:
            _wait(handed, Tally(tally, shown))
    except BaseException:
        for job in handed:
            job.cancel(check=False)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _wait(pending: list[Any], tally: Tally) -> None:
    while pending:
        time.sleep(POLL)
        done = [job for job in pending if job.done()]
        pending = [job for job in pending if job not in done]
        tally.hear()
        for job in done:
            error = job.exception()
            if error is not None:
                last = str(error).strip().splitlines()[-1]
                raise StudyFailure(
                    f"job {job.job_id} ended without a result ({last}): see {tally.folder.parent}"
                )


def settings(text: str) -> dict[str, Any]:
    """`partition=gpu,timeout_min=240` as submitit's parameters.

    Raises: SettingError when it is written otherwise.
    """
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.strip().partition("=")
        if not equals or not name.isidentifier() or not value:
            raise SettingError("SAELAB_SLURM", text, "write name=value, with commas between them")
        full = name if name in (*COMMON, "cluster") else f"slurm_{name}"
        found[full] = int(value) if value.isdigit() else value
    return found
