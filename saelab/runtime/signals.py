"""SIGINT and SIGTERM end a command at its next safe place, with one sentence and exit code 128 + n.

    with exit_on_signal():         a signal raises `Interrupted` anywhere in the main thread ...
        with defer_signals():      ... but the first one inside this waits for the end of the block
            step()

Files are written whole or not at all, so most places are safe. A second SIGINT never waits; a
third changes nothing, and so does a second SIGTERM soon after the first, as a process group
receives it. From the sentence on, the process ignores both. A signal that was ignored when the
command started stays ignored.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

#: Seconds for which a further SIGTERM counts as a repetition of the first one. Our choice.
SOON = 5.0
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end.

    Args:
        number: number of the signal.
        at_once: True if it did not wait for the end of a `defer_signals` block.
    """

    def __init__(self, number: int, at_once: bool = False) -> None:
        super().__init__(number)
        self.number, self.at_once = number, at_once

    @property
    def exit_code(self) -> int:
        """Exit code of a command that the signal ends."""
        return 128 + self.number

    def __str__(self) -> str:
        word = WORDS.get(signal.Signals(self.number), "stopped")
        return f"{word}: the same command goes on where it stopped"


class _Pending:
    """State of the process: number and time of the first signal, whether it was raised, whether a
    further one was raised, and the depth of nested `defer_signals` blocks."""

    number: int | None = None
    at = 0.0
    raised = False
    raised_again = False
    depth = 0


def handle_signal(number: int, frame: Any) -> None:
    """Raises `Interrupted`, or records the signal for the end of the `defer_signals` block."""
    if _Pending.number is None:
        _Pending.number, _Pending.at = number, time.monotonic()
        raise_now, at_once = not _Pending.depth, False
    else:
        late = time.monotonic() - _Pending.at > SOON and not _Pending.depth
        raise_now = (number == signal.SIGINT or late) and not _Pending.raised_again
        _Pending.raised_again |= raise_now
        at_once = True
    if raise_now:
        _Pending.raised = True
        raise Interrupted(_Pending.number, at_once)


def pending_signal() -> int | None:
    """Returns the number of the first signal that has arrived, or None."""
    return _Pending.number


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delays the `Interrupted` of a first signal within the block to the end of the block."""
    _Pending.depth += 1
    try:
        yield
    finally:
        _Pending.depth -= 1
    if _Pending.number is not None and not _Pending.raised and not _Pending.depth:
        _Pending.raised = True
        raise Interrupted(_Pending.number)


@contextmanager
def preserve_handlers() -> Iterator[None]:
    """Restores both signals' handlers after the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in WORDS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exits with one sentence on stderr when a signal arrives within the block."""
    _replace_excepthook()
    try:
        try:
            with _install_handlers():
                yield
        except KeyboardInterrupt as error:
            _exit(error)
    except KeyboardInterrupt as further:  # while the first one was handled
        _exit(further)


def _exit(error: KeyboardInterrupt) -> NoReturn:
    """Ends the process, which ignores both signals from now on, with one sentence on stderr."""
    _ignore_signals()
    stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
    print(stop, file=sys.stderr, flush=True)
    sys.exit(stop.exit_code)


def _ignore_signals() -> None:
    """Ignores both signals, in the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in WORDS:
            signal.signal(number, signal.SIG_IGN)


def _replace_excepthook() -> None:
    """Ends the process in the same way where a signal is raised between two `exit_on_signal`
    blocks, or in the code that enters or leaves one."""
    if getattr(sys.excepthook, "__module__", "") == __name__:
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            _exit(error)
        before(kind, error, trace)

    sys.excepthook = hook


@contextmanager
def _install_handlers() -> Iterator[None]:
    """Handles both signals within the block, in the main thread; restores the handlers after it,
    unless a signal has ended the block: both are ignored then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with preserve_handlers():
            for number in WORDS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    signal.signal(number, handle_signal)
            yield
    except KeyboardInterrupt as error:
        _ignore_signals()
        if isinstance(error, Interrupted) or _Pending.number is None:
            raise
        raise Interrupted(_Pending.number) from None  # a library raised it instead
    finally:
        _Pending.number, _Pending.raised, _Pending.raised_again = None, False, False
