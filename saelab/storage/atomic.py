"""Files are written whole or not at all: bytes go to a temporary name, then one rename.

An object at a URL (`remote.py`) is made as a temporary file and put in its place as a whole.
A sealed JSON file holds a digest of itself, so that a change of it shows.

Raises `SaelabError` subclasses with one sentence when the disk is full or the folder is read-only.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.errors import DamageError, SourceError
from saelab.storage.remote import Place, Remote

#: Bytes of a JSON file at most; parsed it takes up to twenty times as much. Ours have a few MB.
MOST_JSON = 32 * 2**20
#: For tests: '<file>:<pattern>:<n>' appends the path of every write that matches to the file, and
#: kills the process group between the bytes and the rename of the n-th; n = 0 never does.
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
                _failpoint(path, *os.environ[FAILPOINT].rsplit(":", 2))
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _failpoint(path: Path, trace: str, pattern: str, n: str) -> None:
    name = str(path.absolute())
    if not fnmatch.fnmatch(name, pattern):
        return
    with Path(trace).open("ab") as file:  # appended in one write: processes take turns
        file.write(f"{name}\n".encode())
        file.flush()
        before = Path(trace).read_bytes()[: file.tell()]
    if before.count(b"\n") == int(n):
        os.kill(0, signal.SIGKILL)  # 0: the process group


def sweep(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder."""
    for rest in folder.glob(".*.tmp"):
        process = rest.name.split(".")[-2]
        if not (process.isdigit() and _alive(int(process))):
            rest.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's write errors into one sentence with the remedy."""
    try:
        yield
    except Exception as error:
        code, why = (error.errno, error.strerror) if isinstance(error, OSError) else (None, "")
        full = ("No space left", "File too large")  # the second: the limit of ulimit -f
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(s in str(error) for s in full):
            raise WriteError(
                f"{path} can't be written, the disk is full: free some space"
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise WriteError(f"{path} can't be written ({why}): choose another folder") from error
        raise


def write_text(path: Place, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def json_text(data: Any) -> str:
    """What `write_json` writes; a NaN or infinity is an error, since a missing number is null."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def write_json(path: Place, data: Any) -> None:
    """Writes JSON as `json_text` gives it."""
    write_text(path, json_text(data))


def digest(data: Any) -> str:
    """A 16-character content hash of JSON-like data; the order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_sealed(path: Place, data: dict[str, Any]) -> None:
    """Writes JSON with a digest of itself."""
    write_json(path, data | {"digest": digest(data)})


def read_sealed(path: Place, remedy: str = "make it again") -> dict[str, Any]:
    """What `write_sealed` was given.

    The digest finds damage and edits by hand. It is no signature: whoever wants to deceive can make
    one.

    Raises: DamageError when the file was changed afterwards, SourceError when it is missing.
    """
    return check_seal(read_json(path), path, remedy)


def check_seal(data: Any, path: Place, remedy: str = "make it again") -> dict[str, Any]:
    """`read_sealed` of a file that was parsed already."""
    if not isinstance(data, dict) or data.pop("digest", None) != digest(data):
        raise DamageError(f"{path} was changed after it was written: {remedy}")
    return data


def append_line(path: Path, text: str) -> None:
    """Adds one line of JSON to a file in one write, so that writers beside it don't mix theirs in;
    the whole line or, where the disk is full, nothing of it. A torn last line is removed first."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            file.seek(0)
            content = file.read()
            whole = untorn(content)
            if len(whole) < len(content):
                file.truncate(len(whole))
            left = b"\n" * (whole[-1:] not in (b"", b"\n")) + text.encode() + b"\n"
            try:
                while left:  # once, but for a disk that takes a part of it
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(len(whole))
                raise


def untorn(content: bytes) -> bytes:
    """Lines of JSON without a last one that has neither an end nor a meaning: a loss of power in
    the middle of `append_line` leaves such."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except (ValueError, RecursionError):
        return content[:end]
    return content


def read_json(path: Place, remedy: str = "delete it and run again") -> Any:
    """Raises: DamageError when the file is no JSON, SourceError when it can't be opened."""
    try:
        return parse_json(path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror}): name another") from None
    except ValueError as error:
        raise DamageError(f"{path} is damaged ({error}): {remedy}") from None


def parse_json(path: Place) -> Any:
    """The content of a JSON file, by the standard: no NaN, no number beyond a float's range.

    Raises: OSError when it can't be opened; ValueError for anything else that is wrong with it.
    """
    content = _beginning(path, MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"it is over {MOST_JSON // 2**20} MB")
    try:
        return json.loads(content.decode(), parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _beginning(path: Place, size: int) -> bytes:
    """The first bytes of a file; all of them of a URL, where one request is one object."""
    if isinstance(path, Remote):
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(size)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value


def sha256(path: Place) -> str:
    """Hex digest of a file's bytes."""
    if isinstance(path, Remote):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
