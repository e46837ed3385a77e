"""metrics.jsonl of a run folder: one JSON object a line, added while the run is going on.

A line is written whole, in one write, so that a reader never sees a part of one. Only a process
that dies in the middle of a write can leave half a line; it is passed over, and the next launch
begins a new line after it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saelab.storage.atomic import explain_write_errors

NAME = "metrics.jsonl"


def finite(value: Any) -> Any:
    """The same data with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Adds lines to a file; the file and its folder are made by the first line.

    Raises: WriteError when the disk is full or the folder can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(finite(line), allow_nan=False, separators=(", ", ": "))
        with explain_write_errors(self.path):
            if self._file is None:
                self._file = self._open()
            os.write(self._file, text.encode() + b"\n")

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
        return file

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Tail:
    """Reads what was added to a file since the last look, in whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place, self._rest = 0, b""

    def lines(self) -> Iterator[dict[str, Any]]:
        """The new lines; a damaged one is left out.

        Raises: FileNotFoundError when the file is no longer there.
        """
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._place:  # another file under its name
                self._place, self._rest = 0, b""
            file.seek(self._place)
            added = file.read()
        self._place += len(added)
        *whole, self._rest = (self._rest + added).split(b"\n")
        for text in whole:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line
