"""GGUF files of installed packages, located by the packages' records; no package is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from saelab.data.packaged.catalogue import CATALOGUE, PackagedModel
from saelab.errors import SourceError

#: Ending of the files that are read.
SUFFIX = ".gguf"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class InstalledFile:
    """A GGUF file of an installed package.

    Args:
        package: name of the package as its record has it.
        version: its version.
        name: name of the file.
        parts: the files whose contents make it up, in order; a single one where it is whole.
        sha256: the checksum that it must have; None for a package that is not in the catalogue.
    """

    package: str
    version: str
    name: str
    parts: tuple[Path, ...]
    sha256: str | None


def installed_file(package: str) -> InstalledFile | None:
    """Returns the GGUF file of an installed package; None where there is no package or no file.

    Raises: SourceError when the package has several GGUF files, or a part of the file is missing.
    """
    model, record = CATALOGUE.get(package), _record(package)
    if record is None:
        return None
    if model is not None:
        return _catalogued_file(model, record)
    files = [file for file in _files(record) if file.suffix == SUFFIX]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise SourceError(
            f"package {package!r} holds {len(files)} GGUF files ({names}), one is needed: name the "
            "folder of a model"
        )
    if not files:
        return None
    return InstalledFile(
        package=record.metadata["Name"],
        version=record.version,
        name=files[0].name,
        parts=(files[0],),
        sha256=None,
    )


def install_command(package: str) -> str:
    """Returns the command that installs a package of the catalogue."""
    return f"saelab lm install {package}"


def _catalogued_file(model: PackagedModel, record: Distribution) -> InstalledFile:
    parts = [_only_file(model, record, model.file)] if not model.parts else []
    for number, name in enumerate(model.parts):
        parts.append(_only_file(model, _record(name), f"{model.file}.part{number:02d}", name))
    return InstalledFile(
        package=record.metadata["Name"],
        version=record.version,
        name=model.file,
        parts=tuple(parts),
        sha256=model.sha256,
    )


def _only_file(
    model: PackagedModel, record: Distribution | None, name: str, package: str = ""
) -> Path:
    remedy = f"{install_command(model.package)} installs it"
    package = package or model.package
    if record is None:
        raise SourceError(
            f"package {package!r}, a part of {model.package!r}, is not installed here: {remedy}"
        )
    file = next((file for file in _files(record) if file.name == name), None)
    if file is None:
        raise SourceError(f"package {package!r} {record.version} lacks the file {name}: {remedy}")
    return file


def _record(package: str) -> Distribution | None:
    """Returns what is recorded about an installed package; None without one."""
    if not _NAME.fullmatch(package):
        return None
    try:
        return distribution(package)
    except PackageNotFoundError:
        return None


def _files(record: Distribution) -> Iterator[Path]:
    """Yields the regular files of a package that lie in the folder into which it was installed."""
    root = Path(str(record.locate_file(""))).resolve()
    for entry in record.files or ():
        path = Path(str(record.locate_file(entry)))
        if path.resolve().is_relative_to(root) and path.is_file():
            yield path
