"""One process at a time: a lock beside what is written, which dies with the process that holds it.

The lock is the kernel's (`flock`), so that a killed holder leaves none behind; the file says who
holds it. Where the file system or the platform knows no such lock, nothing is locked.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saelab.errors import UsageError
from saelab.storage.atomic import writing

try:
    import fcntl
except ImportError:  # not on this platform
    fcntl = None

#: What a file system says that has no locks.
NONE_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class BusyError(UsageError):
    """Another process is at work there: exit code 2."""


@contextmanager
def lock_folder(place: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder, `.<name>.lock` beside it.

    Args:
        place: the folder; it need not be there.
        doing: what the holder does, for the sentence that another one gets.

    Raises: BusyError naming the holder.
    """
    place = place.absolute()
    file = place.with_name(f".{place.name}.lock")
    made = [folder for folder in place.parents if not folder.exists()]
    with writing(file):
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = _taken(file, f"{place} is in use: {{}} {doing}")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is let go, so that nobody waits for a lost file
        os.close(handle)
        with suppress(OSError):  # folders that were made for the lock alone
            for folder in made:
                folder.rmdir()


def _taken(file: Path, busy: str) -> int:
    """The open file whose lock is ours and which still has its name."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if not _lock(handle):
                holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                raise BusyError(f"{busy.format(holder)}: wait for it, or name another folder")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), file.stat()):
                    os.ftruncate(handle, 0)
                    os.pwrite(
                        handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0
                    )
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has just removed it


def _lock(handle: int) -> bool:
    """Whether the lock is ours now, or none is to be had at all."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NONE_HERE:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
