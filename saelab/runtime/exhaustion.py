"""Turns out-of-memory and too-many-open-files errors into one sentence.

A full disk is reported by the functions that write files (storage/atomic.py).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from saelab.errors import UsageError

#: What libraries say of a failed allocation, if they do not raise MemoryError. "could not" is how
#: oneDNN words it; a primitive descriptor that it can't create is of an unsupported kind instead.
NO_MEMORY = re.compile(
    r"can't allocate memory|Cannot allocate memory|bad_alloc|not enough memory"
    r"|could not create a memory object|could not (create|execute) a primitive(?! descriptor)"
    r"|([Uu]nable|[Ff]ailed) to allocate|could not allocate|(CUDA|HIP)\S* out of memory"
    r"|CUDA error: out of memory"
)
NO_HANDLES = re.compile(r"Too many open files|os error 24")


class ExhaustedError(UsageError):
    """Memory or file handles are used up: exit code 2."""


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Replaces errors of exhausted memory or file handles inside the block by one sentence.

    Raises: ExhaustedError in place of the error of the system or the library.
    """
    try:
        yield
    except ExhaustedError:
        raise
    except Exception as error:  # also errors of saelab that were caused by the exhaustion
        if sentence := next(filter(None, map(_sentence, _chain(error))), ""):
            raise ExhaustedError(sentence) from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and its causes, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str:
    """Returns the sentence with the remedy, or "" for an error of another kind."""
    code, text = getattr(error, "errno", None), str(error)
    if isinstance(error, MemoryError) or code == errno.ENOMEM or NO_MEMORY.search(text):
        return (
            "the memory is used up: lower harvest.shard_tokens, harvest.batch or sae.d_sae, or the "
            "number of workers with SAELAB_WORKERS; the same command goes on where it stopped"
        )
    if code in (errno.EMFILE, errno.ENFILE) or NO_HANDLES.search(text):
        return (
            "no more files can be opened: raise the limit (ulimit -n 1024), or close other "
            "programs; the same command goes on where it stopped"
        )
    return ""
