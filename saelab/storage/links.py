"""Files of a folder that are opened in that folder alone: a link in their place is refused.

A link would lead a reader to a file that nobody has checked, and a writer out of the folder. The
folder itself may be reached through links, since its user has named it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from saelab.errors import SourceError
from saelab.runtime.system import BINARY, NO_LINK


def inside(folder: Path, name: str | PurePath) -> Path:
    """Returns the path of a file in a folder.

    Raises: SourceError when a part of the path below the folder is a link.
    """
    path = folder
    for part in PurePath(name).parts:
        path = path / part
        if path.is_symlink():
            raise _refusal(path)
    return path


def refuse_links(folder: Path) -> None:
    """Raises: SourceError naming the first link in a folder, at any depth."""
    for path in _walk(folder):
        if path.is_symlink():
            raise _refusal(path)


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in sorted([*folders, *files]))


def open_plain(path: Path, flags: int) -> int:
    """Opens a file as `os.open` does, but through no link.

    Raises: SourceError when the path is a link.
    """
    try:
        return os.open(path, flags | NO_LINK | BINARY, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _refusal(path) from None
        raise


def _refusal(path: Path) -> SourceError:
    return SourceError(
        f"{path} is a link, and files of a run are opened in its own folder alone: "
        "put a copy of the file or folder in its place, or delete it"
    )
