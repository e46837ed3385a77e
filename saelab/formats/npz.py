"""NumPy archives (.npz) that others wrote: only numbers are read, so no code of a file is run."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from saelab.errors import SaelabError, SourceError

REMEDY = "save the SAE's arrays again with numpy.savez"
#: An archive may unpack to so many times its own size. Weights hardly shrink; a file that was made
#: to fill the memory shrinks a thousandfold.
MOST_UNPACKED = 20
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Reads the arrays of an archive, floats as float32.

    Raises: SourceError when the file is missing or damaged, unpacks to far more than its size, or
        holds anything but numbers.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist: name the directory of a saved SAE")
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path)
        with np.load(path, allow_pickle=False) as data:
            return {name: _tensor(data[name]) for name in data.files}
    except (SaelabError, MemoryError):
        raise
    except Exception as error:  # a damaged archive may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        message = f"{path} can't be read ({reason}): only numbers are read, so {REMEDY}"
        raise SourceError(message) from None


def _check(archive: zipfile.ZipFile, path: Path) -> None:
    """Checks all headers, before any array is allocated.

    Raises: SourceError for an array that is not of numbers, is empty, or has another size than its
        header says.
    """
    members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        raise SourceError(f"{path} unpacks to {unpacked} bytes, more than weights do: {REMEDY}")
    for member in members:
        with archive.open(member) as file:
            shape, _, dtype = HEADERS[npy.read_magic(file)](file)
            size = member.file_size - file.tell()
        name = member.filename.removesuffix(".npy")
        if dtype.kind not in "fiub":
            problem = f"{name} has the dtype {dtype}: only numbers are read"
            raise SourceError(f"{path}: {problem}, so {REMEDY}")
        if not size or math.prod(shape) * dtype.itemsize != size:
            problem = f"{name} of shape {list(shape)} and dtype {dtype} has {size} bytes"
            raise SourceError(f"{path} can't be read ({problem}): {REMEDY}")


def _tensor(array: np.ndarray) -> Tensor:
    """Converts an array to a tensor, floats to float32."""
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)
