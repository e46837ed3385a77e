"""Runs jobs in local worker processes, each with one thread, and reports their progress.

Workers end with their parent and write their stderr to a log file. A signal to end reaches them as
SIGTERM from their parent, whoever else got it: what they do is cut short at its next safe place,
with a checkpoint where they train (training/resume.py). One thread per worker on a CPU:
the bits of a result then do not depend on how many workers there are.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, StudyFailure
from saelab.launch.executors import Work
from saelab.progress import Progress
from saelab.progress.run import log_progress
from saelab.runtime import signals

#: Seconds between two looks at the workers, and between two words of a worker about its tokens.
POLL = 0.25
#: Seconds that the last words of the workers may take to arrive.
PATIENCE = 5.0
#: Seconds that workers have for the end of their round and a checkpoint before they are killed. Our
#: choice: what schedulers give.
GRACE = 30.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_channel: Any = None
_busy = False
_state: dict[str, Any] = {}


def run_jobs(
    function: Work,
    jobs: Sequence[Any],
    workers: int,
    logs: Path,
    bar: AbstractContextManager[Progress],
    beside: Iterable[None] = (),
    device: str = "cpu",
) -> None:
    """See `executors.RunJobs`.

    Without workers the jobs run one after the other in this process, after `beside`, with the same
    bits. What workers print goes into a file each.

    Raises: what a job or a step raises; StudyFailure when a worker dies.
    """
    if workers == 0:
        for _ in beside:
            pass
        with bar as shown:
            _inline(function, jobs, shown)
        return
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    heard, said = context.Pipe(duplex=False)
    channel = (said, context.Lock())
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(jobs))), context, _initialise, (channel, logs, os.getpid())
    )
    futures: list[Future[None]] = []
    try:
        with bar as shown, _listening(heard, shown):
            with _keyboard_blocked():  # workers inherit that
                futures = [pool.submit(_run, function, job) for job in jobs]
            for _ in beside:
                _raise_failures(futures)
            _wait(futures)
    except BrokenProcessPool:
        raise StudyFailure(
            f"a worker process died (out of memory?): see {logs}; free memory or lower the number "
            "of workers with SAELAB_WORKERS, then run the same command again"
        ) from None
    finally:
        for future in futures:
            future.cancel()
        _stop(pool, unfinished=not all(future.done() for future in futures))


@contextmanager
def _keyboard_blocked() -> Iterator[None]:
    """Holds SIGINT back, also from processes started within: a terminal sends it to all of them,
    and the parent decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(futures: Sequence[Future[None]]) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL, return_when=FIRST_EXCEPTION)
        _raise_failures(done)


@contextmanager
def _listening(heard: Connection, bar: Progress) -> Iterator[None]:
    """A thread takes what the workers say, this process being busy with a harvest; when the block
    ends, after what they said before."""
    over = threading.Event()

    def listen() -> None:
        while heard.poll(0 if over.is_set() else POLL) or not over.is_set():
            if heard.poll(0):
                take(bar, *heard.recv())

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)


def take(bar: Progress, amount: float, line: Mapping[str, Any] | None = None) -> None:
    """What a job said, in the process of the launch."""
    bar.advance(amount)
    if line is not None:
        log_progress(line)


def _raise_failures(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        if future.done():
            future.result()


def _inline(
    function: Work,
    jobs: Sequence[Any],
    bar: Progress,
) -> None:
    state: dict[str, Any] = {}
    with one_thread():
        for job in jobs:
            function(job, functools.partial(take, bar), state)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in a worker, so that the bits are a worker's."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stop(pool: ProcessPoolExecutor, unfinished: bool) -> None:
    """Ends the workers; none is left behind."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    try:
        if unfinished:
            for process in processes:
                process.terminate()
        deadline = time.monotonic() + GRACE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also when a second interrupt ends the waiting
        for process in processes:
            if process.is_alive():
                process.kill()


def _initialise(channel: Any, logs: Path, parent: int) -> None:
    global _channel
    _channel = channel
    signal.signal(signal.SIGTERM, _terminated)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
    log = os.open(logs / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 2)
    os.environ["SAELAB_PROGRESS"] = "off"
    import torch

    from saelab.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)


def _terminated(number: int, frame: Any) -> None:
    if not _busy:
        os._exit(128 + number)
    signals.handle_signal(number, frame)


def _run(function: Callable[..., None], job: Any) -> None:
    global _busy
    words = _Words(*_channel)
    try:
        _busy = True
        function(job, words, _state)
        words.send()
    finally:
        _busy = False
        # whether it was raised, or the job ended before its turn
        if number := signals.pending_signal():
            os._exit(128 + number)


class _Words:
    """`advance` in a worker: lines go at once, amounts together with the next of them or after a
    while. A message is shorter than a pipe's buffer of 4096 bytes, so it arrives whole or not at
    all, also from a worker that is killed. Where nobody listens any more, the worker ends as by a
    signal, with a checkpoint."""

    def __init__(self, connection: Connection, lock: Any) -> None:
        self._connection, self._lock = connection, lock
        self._amount, self._sent = 0.0, time.monotonic()

    def __call__(self, amount: float, line: Mapping[str, Any] | None = None) -> None:
        self._amount += amount
        if line is not None or time.monotonic() - self._sent >= POLL:
            self.send(line)

    def send(self, line: Mapping[str, Any] | None = None) -> None:
        amount, self._amount, self._sent = self._amount, 0.0, time.monotonic()
        try:
            # the lock is given back before the worker ends
            with signals.defer_signals(), self._lock:
                self._connection.send((amount, line))
        except BrokenPipeError:
            signals.handle_signal(signal.SIGTERM, None)


def worker_count(device: str) -> int:
    """Workers of a launch: SAELAB_WORKERS (0: none, in this process), else one per core or GPU.

    Raises: SettingError when the variable is no number.
    """
    named = os.environ.get("SAELAB_WORKERS", "")
    if named.isdigit():
        return int(named)
    if named:
        raise SettingError("SAELAB_WORKERS", named, "use a number of processes, 0 for none")
    if device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
