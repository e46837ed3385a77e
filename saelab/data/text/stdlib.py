"""Real text that every Python has: the source code of the interpreter's standard library.

It is read from the running interpreter and never copied. Test folders are left out, and so are
`encodings` (character tables) and `pydoc_data` (one generated literal of 750 KB). A hash of the
module path decides which third of the modules is held out, so the split is the same on every
machine and for every Python version:

    held out  <=>  int(sha256(path)[:8], 16) mod 3 == 0
"""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from saelab.errors import SourceError

#: Folders that do not belong to the corpus, by name, at any depth.
LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
    | {"encodings", "pydoc_data"}
)
#: One module in HELD_OUT_EVERY is held out.
HELD_OUT_EVERY = 3


@dataclass(frozen=True)
class Module:
    """One source file: `path` relative to the library, with forward slashes."""

    path: str
    text: str

    @property
    def family(self) -> str:
        """The top-level package ('asyncio'), or the module's own name ('argparse')."""
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def held_out(self) -> bool:
        """True for a module of the held-out split."""
        return is_held_out(self.path)


def path_hash(path: str, salt: str = "") -> int:
    """Returns a number in [0, 2^32) that depends only on the path and the salt."""
    return int(hashlib.sha256((salt + path).encode()).hexdigest()[:8], 16)


def is_held_out(path: str) -> bool:
    """Returns whether the module at the path belongs to the held-out split."""
    return path_hash(path) % HELD_OUT_EVERY == 0


@functools.cache
def modules() -> tuple[Module, ...]:
    """Reads all modules of the corpus, sorted by path.

    Raises: SourceError when the interpreter ships no readable library (a zipped or stripped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    library: list[Module] = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if LEFT_OUT.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            library.append(Module(relative.as_posix(), file.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, OSError):
            continue  # a few 2to3 fixtures are latin-1 on purpose
    if len(library) < 100:
        raise SourceError(
            f"the standard library of {sys.executable} holds only {len(library)} readable source "
            "files: use an interpreter that ships its library as .py files, or name another text"
        )
    return tuple(library)


def texts(split: str) -> list[str]:
    """Returns the texts of one split: 'train', 'held_out' or 'all'."""
    sides = {"train": (False,), "held_out": (True,), "all": (False, True)}[split]
    return [module.text for module in modules() if module.held_out in sides]


@functools.cache
def manifest() -> dict[str, object]:
    """Returns the corpus of this machine: Python version, files, bytes and a content hash."""
    digest = hashlib.sha256()
    size = 0
    for module in modules():
        data = module.text.encode()
        size += len(data)
        digest.update(module.path.encode() + b"\0" + hashlib.sha256(data).digest())
    return {
        "corpus": "python-stdlib",
        "python": ".".join(map(str, sys.version_info[:3])),
        "files": len(modules()),
        "held_out_files": sum(module.held_out for module in modules()),
        "bytes": size,
        "sha256": digest.hexdigest(),
    }
