"""Files are written whole or not at all: bytes go to a temporary name, then one rename.

An object at a URL (saelab/remote.py) is made as a temporary file and put in its place as a whole.
A sealed JSON file holds a digest of itself, so that a change of it shows.

Raises `SaelabError` subclasses with one sentence when the disk is full or the folder is read-only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.errors import DamageError, SourceError
from saelab.remote import Place, Remote

#: For tests: '<file>:<n>' appends the path of every write to the file and kills the process group
#: between the bytes and the rename of the n-th; n = 0 never does.
FAILPOINT = "SAELAB_FAILPOINT"


class WriteError(SourceError):
    """The disk is full or the folder can't be written: exit code 2."""


def write_atomically(path: Place, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the result to `path`; the old file stays on failure."""
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory(prefix="saelab-") as folder:
            whole = Path(folder) / path.name
            with writing(whole):
                write(whole)
            path.put(whole)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            if FAILPOINT in os.environ:
                _failpoint(path, *os.environ[FAILPOINT].rsplit(":", 1))
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _failpoint(path: Path, trace: str, n: str) -> None:
    with Path(trace).open("ab") as file:  # appended in one write: processes take turns
        file.write(f"{path}\n".encode())
        file.flush()
        before = Path(trace).read_bytes()[: file.tell()]
    if before.count(b"\n") == int(n):
        os.kill(0, signal.SIGKILL)  # 0: the process group


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's write errors into one sentence with the remedy."""
    try:
        yield
    except Exception as error:
        code, why = (error.errno, error.strerror) if isinstance(error, OSError) else (None, "")
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise WriteError(
                f"{path} can't be written, the disk is full: free some space"
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise WriteError(f"{path} can't be written ({why}): choose another folder") from error
        raise


def write_text(path: Place, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Place, data: Any) -> None:
    """Writes JSON; a NaN or infinity is an error here, since a missing number must be null."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def digest(data: Any) -> str:
    """A 16-character content hash of JSON-like data; the order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_sealed(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON with a digest of itself."""
    write_json(path, data | {"digest": digest(data)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` was given.

    Raises: DamageError when the file was changed afterwards, SourceError when it is missing.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.pop("digest", None) != digest(data):
        raise DamageError(f"{path} was changed after it was written: make it again")
    return data


def append_line(path: Path, text: str) -> None:
    """Adds one line to a file in one write, so that writers beside it don't mix theirs in."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_json(path: Place) -> Any:
    """Raises: DamageError when the file is no JSON, SourceError when it is missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamageError(f"{path} is damaged ({error}): delete it and run again") from None


def sha256(path: Place) -> str:
    """Hex digest of a file's bytes."""
    if isinstance(path, Remote):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
