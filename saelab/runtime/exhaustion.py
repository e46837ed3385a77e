"""What the machine has run out of, told in one sentence: memory or file handles.

A full disk is told where files are written (files.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from saelab.errors import UsageError

#: How libraries say that an allocation failed, where they raise no MemoryError.
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "not enough memory")
NO_HANDLES = ("Too many open files", "os error 24")


class ExhaustedError(UsageError):
    """Memory or file handles are used up: exit code 2."""


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Raises: ExhaustedError in place of what the system and the libraries raise."""
    try:
        yield
    except ExhaustedError:
        raise
    except Exception as error:  # also our own, of something that could not be read for that reason
        if sentence := next(filter(None, map(_sentence, _chain(error))), ""):
            raise ExhaustedError(sentence) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str:
    code, text = getattr(error, "errno", None), str(error)
    if isinstance(error, MemoryError) or code == errno.ENOMEM or _says(text, NO_MEMORY):
        return (
            "the memory is used up: lower harvest.shard_tokens, harvest.batch or sae.d_sae, or the "
            "number of workers with SAELAB_WORKERS; the same command goes on where it stopped"
        )
    if code in (errno.EMFILE, errno.ENFILE) or _says(text, NO_HANDLES):
        return (
            "no more files can be opened: raise the limit (ulimit -n 1024), or close other "
            "programs; the same command goes on where it stopped"
        )
    return ""


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)
