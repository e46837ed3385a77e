"""Calls that Linux, macOS or Windows lacks are made in few modules, which have a fallback."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import saelab

PACKAGE = Path(saelab.__file__).parent
ROOT = PACKAGE.parent
#: The module that has the fallbacks; the others may use what stands after their name and no more.
SYSTEM = "saelab/runtime/system.py"
MAY_USE = {
    "saelab/runtime/cores.py": {"os.sched_getaffinity", "/sys/", "/proc/"},
    "saelab/runtime/allocator.py": {"ctypes.CDLL"},
    "saelab/kernels/build.py": {"ctypes.CDLL"},
    "saelab/kernels/native.py": {"ctypes.CDLL"},
}
#: Modules of the standard library that are not on every system.
MODULES_TEXT = """
    _winapi winsound curses readline _posixsubprocess
    fcntl resource pwd grp termios tty pty syslog posix nt msvcrt winreg
"""
#: Attributes of `os` that Windows or macOS lacks, or that mean something else there.
OS_TEXT = """
    kill killpg setsid getpgid getpgrp setpgid getsid nice fork forkpty getloadavg sysconf
    confstr pathconf statvfs fstatvfs uname getuid geteuid getgid getegid getgroups
    getpriority setpriority pread pwrite preadv pwritev chown lchown chroot mkfifo mknod
    openpty wait wait3 wait4 waitid sched_getaffinity sched_setaffinity sched_yield
    posix_fadvise posix_fallocate posix_spawn register_at_fork set_blocking lockf fchmod
    fchown sync fdatasync sendfile splice memfd_create copy_file_range getrandom environb
    getxattr setxattr listxattr pidfd_open eventfd O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_CLOEXEC
    O_SYNC O_DSYNC O_NOCTTY O_BINARY O_DIRECT O_TMPFILE startfile symlink readlink
"""
SIGNALS_TEXT = """
    SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGSTOP SIGCONT SIGTSTP SIGCHLD SIGPIPE SIGALRM SIGQUIT
    SIGBUS SIGXCPU SIGXFSZ SIG_BLOCK SIG_UNBLOCK SIG_SETMASK pthread_sigmask pthread_kill
    sigwait sigtimedwait sigpending setitimer alarm pause siginterrupt CTRL_C_EVENT
    CTRL_BREAK_EVENT
"""
MODULES = set(MODULES_TEXT.split())
WHOLE = {f"os.{name}" for name in OS_TEXT.split()}
WHOLE |= {f"signal.{name}" for name in SIGNALS_TEXT.split()}
WHOLE |= {"ctypes.CDLL", "ctypes.windll", "ctypes.WinDLL", "socket.AF_UNIX", "select.poll"}
WHOLE |= {"select.epoll", "select.select", "time.tzset", "os.O_NOATIME"}
#: Methods and arguments.
METHODS = {"symlink_to", "hardlink_to", "readlink", "is_mount"}
ARGUMENTS = {"preexec_fn", "start_new_session", "process_group", "pass_fds"}
PLACES = ("/proc/", "/sys/", "/dev/", "/tmp/", "/etc/")

FILES = {file.relative_to(ROOT).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
FILES |= {name: ROOT / name for name in ("experiment.py", "plot.py")}


def documented(tree: ast.AST) -> set[int]:
    """Identities of the constants that are docstrings or other texts without a use."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {id(statement.value) for statement in statements}


def uses(tree: ast.AST) -> Iterator[str]:
    """Yields each name, argument or place that not every system has."""
    docs = documented(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & WHOLE
            if str(node.module).split(".")[0] in MODULES:
                yield str(node.module)
        elif isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if whole in WHOLE or node.attr in METHODS:
                yield whole if whole in WHOLE else node.attr
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            yield node.arg
        elif isinstance(node, ast.Call):
            yield from of_call(ast.unparse(node.func), node.args)
        elif isinstance(node, ast.Constant) and id(node) not in docs:
            text = node.value if isinstance(node.value, str) else ""
            yield from (place for place in PLACES if text.startswith(place))


def of_call(name: str, arguments: list[ast.expr]) -> set[str]:
    """Names that a call looks up by their text, and ways to start a process."""
    if name in ("getattr", "hasattr"):
        return {f"{ast.unparse(arguments[0])}.{constant(arguments[1])}"} & WHOLE
    if name.endswith(("get_context", "set_start_method")):
        return set(map(constant, arguments)) & {"fork", "forkserver"}
    return set()


def constant(node: ast.AST) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


@pytest.mark.parametrize("name", [name for name in FILES if name != SYSTEM])
def test_only_the_module_with_the_fallbacks_names_what_a_system_lacks(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    assert set(uses(tree)) == MAY_USE.get(name, set()), f"use {SYSTEM}, which has a fallback"


@pytest.mark.parametrize(
    ("code", "use"),
    [
        ("import fcntl", "fcntl"),
        ("from resource import getrusage", "resource"),
        ("os.kill(pid, 0)", "os.kill"),
        ("from os import fork", "os.fork"),
        ("getattr(os, 'O_NOFOLLOW', 0)", "os.O_NOFOLLOW"),
        ("signal.signal(signal.SIGHUP, f)", "signal.SIGHUP"),
        ("subprocess.run(x, preexec_fn=f)", "preexec_fn"),
        ("get_context('fork')", "fork"),
        ("Path(f'/proc/{pid}/stat')", "/proc/"),
        ("target.symlink_to(x)", "symlink_to"),
    ],
)
def test_a_use_is_noticed(code: str, use: str) -> None:
    assert set(uses(ast.parse(code))) == {use}
    assert not set(uses(ast.parse(repr(code)))), "a docstring that mentions it"
