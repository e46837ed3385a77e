"""A cell of the cache is finished with its `cell.json`, written last: a sealed record with the
cell's content hash, which is its folder's name, and the checksums of all other files in there."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from saelab.errors import DamageError
from saelab.storage.atomic import check_key, read_sealed, remove_leftovers, sha256, write_sealed

FILE = "cell.json"


def finish(folder: Path, record: dict[str, Any], names: Collection[str] = ()) -> None:
    """Writes the record of a cell whose other files are there.

    Args:
        names: of those files; any other in the folder is of another cell, and is removed.
    """
    remove_leftovers(folder)
    for file in folder.glob("[!.]*"):
        if file.name not in (FILE, *names):
            file.unlink()
    sums = {name: sha256(folder / name) for name in sorted(names)}
    write_sealed(folder / FILE, record | {"key": folder.name, "sha256": sums})


def is_finished(folder: Path) -> bool:
    """Returns True if the cell can be used; one that is damaged, or in the folder of another cell,
    is named on stderr and is unfinished."""
    if not (folder / FILE).is_file():
        return False
    try:
        record = read_sealed(folder / FILE)
        check_key(record.get("key"), folder.name, folder / FILE)
        for name, checksum in record["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != checksum:
                raise DamageError(f"{folder / name} does not match its checksum")
    except DamageError as error:
        print(f"{error} (the cell is made again now)", file=sys.stderr)
        (folder / FILE).unlink()
        return False
    return True
