"""Calls that only some systems offer, each with its fallback: no other module makes them.

Linux has all of it. macOS has no control groups and no /proc; Windows has neither, nor POSIX locks,
masks of signals, `resource` and `os.sysconf`. tests/architecture/test_systems.py holds that modules
outside of this room use no name that one of the three lacks.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere but on Windows
    msvcrt = None

#: Flag of `os.open` without which Windows would write each newline as two bytes.
BINARY = getattr(os, "O_BINARY", 0)
#: Flags of `os.open`: a link is refused; a pipe is not waited for.
NO_LINK, NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
#: Exit code that `multiprocessing` gives to a process that was killed.
KILLED = -int(getattr(signal, "SIGKILL", 9))
PR_SET_PDEATHSIG = 1  # linux/prctl.h
#: Place of the byte that is locked on Windows, where nobody can read a locked byte.
LOCKED_BYTE = 1 << 30
#: Signs that no name of a file holds on Windows, and names that are those of devices there.
RESERVED = '<>:"|?*'
DEVICES = {"CON", "PRN", "AUX", "NUL"}
DEVICES |= {f"{kind}{n}" for kind in ("COM", "LPT") for n in range(1, 10)}
#: Errors of Windows: access is denied, another process has the file open.
IN_USE = (5, 32)
#: Seconds for which a file that another process has open is tried again, and between two trials.
PATIENCE, PAUSE = 2.0, 0.02
#: Numbers of the Windows interface: a right of `OpenProcess`; the exit code of a running process.
QUERY_LIMITED_INFORMATION, STILL_ACTIVE = 0x1000, 259


# ---------------------------------------------------------------- processes


def process_exists(pid: int) -> bool:
    """Returns whether a process of this number runs, whoever owns it."""
    if sys.platform == "win32":  # where os.kill would end the process
        return _exists_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def _exists_on_windows(pid: int) -> bool:
    kernel32 = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = kernel32.OpenProcess(QUERY_LIMITED_INFORMATION, False, pid)
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel32.CloseHandle(handle)
    return code.value == STILL_ACTIVE


def process_start_time(pid: int) -> str:
    """Returns the start time of a process, which distinguishes it from a later one of its number.

    It is '' if the process has ended or the system has no /proc.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def kill_process_group() -> None:
    """Kills the process group of this process, or this process alone where there are no groups."""
    if hasattr(signal, "SIGKILL"):
        os.kill(0, signal.SIGKILL)  # 0: the process group
    os._exit(128 + 9)


def end_with_parent(parent: int, busy: Callable[[], bool]) -> None:
    """Makes a worker process end when its parent does.

    Linux sends SIGTERM then. Elsewhere a thread waits for the end of the parent, and ends the
    worker as soon as it is not busy; a busy one ends by itself when nobody reads its reports.

    Args:
        parent: number of the parent process.
        busy: returns whether the worker is doing a job.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        return
    threading.Thread(target=_wait_for_parent, args=(busy,), daemon=True).start()


def _wait_for_parent(busy: Callable[[], bool]) -> None:
    process = multiprocessing.parent_process()
    if process is None:
        return
    process.join()
    while busy():
        time.sleep(PAUSE)
    os._exit(1)


@contextmanager
def block_keyboard_interrupts() -> Iterator[None]:
    """Blocks SIGINT in this process and in those started within the block: a terminal sends it to
    all of them, but the parent decides what happens. Without masks of signals nothing is blocked;
    `ignore_keyboard_interrupts` does it in each worker then."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_keyboard_interrupts() -> None:
    """Ignores SIGINT in a worker that could not inherit the mask of its parent."""
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def signal_name(number: int) -> str:
    """Returns 'SIGSEGV' of the number of a signal; 'signal 40' of one without a name here."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---------------------------------------------------------------- processor and memory


def cpu_features() -> str:
    """Returns the line of /proc/cpuinfo that lists what the processor can do; '' without one."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    return ""


def memory_table() -> str:
    """Returns the text of /proc/meminfo; '' on a system that has none."""
    with suppress(OSError):
        return Path("/proc/meminfo").read_text(encoding="utf-8")
    return ""


def peak_memory() -> int | None:
    """Returns the largest memory of this process so far in bytes, or None if that is not known."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def address_space_left() -> int | None:
    """Returns the bytes that a limit on address space leaves to this process; None without one."""
    if resource is None:
        return None
    with suppress(OSError, ValueError, IndexError):
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
            return max(0, limit - pages * resource.getpagesize())
    return None


def machine_memory() -> int | None:
    """Returns the bytes of memory of this machine, or None if that is not known."""
    with suppress(AttributeError, OSError, ValueError):  # no sysconf, or a name that it lacks
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


# ---------------------------------------------------------------- files


def name_problem(name: str, system: str = sys.platform) -> str:
    """Says why a system can't have a folder or file of this name; '' if it can.

    Args:
        name: the name of one entry of a folder.
        system: as in `sys.platform`.
    """
    if system != "win32":
        return ""
    if reserved := sorted(set(name) & set(RESERVED)):
        return f"names a folder, and Windows allows no {reserved[0]!r} there"
    if name.endswith((".", " ")):
        return "names a folder, and on Windows no such name ends with a dot or a space"
    if name.partition(".")[0].rstrip().upper() in DEVICES:
        return "names a folder, and on Windows it is the name of a device"
    return ""


def same_name(first: str, second: str, system: str = sys.platform) -> bool:
    """Returns whether two names are those of one file, since the system ignores their case."""
    if system in ("win32", "darwin"):
        return first.casefold() == second.casefold()
    return first == second


def flush_to_disk(path: Path) -> None:
    """Waits until the bytes of a file are on the disk; Windows flushes only what can be written."""
    handle = os.open(path, BINARY | (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(source: Path, target: Path) -> None:
    """Renames a file over another. Windows refuses while a process has the target open, so it is
    tried again for PATIENCE seconds.

    Raises: OSError when that fails.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in IN_USE or time.monotonic() > until:
                raise
        time.sleep(PAUSE)


def link_or_copy_file(source: Path, target: Path) -> None:
    """Puts a symbolic link to a file at `target`, or a copy where the user may make no links."""
    try:
        target.symlink_to(source)
    except (OSError, NotImplementedError):
        if target.exists() or target.is_symlink():
            raise
        shutil.copyfile(source, target)


def is_private(folder: Path) -> bool:
    """Returns whether no other user could have put anything into the folder, which need not exist.

    Without owners and modes of files that is not known: False.
    """
    if not hasattr(os, "getuid"):
        return False
    if not folder.exists():
        return True
    status = folder.lstat()
    return folder.is_dir() and status.st_uid == os.getuid() and not status.st_mode & 0o022


def user_number() -> str:
    """Returns the number of this user as a part of a file's name; 'user' where there are none."""
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def read_at(handle: int, most: int, offset: int) -> bytes:
    """Reads up to `most` bytes of an open file from a place, and leaves its position there."""
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, most)


def try_lock(handle: int) -> bool:
    """Takes the kernel's lock of an open file, which ends with the process.

    Returns: whether this process holds it now; True also where the system has no such locks.
    Raises: OSError of `flock`, such as from a file system without locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    elif msvcrt is not None:
        os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
        windows: Any = msvcrt
        try:
            windows.locking(handle, windows.LK_NBLCK, 1)
        except OSError:
            return False
    return True


def remove_locked(file: Path, handle: int) -> None:
    """Removes a lock file that this process holds, and releases its lock.

    The name goes first, so that nobody waits for a removed file; Windows removes no open file, so
    that the lock goes first there, and the file stays if another process has just opened it.
    """
    if sys.platform != "win32":
        file.unlink(missing_ok=True)
        os.close(handle)
        return
    os.close(handle)
    with suppress(OSError):
        file.unlink()
