"""Language models of packages as folders that every reader of models takes.

The GGUF file of a package is read once (`gguf_reading.py`). The folder that comes out holds
config.json, tokenizer, model.safetensors and source.json, which says where the weights are from:

    package, version, file, sha256    of the GGUF file
    model, licence                    for packages of the catalogue
    quantisation                      type of storage -> number of weights
    dtype, read_with                  of the stored weights; versions of the libraries

It appears under its name when it is complete. `saelab lm import` makes one anywhere; for
`model.path = "package:..."` it lies in the cache of models, which all studies share.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saelab.data.packaged.catalogue import CATALOGUE
from saelab.data.packaged.gguf_reading import check_library, convert
from saelab.data.packaged.installed import InstalledFile, install_command, installed_file
from saelab.errors import DamageError, SettingError, SourceError
from saelab.runtime.system import link_or_copy_file
from saelab.storage.atomic import (
    explain_write_errors,
    parse_json,
    read_sealed,
    sha256,
    write_sealed,
)
from saelab.storage.cache import models_folder
from saelab.storage.lock import lock_folder, wait_for_lock

#: File of a model's folder that says where its weights are from.
SOURCE = "source.json"
#: Version of what is made of a GGUF file; another one makes it again.
VERSION = 1
#: Seconds that a process waits while another reads the same file: a large vocabulary on a busy core
#: takes minutes.
PATIENCE = 1800.0
#: Bytes that are copied at a time.
_BLOCK = 2**20
#: Fields of source.json that `describe` needs.
_TEXTS = ("package", "version", "file", "sha256")


def cached_model(package: str) -> Path | None:
    """Returns the folder of a package's model in the cache, after it has been made if necessary.

    Returns None where the package is not installed or has no GGUF file. A model of the catalogue
    that lies in the cache is used whether or not its package is still installed.

    Raises: SourceError when the package, its file or the library `gguf` is not as needed.
    """
    model = CATALOGUE.get(package)
    if model is not None:
        folder = _place(model.package, model.version, model.sha256)
        if _is_complete(folder, model.sha256):
            return folder
    installed = installed_file(package)
    if installed is None:
        return None
    checksum = installed.sha256 or sha256(installed.parts[0])
    version = model.version if model is not None else installed.version
    folder = _place(package, version, checksum)
    if not _is_complete(folder, checksum):
        with wait_for_lock(folder, f"is reading package:{package}", PATIENCE):
            if not _is_complete(folder, checksum):
                shutil.rmtree(folder, ignore_errors=True)
                _make(package, installed, folder)
    return folder


def import_model(package: str, out: Path) -> bool:
    """Writes the model of an installed package into a folder.

    Args:
        package: its name, without 'package:'.
        out: new or empty; or a folder that holds this model already, which is left as it is.

    Returns: whether anything was written.
    Raises: SettingError for another folder, SourceError as `cached_model`.
    """
    installed = installed_file(package)
    if installed is None:
        raise SourceError(missing_package(package))
    checksum = installed.sha256 or sha256(installed.parts[0])
    with lock_folder(out, f"is reading package:{package}"):
        if _is_complete(out, checksum):
            return False
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SettingError("--out", str(out), "exists and holds something else: name a new one")
        _make(package, installed, out)
    return True


def missing_package(package: str) -> str:
    """Returns the sentence for a package that is not installed or holds no model."""
    if package in CATALOGUE:
        remedy = f"{install_command(package)} brings it"
        return f"package {package!r} is not installed here: {remedy}, or name a folder"
    names = ", ".join(CATALOGUE)
    return (
        f"package {package!r} is not installed here or holds no GGUF file: install it, or name one "
        f"that saelab lm install brings ({names})"
    )


def model_source(folder: Path) -> dict[str, Any]:
    """Returns the content of source.json in a model's folder; {} where none can be read."""
    try:
        data = parse_json(folder / SOURCE)
    except (OSError, ValueError):
        return {}
    if not _is_source(data):
        return {}
    data.pop("digest", None)
    return data


def _is_source(data: Any) -> bool:
    return isinstance(data, Mapping) and all(isinstance(data.get(key), str) for key in _TEXTS)


def describe_source(source: Any) -> str:
    """Returns one sentence about the content of source.json: which model, and how exact it is.

    Returns '' for anything else.
    """
    if not _is_source(source):
        return ""
    place = (
        f"{source.get('model') or source['file']}, from package {source['package']} "
        f"{source['version']}"
    )
    types = source.get("quantisation")
    names = [str(name) for name in types] if isinstance(types, Mapping) else []
    bits = {name: int(match[1]) for name in names if (match := _BITS.match(name))}
    quantised = {name: width for name, width in bits.items() if width < 16}
    if not quantised:
        return place
    lowest, highest = min(quantised.values()), max(quantised.values())
    span = f"{lowest}-bit" if lowest == highest else f"{lowest}- to {highest}-bit"
    return f"{place}; {span} weights ({', '.join(quantised)}) dequantised to {source.get('dtype')}"


#: Type of storage -> bits of a weight: Q4_1, IQ4_NL, Q6_K, TQ2_0, F16.
_BITS = re.compile(r"[A-Z]+(\d{1,3})")


def _place(package: str, version: str, checksum: str) -> Path:
    """Returns the folder of a model in the cache."""
    return models_folder() / f"{package}-{version}-{checksum[:12]}-v{VERSION}"


def _is_complete(folder: Path, checksum: str) -> bool:
    """Returns whether a folder holds the model of the GGUF file with this checksum."""
    if not (folder / SOURCE).is_file():
        return False
    try:
        source = read_sealed(folder / SOURCE, "it is made again now")
    except (DamageError, SourceError) as error:
        print(error, file=sys.stderr)
        return False
    weights = folder / "model.safetensors"
    size = weights.stat().st_size if weights.is_file() else -1
    return source.get("sha256") == checksum and source.get("bytes") == size


def _make(package: str, installed: InstalledFile, folder: Path) -> None:
    """Reads the GGUF file of a package, and puts the finished model's folder in its place."""
    check_library()
    model = CATALOGUE.get(package)
    print(f"reading {installed.name} of package {package}, once (minutes)", file=sys.stderr)
    with explain_write_errors(folder), _new_folder(folder) as fresh:
        gguf = fresh / "gguf" / installed.name
        gguf.parent.mkdir()
        checksum = _collect(installed, gguf)
        if installed.sha256 not in (None, checksum):
            raise SourceError(
                f"{installed.name} of package {package} {installed.version} has the SHA-256 "
                f"{checksum[:16]}..., expected {str(installed.sha256)[:16]}...: "
                f"{install_command(package)} installs it again"
            )
        facts = convert(gguf, fresh)
        shutil.rmtree(gguf.parent)
        source = {
            "package": installed.package,
            "version": installed.version,
            "file": installed.name,
            "sha256": checksum,
            "bytes": (fresh / "model.safetensors").stat().st_size,
        }
        if model is not None:
            source |= {"model": model.model, "licence": model.licence}
        write_sealed(fresh / SOURCE, source | facts)


def _collect(installed: InstalledFile, target: Path) -> str:
    """Puts the file at `target`, as a link where it is whole, and returns its SHA-256."""
    if len(installed.parts) == 1:
        link_or_copy_file(installed.parts[0].resolve(), target)
        return sha256(target)
    content = hashlib.sha256()
    with target.open("wb") as whole:
        for part in installed.parts:
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    content.update(block)
                    whole.write(block)
    return content.hexdigest()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes `folder` at the end, or is removed after an error.

    The caller holds the lock of `folder`, so what a killed process left of it is removed first.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
