"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saelab.errors import SourceError
from saelab.storage.atomic import explain_write_errors


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes `out` at the end, or is removed after an error.

    Raises: SourceError when `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SourceError(f"{out} exists and is not empty: name a new folder")
    fresh = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        with explain_write_errors(out):
            fresh.mkdir(parents=True)
        yield fresh
        with explain_write_errors(out):
            fresh.replace(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
