"""Atomic writes: the bytes go to a temporary file, which one rename puts in its place.

An object at a URL (`remote.py`) is written to a temporary file and uploaded as a whole. A sealed
JSON file contains its own digest, so that later changes are detected.

A full disk or a read-only folder raises a `SaelabError` subclass with one sentence.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saelab.errors import DamageError, SaelabError, SourceError
from saelab.runtime.system import (
    flush_to_disk,
    kill_process_group,
    process_exists,
    replace_file,
)
from saelab.storage.remote import Place, Remote
from saelab.storage.small_files import (
    NOT_FOLLOWED,
    check_characters,
    check_depth,
    check_regular,
    read_small_file,
)

#: Largest JSON file, in bytes; parsed it takes up to twenty times as much. Ours have a few MB.
MOST_JSON = 32 * 2**20
#: For tests: '<file>:<pattern>:<n>' appends the path of every matching write to the file, and kills
#: the process group between the bytes and the rename of the n-th; n = 0 kills nothing.
FAILPOINT = "SAELAB_FAILPOINT"
#: Errors of a path that can't be written: access, and what lies there already.
UNWRITABLE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
)


class WriteError(SourceError):
    """The disk is full or the folder can't be written: exit code 2."""


def write_atomically(path: Place, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the result to `path`; the old file stays on failure."""
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory(prefix="saelab-") as folder:
            file = Path(folder) / path.name
            with explain_write_errors(file):
                write(file)
            path.put(file)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            flush_to_disk(temporary)
            if FAILPOINT in os.environ:
                _failpoint(path, *os.environ[FAILPOINT].rsplit(":", 2))
            replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _failpoint(path: Path, trace: str, pattern: str, n: str) -> None:
    """Records a matching write in the file `trace`; kills the process group at the n-th."""
    name = str(path.absolute())
    if not fnmatch.fnmatch(name, pattern):
        return
    with Path(trace).open("ab") as file:  # appended in one write: processes take turns
        file.write(f"{name}\n".encode())
        file.flush()
        before = Path(trace).read_bytes()[: file.tell()]
    if before.count(b"\n") == int(n):
        kill_process_group()


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder."""
    for temporary in folder.glob(".*.tmp"):
        process = temporary.name.split(".")[-2]
        if not (process.isdigit() and process_exists(int(process))):
            temporary.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns the system's write errors inside the block into one sentence with the remedy.

    Raises: WriteError when the disk is full, the folder can't be written, or the path is none that
        a file can have.
    """
    try:
        yield
    except Exception as error:
        code, why = (error.errno, error.strerror) if isinstance(error, OSError) else (None, "")
        full = ("No space left", "File too large")  # the second: the limit set by ulimit -f
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(s in str(error) for s in full):
            raise WriteError(
                f"{path} can't be written, the disk is full: free some space"
            ) from error
        if code in UNWRITABLE:
            reason = _obstacle(Path(path)) or why
            raise WriteError(
                f"{path} can't be written ({reason}): choose another folder"
            ) from error
        raise


def _obstacle(path: Path) -> str:
    """Names what lies where the file or one of its folders belongs; "" for nothing of that kind."""
    with suppress(OSError):  # such as a name that is too long
        for folder in reversed(path.absolute().parents):
            if folder.is_symlink() and not folder.exists():
                return f"{folder} is a link that leads nowhere"
            if folder.exists() and not folder.is_dir():
                return f"{folder} is not a folder"
        if path.is_symlink():
            return "it is a link"
        if path.exists() and not path.is_file():
            return "it is a folder" if path.is_dir() else "it is a pipe or a device"
    return ""


def write_text(path: Place, text: str) -> None:
    """Writes a text as UTF-8, with the ends of its lines as they are on every system."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def json_text(data: Any) -> str:
    """Returns the text that `write_json` writes; raises ValueError for NaN and infinity.

    A missing number is null.
    """
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def write_json(path: Place, data: Any) -> None:
    """Writes data as JSON; raises ValueError for NaN and infinity."""
    write_text(path, json_text(data))


def digest(data: Any) -> str:
    """Returns a 16-character content hash of JSON-like data; the order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_sealed(path: Place, data: dict[str, Any]) -> None:
    """Writes JSON together with its own digest."""
    write_json(path, data | {"digest": digest(data)})


def read_sealed(path: Place, remedy: str = "make it again") -> dict[str, Any]:
    """Reads the data that was given to `write_sealed`.

    The digest detects damage and manual edits. It is not a signature: anybody can compute one.

    Raises: DamageError when the file was changed afterwards, SourceError when it is missing.
    """
    return check_seal(read_json(path), path, remedy)


def check_seal(data: Any, path: Place, remedy: str = "make it again") -> dict[str, Any]:
    """Checks the digest of parsed data and removes it from them; see `read_sealed`."""
    if not isinstance(data, dict) or data.pop("digest", None) != digest(data):
        raise DamageError(f"{path} was changed after it was written: {remedy}")
    return data


def check_key(stored: object, key: object, path: Place, remedy: str = "make it again") -> None:
    """Compares the key inside a sealed file with the one that its place stands for.

    Raises: DamageError when the file belongs elsewhere: it was moved, renamed or swapped.
    """
    if stored != key:
        raise DamageError(f"{path} belongs to {stored!r}, not to {key!r}: {remedy}")


def append_line(path: Path, text: str) -> None:
    """Adds one line of JSON to a file, after it has removed a torn last line.

    The line is one write, so that concurrent writers do not mix their lines; on a full disk nothing
    of it is written.

    Raises: WriteError when the disk is full or the folder can't be written.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | NOT_FOLLOWED
        handle = check_regular(os.open(path, flags, 0o644), path)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            file.seek(0)
            content = file.read()
            whole = drop_torn_line(content)
            if len(whole) < len(content):
                file.truncate(len(whole))
            rest = b"\n" * (whole[-1:] not in (b"", b"\n")) + text.encode() + b"\n"
            try:
                while rest:  # one pass, unless the disk takes only a part
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(len(whole))
                raise


def drop_torn_line(content: bytes) -> bytes:
    """Returns lines of JSON without a torn last line, which has no end and can't be parsed.

    A loss of power in the middle of `append_line` leaves such a line.
    """
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except (ValueError, RecursionError):
        return content[:end]
    return content


#: Remedy for a line of JSON that is not as it was written.
LINE_REMEDY = "fix the line, or take the file from a copy"


def read_lines(
    path: Path, unreadable: type[SaelabError] = SourceError
) -> Iterator[tuple[str, Any]]:
    """Yields the place ('file:3') and the data of every line of JSON; nothing without a file.

    A torn last line is left out.

    Args:
        unreadable: class of the error when the file can't be read.

    Raises: `unreadable`; DamageError for a line that is not JSON.
    """
    try:
        content = read_small_file(path, MOST_JSON)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise unreadable(f"{path} can't be read ({reason}): move it away") from None
    for number, text in enumerate(drop_torn_line(content).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            data = json.loads(text)
            check_characters(data, text)
        except (ValueError, RecursionError) as error:
            raise DamageError(f"{where} is damaged ({error}): {LINE_REMEDY}") from None
        yield where, data


def read_json(path: Place, remedy: str = "delete it and run again") -> Any:
    """Reads a JSON file.

    Raises: DamageError when the file is not valid JSON, SourceError when it can't be opened.
    """
    try:
        return parse_json(path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror}): name another") from None
    except ValueError as error:
        raise DamageError(f"{path} is damaged ({error}): {remedy}") from None


def parse_json(path: Place) -> Any:
    """Parses a JSON file by the standard, without NaN and numbers beyond the range of a float.

    Raises: OSError when it can't be opened; ValueError for anything else that is wrong with it.
    """
    content = read_whole(path, MOST_JSON)
    try:
        data = json.loads(
            content.decode(), parse_constant=_reject_constant, parse_float=_parse_float
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(data)
    check_characters(data, content)
    return data


def read_whole(path: Place, most: int) -> bytes:
    """Reads a small file, or a whole object at a URL, which is one request.

    Raises: OSError when it can't be opened, ValueError when it has more than `most` bytes.
    """
    if not isinstance(path, Remote):
        return read_small_file(path, most)
    content = path.read_bytes()
    if len(content) > most:
        raise ValueError(f"it is over {most // 2**20} MB")
    return content


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _parse_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value


def sha256(path: Place) -> str:
    """Returns the hex digest of a file's bytes."""
    if isinstance(path, Remote):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
