"""Runs jobs as tasks of a Ray cluster: `saelab run run_3 --executor ray` (extra `ray`).

The cluster is the one that RAY_ADDRESS names, else one that is started on this machine for the
launch. A task takes one core or, on CUDA, one GPU. When the worker of a task dies, Ray starts the
task again elsewhere; it resumes from its last checkpoint, and its result has the same bits.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from saelab.errors import SettingError, SourceError, StudyFailure
from saelab.launch.executors import JobSet
from saelab.launch.executors.local import POLL
from saelab.launch.executors.remote import Tally, Task
from saelab.runtime import signals

#: How often a task is started again after its worker died. Our choice.
RETRIES = 3
#: Bytes of the object store of a cluster on this machine: the least that Ray accepts.
STORE = 80_000_000


def run_jobs(job_set: JobSet) -> None:
    """Runs the jobs as Ray tasks; the local work ends before the first job starts.

    Raises: SettingError without Ray; SourceError when the cluster can't be reached; StudyFailure
        when a task's workers keep dying.
    """
    folder = (job_set.logs / f"ray-{os.getpid()}").absolute()
    with _cluster(job_set.workers) as ray:
        for _ in job_set.local_work:
            pass
        needs = {"num_cpus": 1} if job_set.device == "cpu" else {"num_cpus": 1, "num_gpus": 1}
        remote = ray.remote(**needs, max_retries=RETRIES)(_run_task)
        tasks = [Task.of(job_set.function, job, i, folder) for i, job in enumerate(job_set.jobs)]
        try:
            with job_set.bar as bar:
                _wait(ray, [remote.remote(task) for task in tasks], Tally(folder, bar))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _run_task(task: Task) -> None:
    task()


def _wait(ray: Any, pending: Sequence[Any], tally: Tally) -> None:
    """Waits for all tasks and reports their progress; raises what the first failed one raised."""
    while pending:
        done, pending = ray.wait(list(pending), num_returns=1, timeout=POLL)
        tally.read_new()
        for task in done:
            _raise_failure(ray, task)


def _raise_failure(ray: Any, task: Any) -> None:
    """Raises what a task that has ended raised."""
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise StudyFailure(
            f"workers of the Ray cluster died {RETRIES + 1} times on one job ({reason}): give its "
            "nodes more memory, then run the same command again"
        ) from None


@contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    """Connects Ray to a cluster; one that was started for the launch ends with the block.

    Raises: SettingError without Ray, SourceError when RAY_ADDRESS can't be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send usage statistics
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        remedy = "Ray is not installed: pip install 'saelab[ray]'"
        raise SettingError("executor", "ray", remedy) from None
    quiet = {"configure_logging": True, "logging_level": "ERROR", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    options = {} if address else _local_cluster(workers)
    try:
        with signals.preserve_handlers():
            ray.init(address=address, **options, **quiet)
    except (ConnectionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        problem = f"RAY_ADDRESS = {address!r} can't be reached ({reason})"
        raise SourceError(f"{problem}: fix the address") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _local_cluster(workers: int) -> dict[str, Any]:
    """Returns the options of `ray.init` for a cluster on this machine."""
    return {
        "num_cpus": max(1, workers),
        "include_dashboard": False,
        "object_store_memory": STORE,
    }
