"""Runs jobs in local worker processes and reports their progress.

Workers end with their parent and write their stderr to a log file. A signal to end reaches them as
SIGTERM from their parent, whoever else received it; a worker then stops at the next safe place,
with a checkpoint if it is training (training/resume.py). On a CPU each worker has one thread, so
the bits of a result do not depend on the number of workers.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError, SettingError, StudyFailure, UsageError
from saelab.launch.executors import JobSet
from saelab.progress import Progress
from saelab.progress.run import log_progress
from saelab.runtime import signals
from saelab.runtime.cores import usable_cores
from saelab.runtime.main_guard import GUARD, STARTING, UNGUARDED, refuse_unguarded_script
from saelab.runtime.system import (
    KILLED,
    block_keyboard_interrupts,
    end_with_parent,
    ignore_keyboard_interrupts,
    signal_name,
)
from saelab.runtime.torch_defaults import one_thread

#: Seconds between two checks of the workers, and between two reports of a worker about its tokens.
POLL = 0.25
#: Seconds that the last messages of the workers may take to arrive.
LAST_MESSAGES_SECONDS = 5.0
#: Seconds that workers have to end their round and write a checkpoint before they are killed. Our
#: choice: what schedulers give.
GRACE_SECONDS = 30.0
#: The most workers that may be asked for. Our choice: several times the cores of any machine.
MOST_WORKERS = 4096
#: Exit codes of workers that have not ended by themselves.
TERMINATED = (None, 0, -signal.SIGTERM, 128 + signal.SIGTERM)

_channel: Any = None
_busy = False
_state: dict[str, Any] = {}


def run_jobs(job_set: JobSet) -> None:
    """Runs the jobs in worker processes, each with its own log file.

    With 0 workers the jobs run one after the other in this process, after the local work, with the
    same bits.

    Raises: what a job or a step of the local work raises; StudyFailure when a worker dies;
        UsageError when the workers run the user's script again.
    """
    refuse_unguarded_script()
    if job_set.workers == 0:
        for _ in job_set.local_work:
            pass
        with job_set.bar as bar:
            _run_inline(job_set, bar)
        return
    job_set.logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    channel = (sender, context.Lock())
    workers = min(job_set.workers, max(1, len(job_set.jobs)))
    pool = ProcessPoolExecutor(workers, context, _initialise, (channel, job_set.logs, os.getpid()))
    futures: list[Future[None]] = []
    processes: list[BaseProcess] = []
    with _kill_at_the_end(pool):
        _run_in_workers(job_set, pool, receiver, futures, processes)


def _run_in_workers(
    job_set: JobSet,
    pool: ProcessPoolExecutor,
    receiver: Connection,
    futures: list[Future[None]],
    processes: list[BaseProcess],
) -> None:
    """Runs the jobs in the workers of the pool and stops these."""
    try:
        with job_set.bar as bar, _listen_to_workers(receiver, bar):
            with block_keyboard_interrupts(), _starting_workers(pool, processes):  # inherited
                for job in job_set.jobs:
                    futures.append(pool.submit(_run_job, job_set.function, job))
            for _ in job_set.local_work:
                _raise_failures(futures)
            _wait(futures)
    except BrokenProcessPool:
        raise _death(processes, job_set.logs) from None
    finally:
        for future in futures:
            future.cancel()
        _stop(pool, unfinished=not all(future.done() for future in futures))


@contextmanager
def _starting_workers(pool: ProcessPoolExecutor, processes: list[BaseProcess]) -> Iterator[None]:
    """Tells the processes that the pool starts within the block whose workers they are, and adds
    them to the list."""
    os.environ[STARTING] = "1"
    try:
        yield
    finally:
        os.environ.pop(STARTING, None)
        processes += (pool._processes or {}).values()


def _death(processes: Sequence[BaseProcess], logs: Path) -> SaelabError:
    """Returns the error for workers of which one has ended by itself; the others were terminated
    after it."""
    deadline, code = time.monotonic() + LAST_MESSAGES_SECONDS, None
    while code is None and time.monotonic() < deadline:  # the pool waits for them at the same time
        codes = [process.exitcode for process in processes]
        code = next((code for code in codes if code not in TERMINATED), None)
        time.sleep(POLL / 10)
    if code == UNGUARDED:
        return UsageError(GUARD)
    again = "then run the same command again"
    if code == KILLED:
        return StudyFailure(
            f"a worker process was killed, as it happens when memory is used up: see {logs}; free "
            f"memory or lower the number of workers with SAELAB_WORKERS, {again}"
        )
    how = "ended" if code is None else f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was ended by {signal_name(-code)}"
    return StudyFailure(f"a worker process {how}: its log in {logs} says why; {again}")


def _wait(futures: Sequence[Future[None]]) -> None:
    """Waits for all jobs; raises what the first failed one raised."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL, return_when=FIRST_EXCEPTION)
        _raise_failures(done)


@contextmanager
def _listen_to_workers(receiver: Connection, bar: Progress) -> Iterator[None]:
    """Reports the workers' messages from a thread, because this process may be busy with a harvest;
    when the block ends, waits until all messages sent before are reported."""
    over = threading.Event()

    def listen() -> None:
        while receiver.poll(0 if over.is_set() else POLL) or not over.is_set():
            if receiver.poll(0):
                report_progress(bar, *receiver.recv())

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LAST_MESSAGES_SECONDS)


def report_progress(bar: Progress, amount: float, line: Mapping[str, Any] | None = None) -> None:
    """Shows a job's message in the process of the launch."""
    bar.advance(amount)
    if line is not None:
        log_progress(line)


def _raise_failures(futures: Iterable[Future[None]]) -> None:
    """Raises what a job that has ended raised."""
    for future in futures:
        if future.done():
            future.result()


def _run_inline(job_set: JobSet, bar: Progress) -> None:
    """Runs the jobs one after the other in this process."""
    state: dict[str, Any] = {}
    with one_thread():
        for job in job_set.jobs:
            job_set.function(job, functools.partial(report_progress, bar), state)


def _stop(pool: ProcessPoolExecutor, unfinished: bool) -> None:
    """Ends all workers and waits for them; those that do not end in time are killed."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    if unfinished:
        for process in processes:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _kill_at_the_end(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Kills the workers that are left after the block, whatever ends it: a signal that is raised in
    the middle of stopping them too, so that the process need not wait for their jobs."""
    processes = pool._processes  # the pool forgets them when it is shut down

    def kill() -> None:
        for process in list(processes.values()):
            if process.is_alive():
                process.kill()

    try:
        yield
    finally:
        try:
            kill()
        finally:  # at most one more signal is raised
            kill()


def _initialise(channel: Any, logs: Path, parent: int) -> None:
    """Prepares a worker process: signals, log file, allocator, one thread."""
    global _channel
    _channel = channel
    signal.signal(signal.SIGTERM, _on_terminate)
    ignore_keyboard_interrupts()
    end_with_parent(parent, lambda: _busy)
    log = os.open(logs / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 2)
    os.environ["SAELAB_PROGRESS"] = "off"
    import torch

    from saelab.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)


def _on_terminate(number: int, frame: Any) -> None:
    """Ends an idle worker at once; a busy one stops at its next safe place."""
    if not _busy:
        os._exit(128 + number)
    signals.handle_signal(number, frame)


def _run_job(function: Callable[..., None], job: Any) -> None:
    """Does one job in a worker process."""
    global _busy
    advance = _PipeReporter(*_channel)
    try:
        _busy = True
        function(job, advance, _state)
        advance.send()
    finally:
        _busy = False
        # whether the signal was raised in the job, or the job ended before that
        if number := signals.pending_signal():
            os._exit(128 + number)


class _PipeReporter:
    """The `advance` of a job in a worker process; sends what the job reports through a pipe.

    Lines are sent at once, amounts together with the next line or after POLL seconds. A message is
    shorter than a pipe's buffer of 4096 bytes, so it arrives whole or not at all, even from a
    worker that is killed. If nobody listens any more, the worker ends as by a signal, with a
    checkpoint.
    """

    def __init__(self, connection: Connection, lock: Any) -> None:
        self._connection, self._lock = connection, lock
        self._amount, self._sent = 0.0, time.monotonic()

    def __call__(self, amount: float, line: Mapping[str, Any] | None = None) -> None:
        self._amount += amount
        if line is not None or time.monotonic() - self._sent >= POLL:
            self.send(line)

    def send(self, line: Mapping[str, Any] | None = None) -> None:
        """Sends the amount since the last message, and the line if there is one."""
        amount, self._amount, self._sent = self._amount, 0.0, time.monotonic()
        try:
            # deferred, so that the lock is released before the worker ends
            with signals.defer_signals(), self._lock:
                self._connection.send((amount, line))
        except BrokenPipeError:
            signals.handle_signal(signal.SIGTERM, None)


def worker_count(device: str) -> int:
    """Returns the number of workers of a launch: SAELAB_WORKERS (0 runs all jobs in this process),
    else one per core or GPU.

    Raises: SettingError when the variable is not a number.
    """
    value = os.environ.get("SAELAB_WORKERS", "").strip()
    if re.fullmatch("[0-9]{1,6}", value) and int(value) <= MOST_WORKERS:
        return int(value)
    if value:
        remedy = f"use a number of processes up to {MOST_WORKERS}, 0 for none"
        raise SettingError("SAELAB_WORKERS", value, remedy)
    return usable_cores() if device == "cpu" else 1
