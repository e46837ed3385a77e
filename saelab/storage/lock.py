"""Lock that lets one process at a time write a folder; it ends with the process that holds it.

It is the kernel's lock (`flock`; on Windows that of a byte), so a killed holder leaves none behind;
the lock file names the holder. Nothing is locked if the file system or the platform has no such
locks.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from saelab.errors import UsageError
from saelab.runtime.system import read_at, remove_locked, try_lock
from saelab.storage.atomic import explain_write_errors
from saelab.storage.small_files import NOT_FOLLOWED, check_regular

#: Seconds that `wait_for_lock` waits. Our choice.
PATIENCE = 60.0
#: Errors of a file system that has no locks.
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class BusyError(UsageError):
    """Another process is using the folder: exit code 2."""


@contextmanager
def lock_folder(place: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a folder, the file `.<name>.lock` next to it, until the block ends.

    Args:
        place: the folder; it need not exist.
        doing: what the holder does, for the error message of the process that is refused.

    Raises: BusyError naming the holder.
    """
    place = place.absolute()
    file = place.with_name(f".{place.name}.lock")
    with explain_write_errors(file):
        new_folders = [folder for folder in place.parents if not folder.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(file, f"{place} is in use: {{}} {doing}")
    try:
        yield
    finally:
        remove_locked(file, handle)
        with suppress(OSError):  # folders that were made only for the lock
            for folder in new_folders:
                folder.rmdir()


@contextmanager
def wait_for_lock(place: Path, doing: str, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the lock of a file or folder that others hold for moments only; waits for them.

    Args:
        place, doing: as in `lock_folder`.
        patience: seconds to wait.

    Raises: BusyError naming the holder when that takes too long.
    """
    until = time.monotonic() + patience
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock_folder(place, doing))
                break
            except BusyError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield


def _acquire(file: Path, busy: str) -> int:
    """Takes the lock; returns the open lock file, which still has its name.

    Raises: BusyError, with the holder filled into the text `busy`.
    """
    while True:
        handle = check_regular(os.open(file, os.O_RDWR | os.O_CREAT | NOT_FOLLOWED, 0o644), file)
        try:
            if not _try_lock(handle):
                holder = read_at(handle, 200, 0).decode(errors="replace") or "another process"
                raise BusyError(f"{busy.format(holder)}: wait for it, or name another folder")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), file.stat()):
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last holder has just deleted it


def _try_lock(handle: int) -> bool:
    """Returns whether this process holds the lock now, or no lock exists on this file system."""
    try:
        return try_lock(handle)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return True
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
