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


def parse_weights(
    data: bytes, where: object, error: type[SaelabError], remedy: str
) -> dict[str, Tensor]:
    """`read_weights` of bytes that were read already; `where` names the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as found:
        raise _unreadable(where, found, error, remedy) from None
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise _empty(where, name, list(tensor.shape), error, remedy)
    return tensors


def _read(path: Path, error: type[SaelabError], remedy: str, take: Any) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in (names := list(file.keys())):
                if 0 in (shape := file.get_slice(name).get_shape()):
                    raise _empty(path, name, shape, error, remedy)
            return {name: take(file, name) for name in names}
    except FileNotFoundError:
        raise error(f"{path} does not exist: {remedy}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as found:
        raise _unreadable(path, found, error, remedy) from None


def _empty(
    where: object, name: str, shape: list[int], error: type[SaelabError], remedy: str
) -> SaelabError:
    return error(f"{where}: {name} of shape {shape} holds no value: {remedy}")


def _unreadable(
    where: object, found: Exception, error: type[SaelabError], remedy: str
) -> SaelabError:
    reason = (str(found).strip() or type(found).__name__).splitlines()[0][:200]
    return error(f"{where} can't be read: no safetensors file ({reason}): {remedy}")
