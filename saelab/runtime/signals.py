"""SIGINT and SIGTERM end a command at its next safe place, with 128 + their number, one sentence.

    with told():           a signal raises `Interrupted` in the main thread, wherever that is ...
        with whole():      ... but within this the first one waits for the end of the block
            step()

Files are written whole or not at all, so most places are safe. A second SIGINT never waits; a
second SIGTERM soon after the first, as a process group gets it, changes nothing. A signal that was
ignored when the command started stays ignored.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Seconds after which a further SIGTERM is no longer the first one once more. Our choice.
SOON = 5.0
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end.

    Args:
        number: of the signal.
        at_once: whether it did not wait for the end of a `whole` block.
    """

    def __init__(self, number: int, at_once: bool = False) -> None:
        super().__init__(number)
        self.number, self.at_once = number, at_once

    @property
    def exit_code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        word = WORDS.get(signal.Signals(self.number), "stopped")
        return f"{word}: the same command goes on where it stopped"


class _Asked:
    """What signals have asked for: the first one's number and time, whether it was raised, and how
    deep in `whole` blocks the process is."""

    number: int | None = None
    at = 0.0
    raised = False
    depth = 0


def handle(number: int, frame: Any) -> None:
    """The handler."""
    if _Asked.number is None:
        _Asked.number, _Asked.at = number, time.monotonic()
        wanted, at_once = not _Asked.depth, False
    else:
        late = time.monotonic() - _Asked.at > SOON and not _Asked.depth
        wanted, at_once = number == signal.SIGINT or late, True
    if wanted:
        _Asked.raised = True
        raise Interrupted(_Asked.number, at_once)


def pending_signal() -> int | None:
    """The number of the signal that has come, None where none has."""
    return _Asked.number


@contextmanager
def defer_signals() -> Iterator[None]:
    """A first signal within the block raises `Interrupted` at its end."""
    _Asked.depth += 1
    try:
        yield
    finally:
        _Asked.depth -= 1
    if _Asked.number is not None and not _Asked.raised and not _Asked.depth:
        _Asked.raised = True
        raise Interrupted(_Asked.number)


@contextmanager
def preserve_handlers() -> Iterator[None]:
    """Puts the handlers back that are set within the block, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in WORDS}
    try:
        yield
    finally:
        for number, handler in found.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Ends the process when a signal comes within the block; the sentence is the last of stderr."""
    try:
        with _listening():
            yield
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        print(stop, file=sys.stderr, flush=True)
        sys.exit(stop.exit_code)


@contextmanager
def _listening() -> Iterator[None]:
    """Handles both signals, in the main thread; all is as before afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with preserve_handlers():
            for number in WORDS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    signal.signal(number, handle)
            yield
    except KeyboardInterrupt as error:  # a library's own, in place of the one that it was given
        if isinstance(error, Interrupted) or _Asked.number is None:
            raise
        raise Interrupted(_Asked.number) from None
    finally:
        _Asked.number, _Asked.raised = None, False
