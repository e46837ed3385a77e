"""NumPy archives (.npz) that others wrote: only numbers are read, so no code of a file is run."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saelab.errors import SourceError

REMEDY = "save the SAE's arrays again with numpy.savez"
#: An archive may unpack to so many times its own size. Weights hardly shrink; a file that was made
#: to fill the memory shrinks a thousandfold.
MOST_UNPACKED = 20


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Reads the arrays of an archive, floats as float32.

    Raises: SourceError when the file is missing or damaged, unpacks to far more than its size, or
        holds anything but numbers.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist: name the directory of a saved SAE")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MOST_UNPACKED * path.stat().st_size:
            raise SourceError(f"{path} unpacks to {unpacked} bytes, more than weights do: {REMEDY}")
        with np.load(path, allow_pickle=False) as data:  # objects raise ValueError
            arrays = {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        message = f"{path} can't be read ({reason}): only numbers are read, so {REMEDY}"
        raise SourceError(message) from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or array.size == 0:
            problem = f"{name} has the dtype {array.dtype} and the shape {list(array.shape)}"
            raise SourceError(f"{path}: {problem}, not numbers: {REMEDY}")
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> Tensor:
    """Converts an array to a tensor that does not share its memory."""
    floating = array.dtype.kind == "f"
    return torch.from_numpy(array.astype(np.float32) if floating else array.copy())
