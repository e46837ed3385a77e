"""Layout of the cache next to plan.toml and of the folder of a run.

.saelab/activations/<key>/     harvested activations            (SAELAB_CACHE names another cache)
.saelab/probing/<key>/         activations of the probing texts
.saelab/cells/<key>/           finished cells, by content hash
.saelab/pairs/                 comparisons of finished cells
.saelab/resume/<key>/          checkpoints of cells in training, deleted when the cell is finished
.saelab/logs/                  stderr of the workers
run_i/                         final_info.json, manifest.json, metrics.parquet, curves.parquet,
                               summary.md, cells/<arm>/seed<s>-l0_<level>/
run_i/metrics.jsonl            written while the launch runs; with it alone a run is not complete

If SAELAB_CACHE is a URL (s3://bucket/prefix), activations are stored and read there only; probing
activations, finished cells and the checkpoints of cells in training are copied to it when they are
made, and from it if another machine has made them. Everything else stays in .saelab. The last
object of a finished folder, `files.json`, lists its files with the checksum of each.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from saelab.errors import DamageError
from saelab.storage.atomic import read_sealed, sha256, write_atomically, write_sealed
from saelab.storage.remote import Place, Remote, place_of

if TYPE_CHECKING:
    from importlib.metadata import PackagePath

#: The folder of the package.
PACKAGE = Path(__file__).parents[1]
#: Parts of the package whose change never alters a number: folders and modules, by their path.
NO_NUMBERS = ("report", "formats", "progress", "__main__.py", "storage/remote.py")
#: The last object of a folder that was copied to a URL.
CONTENT = "files.json"
#: State of code that was not put in its place by an installer.
SOURCE_TREE = "a source tree, not a release"


def cache_folder(root: Path) -> Path:
    """Returns the cache of the study in `root`, on this machine."""
    configured = _configured_cache()
    return configured if isinstance(configured, Path) else root / ".saelab"


def remote_cache() -> Remote | None:
    """Returns the cache that machines share, if SAELAB_CACHE is a URL."""
    configured = _configured_cache()
    return configured if isinstance(configured, Remote) else None


def _configured_cache() -> Place | None:
    text = os.environ.get("SAELAB_CACHE")
    return place_of(text) if text else None


def activations_folder(cache: Path) -> Place:
    """Returns the folder of harvested activations, in the shared cache if there is one."""
    return (remote_cache() or cache) / "activations"


def has_activations(cache: Path) -> bool:
    """Returns whether any harvest is complete."""
    if (shared := remote_cache()) is not None:
        return shared.has("activations/*/*/header.json")
    return any(cache.glob("activations/*/*/header.json"))


def share(cache: Path, folder: Path) -> None:
    """Copies a finished folder of the cache to the shared one, if there is one."""
    twin = shared_twin(cache, folder)
    if twin is None or (twin / CONTENT).is_file():
        return
    files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file()]
    for file in files:
        (twin / file.name).put(file)
    write_sealed(twin / CONTENT, {"sha256": {file.name: sha256(file) for file in files}})


def fetch(cache: Path, folder: Path, last: str) -> bool:
    """Copies a folder of the cache from the shared one if needed; returns whether it is finished.

    An object that does not match its checksum is reported on stderr; the folder then counts as
    unfinished.

    Args:
        cache: the local cache.
        folder: a folder in it.
        last: name of the file without which the folder is not finished; it is copied last.
    """
    if (folder / last).is_file():
        return True
    twin = shared_twin(cache, folder)
    if twin is None or not (twin / CONTENT).is_file():
        return False
    try:
        content = _read_content(twin / CONTENT)
        for name in sorted(content, key=lambda name: name == last):
            write_atomically(folder / name, _copier(twin / name, content[name]))
    except (DamageError, FileNotFoundError) as error:
        print(f"{error} (the folder is made again now)", file=sys.stderr)
        (twin / CONTENT).unlink(missing_ok=True)
        return False
    return True


def _read_content(file: Remote) -> dict[str, str]:
    """Reads name -> checksum of the files that `share` has uploaded next to this one."""
    from saelab.storage.validation import Name, validate  # these load pydantic

    return validate(read_sealed(file).get("sha256"), dict[Name, str], file)


def _copier(source: Remote, checksum: str) -> Callable[[Path], object]:
    """Returns a function that downloads an object to a path and compares its checksum."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(source.read_bytes())
        if sha256(temporary) != checksum:
            raise DamageError(f"{source} does not match its checksum")

    return write


def shared_twin(cache: Path, folder: Path) -> Remote | None:
    """Returns the counterpart of a folder of the cache in the shared cache, if there is one."""
    shared = remote_cache()
    return None if shared is None else shared / folder.relative_to(cache).as_posix()


@functools.cache
def package_digest() -> str:
    """Returns a hash of the installed package's source; changed code never reuses old cells."""
    return _source_digest(PACKAGE)


def _source_digest(root: Path) -> str:
    content = hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.cpp")]):
        relative = file.relative_to(root).as_posix()
        if relative.split("/")[0] not in NO_NUMBERS and relative not in NO_NUMBERS:
            content.update(relative.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


@functools.cache
def package_state() -> str:
    """Compares the package's code with the checksums in its installer's RECORD.

    Returns: one phrase: as released, the files that differ, or `SOURCE_TREE`.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        released = distribution("saelab")
    except PackageNotFoundError:
        return SOURCE_TREE
    return _package_state(PACKAGE, released.files or ())


def _package_state(root: Path, files: Iterable[PackagePath]) -> str:
    released = {Path(file.locate()).resolve(): file.hash for file in files if file.hash}
    root = root.resolve()
    code = {file.resolve() for file in [*root.rglob("*.py"), *root.rglob("*.cpp")]}
    if not code & released.keys():
        return SOURCE_TREE
    missing = {file for file in released if file.is_relative_to(root) and not file.is_file()}
    edited = {f for f in code if _checksum(f) != getattr(released.get(f), "value", "")}
    names = sorted(file.relative_to(root).as_posix() for file in missing | edited)
    return f"differs from the released files: {', '.join(names)}" if names else "as released"


def _checksum(file: Path) -> str:
    """Returns a file's sha256 in the notation of RECORD (PEP 376)."""
    digest = hashlib.sha256(file.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a file of the cache into a run folder: a hard link where possible, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
