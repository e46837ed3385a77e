"""Builds the kernels for CPUs on the machine where they run, once, and loads them.

    <cache>/saelab/saelab-<key>.so          the library, named by source, compiler and CPU
    <cache>/saelab/saelab-<key>.so.sha256   its checksum, written last

A library without its checksum, or that does not match it, is built again. `CXX` names another
compiler, and may hold arguments: CXX="ccache g++ -O2".
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from saelab.runtime.system import cpu_features, is_private, user_number
from saelab.storage.atomic import WriteError, sha256, write_atomically, write_text
from saelab.storage.small_files import read_small_text

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT = 120  # seconds for the compiler
_building = threading.Lock()


class Unavailable(Exception):
    """The kernels can't be built or loaded on this machine; the message says why."""


def load_library() -> ctypes.CDLL:
    """Returns the library, which is compiled if no folder has it undamaged.

    Raises: Unavailable on Windows, when there is no compiler, when it fails, or when no folder can
        hold the library.
    """
    if sys.platform == "win32":
        raise Unavailable("they are not built on Windows")
    compiler = _compiler()
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((_version(compiler), compiler[1:], flags(), _cpu())).encode())
    name = f"saelab-{key.hexdigest()[:16]}.so"
    reason = ""
    for folder in _folders():
        try:
            with _building:
                return ctypes.CDLL(str(library_file(folder / name, compiler)))
        except (OSError, WriteError) as error:  # such as a folder from which nothing may be run
            reason = reason or str(error)
    raise Unavailable(f"no folder to store the compiled kernels in ({reason})")


def library_file(file: Path, compiler: Sequence[str]) -> Path:
    """Returns the file of the library, after it was compiled if it is missing or damaged.

    Args:
        file: its place in the cache.
        compiler: the command of the compiler, with its arguments.

    Raises: Unavailable when the compiler fails; WriteError or OSError when nothing can be written.
    """
    checksum = file.with_name(f"{file.name}.sha256")
    if file.is_file():
        if _matches(file, checksum):
            return file
        print(f"{file} does not match its checksum (it is built again now)", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    checksum.unlink(missing_ok=True)
    write_atomically(
        file, lambda temporary: _output([*compiler, *flags(), str(SOURCE), "-o", str(temporary)])
    )
    write_text(checksum, sha256(file) + "\n")
    return file


def _matches(file: Path, checksum: Path) -> bool:
    """Returns True if the file is as it was written."""
    try:
        return read_small_text(checksum).strip() == sha256(file)
    except (OSError, ValueError):
        return False


def flags() -> tuple[str, ...]:
    """Returns the options of the compiler. Where ATEN_CPU_CAPABILITY=avx2 tells torch to do without
    AVX512, so does the compiler, as on a processor that has none."""
    masked = torch.backends.cpu.get_cpu_capability() == "AVX2" and "avx512f" in cpu_features()
    return (*FLAGS, *(("-mno-avx512f",) if masked else ()))


def _compiler() -> list[str]:
    """Returns the command of the compiler: that of CXX, or the first that is installed.

    Raises: Unavailable when there is none.
    """
    named = os.environ.get("CXX", "").strip()
    if named:
        if Path(named).is_file():  # a path that may hold spaces
            return [named]
        try:
            return shlex.split(named)
        except ValueError as error:
            raise Unavailable(f"CXX = {named!r} is not a command ({error})") from None
    installed = next(filter(shutil.which, COMPILERS), None)
    if installed is None:
        raise Unavailable(f"no C++ compiler ({', '.join(COMPILERS)}) is installed")
    return [installed]


def _folders() -> list[Path]:
    """Lists the folders for the compiled file: the user's cache and, in case that can't be written,
    a temporary folder that only this user can write."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    temporary = Path(tempfile.gettempdir()) / f"saelab-kernels-{user_number()}"
    return [cache / "saelab", *([temporary] if is_private(temporary) else [])]


def _version(compiler: Sequence[str]) -> str:
    """Returns the first line of what the compiler says of its version."""
    return _output([*compiler, "--version"]).splitlines()[0]


def _cpu() -> str:
    """Describes the CPU as far as -march=native depends on it."""
    return cpu_features() or f"{platform.machine()} {platform.processor()}"


def _output(command: Sequence[str]) -> str:
    """Runs a command and returns what it printed.

    Raises: Unavailable when it does not run or fails.
    """
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run ({error})") from error
    if result.returncode:
        message = (result.stderr.strip() or "no message").splitlines()[0]
        raise Unavailable(f"{command[0]} failed: {message}")
    return result.stdout or result.stderr or " "
