"""Turns a panic of a library that is written in Rust into an error that can be handled.

PyO3 raises it as a `BaseException`, so that `except Exception` would let it end the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PanicError(RuntimeError):
    """A library written in Rust has stopped; the message is its own."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Replaces a panic within the block.

    Raises: PanicError in place of the library's `PanicException`.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise PanicError(str(error)) from None
        raise
