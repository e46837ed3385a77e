"""The one reader of files that are small by their nature: settings, JSON and ledgers.

A path may name anything. It is opened without waiting, so that a pipe that nobody writes to is
refused; only a regular file is read, up to a limit; text is UTF-8 whatever the locale says.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.runtime.system import BINARY, NO_LINK, NO_WAIT

#: Largest settings file, in bytes. Our choice: the longest of ours has 3 kB.
MOST_SETTINGS = 2**20
#: Deepest nesting of data in a file. Our choice: ours are at most 8 levels deep.
MOST_DEPTH = 50
#: Flags of `os.open`: a link is refused and a pipe is not waited for.
NOT_FOLLOWED = NO_LINK | NO_WAIT | BINARY
READ_AT_ONCE = os.O_RDONLY | NO_WAIT | BINARY


def read_small_file(path: Path, most: int) -> bytes:
    """Reads a whole regular file.

    Args:
        most: its largest size in bytes.

    Raises: OSError when it can't be opened or is not a regular file; ValueError when it is larger.
    """
    with os.fdopen(check_regular(os.open(path, READ_AT_ONCE), path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is over {most / 2**20:g} MB")
    return content


def check_regular(handle: int, path: Path) -> int:
    """Returns the descriptor of an open file; closes it if it is not that of a regular file.

    Raises: OSError when it is a folder, a pipe, a socket or a device.
    """
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise OSError(errno.ENXIO, "it is a pipe or a device, not a file", str(path))


def read_small_text(path: Path, most: int = MOST_SETTINGS) -> str:
    """Reads a whole text file as UTF-8; a byte order mark at its start is left out.

    Raises: as `read_small_file`; ValueError for bytes that are not UTF-8.
    """
    return read_small_file(path, most).decode("utf-8-sig")


def check_depth(data: Any) -> None:
    """Raises: ValueError when data are nested more than `MOST_DEPTH` levels deep."""
    level = [data] if isinstance(data, (Mapping, list)) else []
    for _ in range(MOST_DEPTH):
        items = (node.values() if isinstance(node, Mapping) else node for node in level)
        level = [item for node in items for item in node if isinstance(item, (Mapping, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")


def is_unicode(text: str) -> bool:
    """Says whether UTF-8 can hold a text: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_characters(data: Any, content: bytes) -> None:
    r"""Refuses data with half a surrogate pair, which JSON can write as "\ud800".

    Args:
        data: as parsed from JSON.
        content: the JSON, which has such a half only as an escape.

    Raises: ValueError.
    """
    if b"\\u" in content and not is_unicode(json.dumps(data, ensure_ascii=False)):
        raise ValueError("it holds half a character (a surrogate)")
