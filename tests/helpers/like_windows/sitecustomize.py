"""A Python in which saelab sees what it would see on Windows. Python imports this file by itself if
its folder is on PYTHONPATH, also in each process that is started from there.

Modules of saelab get an `os`, `signal`, `sys` and `ctypes` that lack what Windows lacks and say
'win32', and no `fcntl` or `resource`. In every module a file can't be removed or replaced while
this process has it open or mapped. The standard library, other packages and paths stay those of
Linux, so this is no proof that saelab runs on Windows: it shows that the fallbacks work together.
"""

from __future__ import annotations

import builtins
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}
OS = """
    fork forkpty killpg setsid getpgid getpgrp setpgid getsid nice getloadavg sysconf pread pwrite
    statvfs fstatvfs uname getuid geteuid getgid getegid getgroups chown lchown mkfifo mknod openpty
    sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate register_at_fork lockf fchown
    getpriority setpriority O_DIRECTORY O_NOFOLLOW O_NONBLOCK
"""
SIGNALS = """
    SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGSTOP SIGCONT SIGTSTP SIGCHLD SIGPIPE SIGALRM SIGQUIT
    SIG_BLOCK SIG_UNBLOCK SIG_SETMASK pthread_sigmask pthread_kill sigwait setitimer alarm pause
"""


class View(ModuleType):
    """A module without some names and with others; the rest is that of the module itself."""

    def __init__(self, module: ModuleType, without: str, **instead: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(instead, _module=module, _without=set(without.split()))

    def __getattr__(self, name: str) -> Any:
        if name in self._without:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def kill(pid: int, number: int) -> None:
    assert number, "os.kill(pid, 0) ends the other process on Windows"
    os.kill(pid, number)


class Kernel32:
    """The calls of Windows that saelab makes; a process is its own handle."""

    def OpenProcess(self, rights: int, inherit: bool, pid: int) -> int:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        return pid

    def GetExitCodeProcess(self, handle: int, code: Any) -> int:
        code._obj.value = 259
        return 1

    def CloseHandle(self, handle: int) -> int:
        return 1


def no_library(name: str | None) -> None:
    raise OSError(f"{name} can't be loaded")


def locking(handle: int, mode: int, size: int) -> None:
    assert (mode, size, os.lseek(handle, 0, os.SEEK_CUR)) == (2, 1, 1 << 30)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(path: Any) -> bool:
    """Whether this process has the file open or mapped."""
    try:
        there = Path(path).stat()
    except (OSError, TypeError, ValueError):
        return False
    for place in Path("/proc/self/fd").iterdir():
        try:
            if os.path.samestat(os.fstat(int(place.name)), there):
                return True
        except OSError:
            continue
    end = f" {os.path.realpath(path)}"
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return any(line.endswith(end) for line in maps)


def unless_open(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses any of its paths that this process has open."""

    def refusing(*paths: Any, **options: Any) -> Any:
        for path in paths:
            if not options and isinstance(path, str | os.PathLike) and in_use(path):
                raise PermissionError(13, "another process has the file open", str(path))
        return function(*paths, **options)

    return refusing


def install() -> None:
    msvcrt = ModuleType("msvcrt")
    msvcrt.__dict__.update(LK_NBLCK=2, locking=locking)
    windll = ModuleType("windll")
    windll.kernel32 = Kernel32()
    views = {
        "os": View(os, OS, kill=kill, name="nt"),
        "signal": View(signal, SIGNALS),
        "sys": View(sys, "", platform="win32"),
        "ctypes": View(ctypes, "", CDLL=no_library, windll=windll),
        "msvcrt": msvcrt,
    }
    plain = builtins.__import__

    def importing(name: str, globals: Any = None, *others: Any, **options: Any) -> Any:
        if str((globals or {}).get("__name__", "")).startswith("saelab"):
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in views:
                return views[name]
        return plain(name, globals, *others, **options)

    builtins.__import__ = importing
    for name in ("unlink", "remove", "replace", "rename"):
        setattr(os, name, unless_open(getattr(os, name)))


install()
