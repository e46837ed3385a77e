"""JSON that tells when it is no longer what was written, and so of the files beside it.

    {..., "seal": {"digest": of all the rest, "files": {name: sha256}}}

The seal finds damage and edits by hand. It is no signature: whoever wants to deceive can make one.
Names are relative, so that a folder may be copied, moved and renamed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saelab.config import digest
from saelab.errors import DamageError, SourceError
from saelab.files import read_json, sha256, write_json

SEAL = "seal"


def write_sealed(path: Path, data: Mapping[str, Any], files: Iterable[str] = ()) -> None:
    """Writes a JSON object with its seal, and with those of `files` beside it that are there."""
    sums = {name: sha256(path.parent / name) for name in files if (path.parent / name).is_file()}
    record = json.loads(json.dumps(data, allow_nan=False))  # as it will be read
    write_json(path, {**record, SEAL: {"digest": digest([record, sums]), "files": sums}})


def read_sealed(path: Path, remedy: str = "delete it and run again") -> dict[str, Any]:
    """The object without its seal.

    Raises: DamageError when it is not what was written; SourceError when it is missing.
    """
    data = read_json(path)
    check_object(data, path, remedy)
    if SEAL not in data:
        raise DamageError(f"{path} has no checksum: {remedy}")
    return opened(data, path, remedy)


def opened(data: dict[str, Any], path: Path, remedy: str) -> dict[str, Any]:
    """What a sealed object holds.

    Raises: DamageError when its seal does not fit.
    """
    record = {name: value for name, value in data.items() if name != SEAL}
    seal = data[SEAL]
    sums = seal.get("files") if isinstance(seal, dict) else None
    if not isinstance(sums, dict) or seal.get("digest") != digest([record, sums]):
        raise DamageError(f"{path} was changed after it was written: {remedy}")
    return record


def check_object(data: Any, path: Path, remedy: str) -> None:
    """Raises: DamageError when parsed JSON is no object."""
    if not isinstance(data, dict):
        raise DamageError(f"{path} holds no names and values: {remedy}")


def sums_of(path: Path) -> dict[str, str]:
    """The checksums of the files beside a sealed object, {} without a seal; see `read_sealed`."""
    data = read_json(path)
    return data[SEAL]["files"] if isinstance(data, dict) and SEAL in data else {}


def check_beside(path: Path, remedy: str = "delete it and run again") -> None:
    """Compares the files beside a sealed object with their checksums.

    Raises: DamageError naming the first that is missing or differs; what `read_sealed` raises.
    """
    read_sealed(path, remedy)
    for name, expected in sums_of(path).items():
        file = path.parent / name
        if not file.is_file():
            raise DamageError(f"{file} is missing: {remedy}")
        if sha256(file) != expected:
            raise DamageError(f"{file} does not match its checksum: {remedy}")


def intact(path: Path) -> bool:
    """Whether a sealed object is there with all of its files; damage is told on stderr, and what
    is damaged is then made again."""
    if not path.is_file():
        return False
    try:
        check_beside(path, "it is made again")
    except (DamageError, SourceError) as error:
        print(error, file=sys.stderr)
        return False
    return True
