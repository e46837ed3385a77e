"""Safetensors files of others: what a header says is compared before anything is allocated.

The reader itself refuses a header whose offsets do not fit the file; a tensor without values is
refused here, because its other sizes could be anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.errors import SaelabError

if TYPE_CHECKING:
    from torch import Tensor


def shapes(path: Path, error: type[SaelabError], remedy: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape, from the header alone; raises `error` as `read_weights`."""
    return _read(path, error, remedy, lambda file, name: tuple(file.get_slice(name).get_shape()))


def read_weights(path: Path, error: type[SaelabError], remedy: str) -> dict[str, Tensor]:
    """Name -> tensor, none of them empty.

    Raises: `error` when the file is missing, no safetensors file, or cut off.
    """
    shapes(path, error, remedy)
    return _read(path, error, remedy, lambda file, name: file.get_tensor(name))


def _read(path: Path, error: type[SaelabError], remedy: str, take: Any) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in (names := list(file.keys())):
                if 0 in (shape := file.get_slice(name).get_shape()):
                    raise error(f"{path}: {name} of shape {shape} holds no value: {remedy}")
            return {name: take(file, name) for name in names}
    except FileNotFoundError:
        raise error(f"{path} does not exist: {remedy}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as found:
        reason = (str(found).strip() or type(found).__name__).splitlines()[0][:200]
        raise error(f"{path} can't be read: no safetensors file ({reason}): {remedy}") from None
