"""Shared code of the readers of published SAEs.

Repositories say in the names of files and folders what the files themselves do not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from saelab.errors import SourceError
from saelab.formats.base import LinearNames, Loaded, shape_errors_as_source_error, take
from saelab.formats.pickles import read_state_dict, the_file
from saelab.origin import Origin

#: Folder of a repository in the cache of huggingface_hub, and the folder of one version below it.
_HUB = re.compile(r"models--([^/]+)/snapshots/[^/]+")


def place(path: Path) -> str:
    """Returns the absolute path, with links as they are named, as repository and folders in it.

    The hub's cache names `owner/name` as `models--owner--name/snapshots/VERSION`.
    """
    whole = path.resolve() if ".." in path.parts else path.absolute()
    return _HUB.sub(lambda match: match[1].replace("--", "/"), whole.as_posix())


def last_match(pattern: str, path: Path) -> re.Match[str] | None:
    """Returns the match of a regular expression that is nearest to the end of `place(path)`."""
    matches = list(re.finditer(pattern, place(path)))
    return matches[-1] if matches else None


def yaml_texts(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Reads named texts and numbers at the top level of a YAML file, and nothing else of it.

    Returns: the values that are there, without quotes; none without a file.
    Raises: SourceError when the file is not text.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"{path} is not text: save it as UTF-8") from None
    values = {}
    for name in names:
        line = rf"""^{re.escape(name)}[ \t]*:[ \t]+("[^"\n]*"|'[^'\n]*'|[^\s#"']+)[ \t]*(?:#.*)?$"""
        if match := re.search(line, text, re.MULTILINE):
            values[name] = match[1].strip("\"'")
    return values


def block_output(layer: int | str) -> str:
    """Returns the hook point of a block's output."""
    return f"blocks.{layer}.hook_resid_post"


def load_linear_file(path: Path, pattern: str, names: LinearNames, owner: str) -> Loaded:
    """Loads the pickled state dict of a ReLU SAE that is not centred.

    Args:
        path: the file, or a folder that holds one.
        pattern: regular expression of the file's name; its groups are the model and the block.
        names: the four tensors, which must be all there are.
        owner: of the model's repository.

    Raises: SourceError when the file is not that of such an SAE.
    """
    file, name = the_file(path, pattern)
    tensors = take(read_state_dict(file), names.all, file)
    with shape_errors_as_source_error(file):
        plain = names.plain(tensors).validate(file)
    return Loaded(plain.build(), Origin(f"{owner}/{name[1]}", block_output(name[2])), {})
