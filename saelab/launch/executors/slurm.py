"""Runs jobs as one job array of a Slurm cluster: `--executor slurm` (extra `slurm`, submitit).

SAELAB_SLURM holds parameters for the cluster as `name=value` with commas between them:
partition=gpu,account=me,timeout_min=240,mem_gb=16. A job that Slurm preempts, or that reaches its
time limit, is put into the queue again and resumes from its last checkpoint.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import time
from typing import Any

from saelab.errors import SettingError, StudyFailure
from saelab.launch.executors import JobSet
from saelab.launch.executors.remote import Tally, Task

#: Seconds between two checks of the queue, and the default time limit of a job in minutes. Our
#: choice.
POLL, MINUTES = 2.0, 240
#: Parameters that submitit knows for every kind of cluster; all others are specific to Slurm.
COMMON = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "name")


class RequeuedTask(Task):
    """A task that submitit submits again when it is preempted."""

    def checkpoint(self) -> Any:
        """Returns what submitit submits again."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


def run_jobs(job_set: JobSet) -> None:
    """Runs the jobs as one job array; the local work ends before the first job starts.

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
    for _ in job_set.local_work:
        pass
    folder = (job_set.logs / f"slurm-{os.getpid()}").absolute()
    queue = submitit.AutoExecutor(folder=folder, cluster=cluster)
    gpus = int(job_set.device != "cpu")
    needs = {"cpus_per_task": 1, "gpus_per_node": gpus, "timeout_min": MINUTES}
    queue.update_parameters(**needs | parameters)
    tally = folder / "tally"
    with queue.batch():
        submitted = [
            queue.submit(RequeuedTask.of(job_set.function, job, number, tally))
            for number, job in enumerate(job_set.jobs)
        ]
    try:
        with job_set.bar as bar:
            _wait(submitted, Tally(tally, bar))
    except BaseException:
        for job in submitted:
            job.cancel(check=False)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _wait(pending: list[Any], tally: Tally) -> None:
    """Waits for all submitted jobs and reports their progress.

    Raises: StudyFailure when one ends without a result.
    """
    while pending:
        time.sleep(POLL)
        done = [job for job in pending if job.done()]
        pending = [job for job in pending if job not in done]
        tally.read_new()
        for job in done:
            error = job.exception()
            if error is not None:
                last = str(error).strip().splitlines()[-1]
                raise StudyFailure(
                    f"job {job.job_id} ended without a result ({last}): see {tally.folder.parent}"
                )


def settings(text: str) -> dict[str, Any]:
    """Parses text such as `partition=gpu,timeout_min=240` into submitit's parameters.

    Raises: SettingError when the text has another form.
    """
    parameters: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.strip().partition("=")
        if not equals or not name.isidentifier() or not value:
            raise SettingError("SAELAB_SLURM", text, "write name=value, with commas between them")
        full = name if name in (*COMMON, "cluster") else f"slurm_{name}"
        parameters[full] = int(value) if re.fullmatch("[0-9]{1,9}", value) else value
    return parameters
