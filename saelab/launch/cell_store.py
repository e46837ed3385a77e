"""A cell of the cache is finished with its `cell.json`, written last: a sealed record with the
checksums of all other files in its folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from saelab.errors import DamageError
from saelab.storage.atomic import read_sealed, remove_leftovers, sha256, write_sealed

FILE = "cell.json"


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record of a cell whose other files are there."""
    remove_leftovers(folder)
    names = sorted(f.name for f in folder.glob("[!.]*") if f.name != FILE)
    write_sealed(folder / FILE, record | {"sha256": {n: sha256(folder / n) for n in names}})


def is_finished(folder: Path) -> bool:
    """Returns True if the cell can be used; a damaged one is named on stderr and is unfinished."""
    if not (folder / FILE).is_file():
        return False
    try:
        for name, checksum in read_sealed(folder / FILE)["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != checksum:
                raise DamageError(f"{folder / name} does not match its checksum")
    except DamageError as error:
        print(f"{error} (the cell is made again now)", file=sys.stderr)
        (folder / FILE).unlink()
        return False
    return True
