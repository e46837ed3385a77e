"""Jobs as tasks of a Ray cluster: `saelab run run_3 --executor ray` (extra `ray`).

The cluster is the one that RAY_ADDRESS names, else one that is started on this machine for the
launch. A task takes one core or, on CUDA, one GPU. When the worker of a task dies, Ray starts the
task again elsewhere; it goes on from its last checkpoint, and its result has the same bits.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, StudyFailure
from saelab.launch.executors.local import POLL
from saelab.launch.executors.remote import Tally, Task
from saelab.progress import Progress
from saelab.runtime import signals

#: How often a task is started again after its worker died. Our choice.
RETRIES = 3
#: Bytes of the object store of a cluster of our own, the least that Ray takes: jobs are small.
STORE = 80_000_000


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

    Raises: SettingError without Ray; SourceError when the cluster can't be reached; StudyFailure
        when a task's workers keep dying.
    """
    folder = (logs / f"ray-{os.getpid()}").absolute()
    with _cluster(workers) as ray:
        for _ in beside:
            pass
        needs = {"num_cpus": 1} if device == "cpu" else {"num_cpus": 1, "num_gpus": 1}
        remote = ray.remote(**needs, max_retries=RETRIES)(_call)
        tasks = [Task.of(function, job, number, folder) for number, job in enumerate(jobs)]
        try:
            with bar as shown:
                _wait(ray, [remote.remote(task) for task in tasks], Tally(folder, shown))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _call(task: Task) -> None:
    task()


def _wait(ray: Any, pending: Sequence[Any], tally: Tally) -> None:
    while pending:
        done, pending = ray.wait(list(pending), num_returns=1, timeout=POLL)
        tally.hear()
        for task in done:
            _raise_failure(ray, task)


def _raise_failure(ray: Any, task: Any) -> None:
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        why = str(error).strip().partition("\n")[0]
        raise StudyFailure(
            f"workers of the Ray cluster died {RETRIES + 1} times on one job ({why}): give its "
            "nodes more memory, then run the same command again"
        ) from None


@contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    """Ray, connected to a cluster; one of our own ends with the launch.

    Raises: SettingError without Ray, SourceError when RAY_ADDRESS can't be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        remedy = "Ray is not installed: pip install 'saelab[ray]'"
        raise SettingError("executor", "ray", remedy) from None
    quiet = {"configure_logging": True, "logging_level": "ERROR", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    own = {} if address else _own(workers)
    try:
        with signals.preserve_handlers():
            ray.init(address=address, **own, **quiet)
    except (ConnectionError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise SourceError(f"RAY_ADDRESS = {address!r} can't be reached ({why}): mend it") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _own(workers: int) -> dict[str, Any]:
    return {
        "num_cpus": max(1, workers),
        "include_dashboard": False,
        "object_store_memory": STORE,
    }
