"""SIGINT and SIGTERM end a command at its next safe place, with 128 + their number, one sentence.

    with told():           a signal raises `Interrupted` in the main thread, wherever that is ...
        with whole():      ... but within this the first one waits for the end of the block
            step()

Files are written whole or not at all, so most places are safe. A second SIGINT never waits; a
second SIGTERM changes nothing. A signal that was ignored when the command started stays ignored.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """What signals have asked for: the first one's number, whether it was raised, `whole` depth."""

    number: int | None = None
    raised = False
    depth = 0


def handle(number: int, frame: Any) -> None:
    """The handler."""
    again, _Asked.number = _Asked.number is not None, _Asked.number or number
    if again and number == signal.SIGINT:
        _Asked.raised = True
        raise Interrupted(_Asked.number, at_once=True)
    if not again and not _Asked.depth:
        _Asked.raised = True
        raise Interrupted(number)


@contextmanager
def whole() -> Iterator[None]:
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
def told() -> Iterator[None]:
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
    before = {number: signal.getsignal(number) for number in WORDS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Asked.number, _Asked.raised = None, False
