"""Readers of foreign safetensors files, which check the header before they allocate anything.

The library itself refuses a header whose offsets do not fit the file; a tensor without values is
refused here, because its other sizes could be anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.errors import SaelabError

if TYPE_CHECKING:
    from torch import Tensor


def read_shapes(path: Path, error: type[SaelabError], remedy: str) -> dict[str, tuple[int, ...]]:
    """Reads name -> shape from the header alone; raises `error` as `read_weights` does."""
    return _read(path, error, remedy, lambda file, name: tuple(file.get_slice(name).get_shape()))


def read_weights(path: Path, error: type[SaelabError], remedy: str) -> dict[str, Tensor]:
    """Reads name -> tensor; none of the tensors is empty.

    Raises: `error` when the file is missing, truncated, or not a safetensors file.
    """
    read_shapes(path, error, remedy)
    return _read(path, error, remedy, lambda file, name: file.get_tensor(name))


def parse_weights(
    data: bytes, where: object, error: type[SaelabError], remedy: str
) -> dict[str, Tensor]:
    """Parses the bytes of a safetensors file like `read_weights`; `where` names the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as cause:
        raise _read_error(where, cause, error, remedy) from None
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise _empty_error(where, name, list(tensor.shape), error, remedy)
    return tensors


def _read(path: Path, error: type[SaelabError], remedy: str, take: Any) -> dict[str, Any]:
    """Returns name -> take(file, name) for each tensor, none of which is empty."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in (names := list(file.keys())):
                if 0 in (shape := file.get_slice(name).get_shape()):
                    raise _empty_error(path, name, shape, error, remedy)
            return {name: take(file, name) for name in names}
    except FileNotFoundError:
        raise error(f"{path} does not exist: {remedy}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as cause:
        raise _read_error(path, cause, error, remedy) from None


def _empty_error(
    where: object, name: str, shape: list[int], error: type[SaelabError], remedy: str
) -> SaelabError:
    return error(f"{where}: {name} of shape {shape} holds no value: {remedy}")


def _read_error(
    where: object, cause: Exception, error: type[SaelabError], remedy: str
) -> SaelabError:
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
    return error(f"{where} can't be read: not a safetensors file ({reason}): {remedy}")
