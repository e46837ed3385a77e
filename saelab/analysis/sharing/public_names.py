"""Names without the places of this disk, for whatever is given to others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saelab.errors import SourceError

#: Two or more names after a root, as '/home/me/texts' or 'C:\\texts\\mine'; no part of a URL.
_ABSOLUTE = re.compile(
    r"(?<![\w.:/~\\-])(?:(?:~\w*)?/(?:[\w.@+~-]+/)+|~\w*/|[A-Za-z]:[\\/](?:[\w.@+~-]+[\\/])*)([\w.@+~-]*)"
)
WEIGHTS = ".safetensors"


def public(text: str) -> str:
    """Returns a text in which every absolute path is its last name."""
    for folder in _places():
        text = text.replace(f"{folder}/", "").replace(folder, Path(folder).name)
    return _ABSOLUTE.sub(lambda match: match[1], text)


def public_data(value: Any) -> Any:
    """Returns plain data whose texts, names of entries included, are `public`."""
    if isinstance(value, str):
        return public(value)
    if isinstance(value, dict):
        return {public_data(name): public_data(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_data(each) for each in value]
    return value


def check_folder(folder: Path) -> None:
    """Checks that no file in a folder names a place of this disk.

    Raises: SourceError, which names the file, for one that does.
    """
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        for text in (name, *_texts_of(file)):
            if public(text) != text:
                remedy = "nothing is sent: rename what names it in the settings"
                raise SourceError(f"{name} names a place of this disk ({text[:120]!r}); {remedy}")


def _texts_of(file: Path) -> Iterator[str]:
    """Yields the texts in a file: lines, the texts in JSON, and those in the header of weights."""
    if file.suffix == WEIGHTS:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            yield from _texts(json.loads(stream.read(size)))
    elif file.suffix == ".json":
        yield from _texts(json.loads(file.read_text(encoding="utf-8")))
    else:
        yield from file.read_text(encoding="utf-8").splitlines()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value if isinstance(value, (list, dict)) else ():
        yield from _texts(each)
    if isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)


def _places() -> list[str]:
    """Folders of this disk whose names are private: the home directory and where this runs."""
    folders = [Path.cwd(), Path.cwd().resolve(), Path.home(), Path.home().resolve()]
    return [str(folder) for folder in dict.fromkeys(folders) if len(folder.parts) > 2]
