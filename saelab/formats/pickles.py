"""Pickled state dicts: only tensors are unpickled, so no code of a file is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SourceError
from saelab.formats.base import floats

REMEDY = "save the SAE's state dict"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a pickled state dict, floats as float32.

    Raises: SourceError when the file is missing, or holds more than tensors or larger ones than its
        own size.
    """
    tensors, _ = read_with_settings(path, ())
    return tensors


def read_with_settings(
    path: Path, settings: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors of a pickled state dict, and the plain values next to them.

    Args:
        settings: the names that may hold something other than a tensor: texts, numbers, and
            dictionaries of them, all that `torch.load(weights_only=True)` admits besides tensors.

    Returns: the tensors as `read_state_dict`, and the values of the settings that there are.
    Raises: SourceError as `read_state_dict`.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: name the folder of a saved SAE") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error).splitlines() or ["it is empty"])[0][:200]
        remedy = f"only tensors are unpickled, so {REMEDY}"
        raise SourceError(f"{path} can't be read ({reason}): {remedy}") from None
    if not isinstance(loaded, dict):
        raise SourceError(f"{path} is not a state dict: {REMEDY}")
    values = {name: value for name, value in loaded.items() if name in settings}
    tensors = {str(name): value for name, value in loaded.items() if name not in settings}
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise SourceError(f"{path} is not a state dict: {REMEDY}")
    size = path.stat().st_size
    for name, t in tensors.items():
        if t.layout != torch.strided or not 0 < t.numel() * t.element_size() <= size:
            raise SourceError(f"{path}: {name} is larger than the file, or empty: {REMEDY}")
    return floats(tensors), values


def the_file(path: Path, pattern: str) -> tuple[Path, re.Match[str]]:
    """Returns the file of an SAE whose name says what it is, and the match of its name.

    Args:
        path: the file, or a folder that holds one such file.
        pattern: regular expression of the whole name.

    Raises: SourceError when there is no such file, or there are several.
    """
    if path.is_dir():
        matches = [(file, m) for file in sorted(path.iterdir()) if (m := _match(file, pattern))]
    else:
        match = _match(path, pattern)
        matches = [(path, match)] if match else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(file.name for file, _ in matches[:4]) + ", ..." * (len(matches) > 4)
        raise SourceError(f"{path} holds several SAEs ({names}): name one of these files")
    problem = "has no such file" if path.is_dir() else "has another name, or does not exist"
    remedy = "name the file of the SAE, as its repository names it"
    raise SourceError(f"{path} {problem} (its name should match {pattern}): {remedy}")


def _match(file: Path, pattern: str) -> re.Match[str] | None:
    return re.fullmatch(pattern, file.name) if file.is_file() else None
