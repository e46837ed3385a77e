"""Places where things are kept: the cache beside plan.toml, and the folder of a run.

.saelab/activations/<key>/     harvested activations            (SAELAB_CACHE names another cache)
.saelab/probing/<key>/         activations of the probing texts
.saelab/cells/<key>/           finished cells, by content hash
.saelab/pairs/                 comparisons of finished cells
.saelab/resume/<key>/          checkpoints of cells in training, gone when the cell is finished
.saelab/logs/                  what workers wrote to stderr
run_i/                         final_info.json, manifest.json, metrics.parquet, curves.parquet,
                               summary.md, cells/<arm>/seed<s>-l0_<level>/
run_i/metrics.jsonl            written while the launch is going on; alone, it is no complete run

Models of packages lie where all studies find them, under `models/` of the folder that SAELAB_CACHE
names, else of ~/.cache/saelab ($XDG_CACHE_HOME/saelab).

Where SAELAB_CACHE is a URL (s3://bucket/prefix), activations lie there alone and are read from
there; probing activations, finished cells and the checkpoints of those in training are copied to it
when they are made, and from it when another machine has made them. Everything else stays in
.saelab. The last object of a finished folder, `files.json`, says what is in it, with the checksum
of each file.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from saelab.errors import DamageError, SettingError
from saelab.storage.atomic import check_key, read_sealed, sha256, write_atomically, write_sealed
from saelab.storage.remote import Place, Remote, place_of

if TYPE_CHECKING:
    from importlib.metadata import PackagePath

#: Variable that names another cache.
VARIABLE = "SAELAB_CACHE"
#: Form of a URL, and of a folder, which may not look like a URL that lacks a slash.
URL, NO_URL = r"[A-Za-z][A-Za-z0-9+.:-]*://", r"(?![A-Za-z][A-Za-z0-9+.-]+:/)"
#: Longest name of a folder or a file, in bytes, that usual file systems take.
LONGEST_PART = 255
#: The folder of the package.
PACKAGE = Path(__file__).parent.parent
#: Rooms and modules whose code can't alter a number in the cache, so that rewording them trains no
#: cell again. A worker loads none of them but `progress` (bars and lines on a terminal) and
#: `storage/remote.py` (moves bytes; what reads them compares checksums): tests/architecture.
NO_NUMBERS = (
    "__main__.py",
    "analysis",
    "api.py",
    "checks",
    "cli",
    "drivers",
    "formats",
    "preflight",
    "progress",
    "report",
    "storage/remote.py",
    "verdict",
)
#: The last object of a folder that was copied to a URL.
CONTENT = "files.json"
#: Said of code that no installer has put where it is.
SOURCE_TREE = "a source tree, not a release"


def cache_folder(root: Path) -> Path:
    """The cache of the study in `root`, on this machine.

    Raises: SettingError when something else lies in its place.
    """
    named = _named_cache()
    if isinstance(named, Path):
        return named
    folder = root / ".saelab"
    if obstacle := _obstacle(folder):
        raise SettingError("cache", str(folder), f"{obstacle}: move it away")
    return folder


def _obstacle(folder: Path) -> str:
    """Says why there can't be a folder at the path; "" if there can."""
    if any(len(os.fsencode(part)) > LONGEST_PART for part in folder.parts):
        return "has a name that is too long"
    for place in (folder, *folder.absolute().parents):
        if place.exists() or place.is_symlink():
            return "" if place.is_dir() else f"{place} is not a folder"
    return ""


def models_folder() -> Path:
    """Returns the folder for models that were made of packages; it need not exist.

    Raises: SettingError when SAELAB_CACHE names no place for a cache.
    """
    named = _named_cache()
    if isinstance(named, Path):
        return named / "models"
    caches = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(caches) if Path(caches).is_absolute() else Path.home() / ".cache"
    return root / "saelab" / "models"


def remote_cache() -> Remote | None:
    """The cache that machines share, where SAELAB_CACHE is a URL."""
    named = _named_cache()
    return named if isinstance(named, Remote) else None


def _named_cache() -> Place | None:
    """The place that SAELAB_CACHE names, None where it names none.

    Raises: SettingError when that can't be a cache.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    if not re.match(URL if "://" in named else NO_URL, named):
        raise SettingError(VARIABLE, named, "write a folder, or a URL as in s3://bucket/cache")
    place = place_of(named)
    if isinstance(place, Remote):
        return place
    try:
        place = place.expanduser()
        obstacle = _obstacle(place)
    except (OSError, RuntimeError) as error:  # no access, or no such user
        obstacle = getattr(error, "strerror", None) or str(error)
    if obstacle:
        raise SettingError(VARIABLE, named, f"{obstacle}: name a folder or a URL")
    return place


def check_cache() -> None:
    """Raises: SettingError or RemoteError when SAELAB_CACHE names no place for a cache."""
    if (shared := remote_cache()) is not None:
        shared.check()


def activations_folder(cache: Path) -> Place:
    """Returns the place of harvested activations: at the shared cache's URL, or in the cache."""
    return (remote_cache() or cache) / "activations"


def has_activations(cache: Path) -> bool:
    """Returns True if any harvest is complete."""
    if (shared := remote_cache()) is not None:
        return shared.has("activations/*/*/header.json")
    return any(cache.glob("activations/*/*/header.json"))


def share(cache: Path, folder: Path) -> None:
    """Copies a finished folder of the cache to the shared one, if there is one."""
    there = shared_twin(cache, folder)
    if there is None or (there / CONTENT).is_file():
        return
    files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file()]
    for file in files:
        (there / file.name).put(file)
    sums = {file.name: sha256(file) for file in files}
    write_sealed(there / CONTENT, {"key": _place_in_cache(cache, folder), "sha256": sums})


def fetch(cache: Path, folder: Path, last: str) -> bool:
    """Returns True if a folder of the cache is finished; copies it from the shared cache if there.

    An object that is not what was written is named on stderr, and the folder is not finished then.

    Args:
        last: the file without which the folder is not finished; it is put there last.
    """
    if (folder / last).is_file():
        return True
    there = shared_twin(cache, folder)
    if there is None or not (there / CONTENT).is_file():
        return False
    try:
        content = _content(there / CONTENT, _place_in_cache(cache, folder))
        for name in sorted(content, key=lambda name: name == last):
            write_atomically(folder / name, _copy(there / name, content[name]))
    except (DamageError, FileNotFoundError) as error:
        print(f"{error} (what was there is made again now)", file=sys.stderr)
        (there / CONTENT).unlink(missing_ok=True)
        return False
    return True


def _content(file: Remote, key: str) -> dict[str, str]:
    """Name -> checksum of what `share` put next to the file for the folder `key` of the cache."""
    from saelab.storage.validation import Name, validate  # which load pydantic

    content = read_sealed(file)
    check_key(content.get("key"), key, file)
    return validate(content.get("sha256"), dict[Name, str], file)


def _place_in_cache(cache: Path, folder: Path) -> str:
    """Returns the place of a folder in the cache, 'cells/0123456789abcdef'."""
    return folder.relative_to(cache).as_posix()


def _copy(source: Remote, checksum: str) -> Callable[[Path], object]:
    def write(temporary: Path) -> None:
        temporary.write_bytes(source.read_bytes())
        if sha256(temporary) != checksum:
            raise DamageError(f"{source} does not match its checksum")

    return write


def shared_twin(cache: Path, folder: Path) -> Remote | None:
    """The place of a folder of the cache in the shared one, if there is one."""
    shared = remote_cache()
    return None if shared is None else shared / _place_in_cache(cache, folder)


@functools.cache
def package_digest() -> str:
    """A hash of the installed package's source, so that changed code never reuses old cells."""
    return digest_of_code(PACKAGE)


def digest_of_code(root: Path) -> str:
    """Returns 16 hexadecimal digits for the code under `root` that can alter a number."""
    content = hashlib.sha256()
    for file in _code_files(root):
        name = file.relative_to(root).as_posix()
        if can_alter_numbers(name):
            content.update(name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


def can_alter_numbers(name: str) -> bool:
    """Returns True if a file of the package, 'storage/cache.py', counts for its digest."""
    return not any(name == room or name.startswith(f"{room}/") for room in NO_NUMBERS)


def _code_files(root: Path) -> list[Path]:
    return sorted([*root.rglob("*.py"), *root.rglob("*.cpp")])


@functools.cache
def package_state() -> str:
    """Checks whether the package's code is as released, by the checksums its installer kept."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        released = distribution("saelab")
    except PackageNotFoundError:
        return SOURCE_TREE
    return _package_state(PACKAGE, released.files or ())


def _package_state(root: Path, files: Iterable[PackagePath]) -> str:
    known = {Path(file.locate()).resolve(): file.hash for file in files if file.hash}
    code = {file.resolve() for file in _code_files(root)}
    if not code & known.keys():
        return SOURCE_TREE
    gone = {file for file in known if file.is_relative_to(root.resolve()) and not file.is_file()}
    off = gone | {file for file in code if _checksum(file) != getattr(known.get(file), "value", "")}
    names = ", ".join(sorted(file.relative_to(root.resolve()).as_posix() for file in off))
    return f"differs from the released files: {names}" if off else "as released"


def _checksum(file: Path) -> str:
    """Returns the checksum of a file in the form that RECORD holds (PEP 376)."""
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
