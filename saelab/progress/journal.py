"""metrics.jsonl of a run folder: one JSON object per line, appended while the run goes on.

Each line is one write, so a reader never sees a part of it. Only a process that dies in the middle
of a write can leave half a line; readers skip it, and the next launch begins a new line after it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saelab.runtime.system import read_at
from saelab.storage.atomic import explain_write_errors
from saelab.storage.links import open_plain
from saelab.storage.small_files import check_characters

JOURNAL_FILE = "metrics.jsonl"


def replace_non_finite(value: Any) -> Any:
    """Returns a copy of the data with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {name: replace_non_finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Appends lines to a file; the first line creates the file and its folder.

    Raises: WriteError when the disk is full or the folder can't be written, SourceError for a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line; a number that is not finite becomes null."""
        text = json.dumps(replace_non_finite(line), allow_nan=False, separators=(", ", ": "))
        with explain_write_errors(self.path):
            if self._file is None:
                self._file = self._open()
            os.write(self._file, text.encode() + b"\n")

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open_plain(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        size = os.fstat(file).st_size
        if size and read_at(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
        return file

    def close(self) -> None:
        """Closes the file, if any line was written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Tail:
    """Reader of the whole lines that were added to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._rest = 0, b""

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields the new lines, without damaged ones.

        Raises: FileNotFoundError when the file no longer exists, SourceError for a link.
        """
        with os.fdopen(open_plain(self.path, os.O_RDONLY), "rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # another file of the same name
                self._offset, self._rest = 0, b""
            file.seek(self._offset)
            added = file.read()
        self._offset += len(added)
        *whole, self._rest = (self._rest + added).split(b"\n")
        for text in whole:
            try:
                line = json.loads(text)
                check_characters(line, text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line
