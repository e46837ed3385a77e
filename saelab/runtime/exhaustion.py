"""Turns errors of the system into one sentence: no memory, too many open files, unusable paths.

A full disk is reported by the functions that write files (storage/atomic.py).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from saelab.errors import UsageError, shorten

#: What libraries say of a failed allocation, if they do not raise MemoryError. "could not" is how
#: oneDNN words it; a primitive descriptor that it can't create is of an unsupported kind instead.
NO_MEMORY = re.compile(
    r"can't allocate memory|Cannot allocate memory|bad_alloc|not enough memory"
    r"|could not create a memory object|could not (create|execute) a primitive(?! descriptor)"
    r"|([Uu]nable|[Ff]ailed) to allocate|could not allocate|(CUDA|HIP)\S* out of memory"
    r"|CUDA error: out of memory"
)
#: First words of what `Path.resolve` says of a link to itself, until Python 3.12.
LOOP = "Symlink loop"
NO_HANDLES = re.compile(r"Too many open files|os error 24")


class ExhaustedError(UsageError):
    """Memory or file handles are used up: exit code 2."""


class PathError(UsageError):
    """The system refuses a path, such as one with a name that is too long: exit code 2."""


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Replaces errors of the system inside the block by one sentence.

    Raises: ExhaustedError for exhausted memory or file handles; PathError for an error that names a
        path.
    """
    try:
        yield
    except ExhaustedError:
        raise
    except Exception as error:  # also errors of saelab that were caused by the exhaustion
        if sentence := next(filter(None, map(_sentence, _chain(error))), ""):
            raise ExhaustedError(sentence) from error
        if sentence := _of_path(error):
            raise PathError(sentence) from error
        raise


def _of_path(error: Exception) -> str:
    """Returns the sentence for an error of the system that names a path, "" for any other error."""
    if isinstance(error, OSError) and error.filename is not None:
        place, reason = shorten(str(error.filename)), error.strerror or type(error).__name__
        return f"{place} can't be used ({reason}): name another path"
    if isinstance(error, RuntimeError) and str(error).startswith(LOOP):
        return f"{error}: name a path that leads to a file or a folder"
    return ""


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
