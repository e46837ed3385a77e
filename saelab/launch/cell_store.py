"""A cell of the cache is finished with its `cell.json`, written last: a sealed record with the
cell's content hash, which is its folder's name, and the checksums of all other files in there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from saelab.errors import DamageError
from saelab.storage.atomic import check_key, read_sealed, remove_leftovers, sha256, write_sealed

FILE = "cell.json"


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record of a cell whose other files are there."""
    remove_leftovers(folder)
    names = sorted(f.name for f in folder.glob("[!.]*") if f.name != FILE)
    sums = {name: sha256(folder / name) for name in names}
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
