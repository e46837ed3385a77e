"""Reader of activations that another tool has stored in a folder of safetensors files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.data.activations.read_ahead import ReadAhead
from saelab.data.activations.store import (
    FOREIGN_REASON,
    Shard,
    are_usable,
    source_digest,
    tensor_file_sizes,
)
from saelab.errors import SourceError
from saelab.storage.atomic import sha256
from saelab.storage.remote import Place, Remote
from saelab.storage.safetensors_file import parse_weights, read_weights

#: Rows checked at a time; bounds the memory.
CHECKED_ROWS = 65536
#: Types that activations are read in; other tools store them in these.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ForeignSource:
    """Folder of safetensors files of another tool, each with one tensor.

    The tensor has shape [n, d] or [contexts, positions, d]. Rows without contexts become contexts
    of one position. Every position counts.
    """

    def __init__(
        self, path: Place, files: dict[str, int], shapes: list[tuple[int, int, int]], ahead: int = 0
    ) -> None:
        self.path, self._shapes = path, shapes
        self._files = [path / name for name in files]
        self._ahead = ReadAhead(lambda i: self._files[i].read_bytes(), list(files.values()), ahead)
        positions = {shape[1] for shape in shapes}
        self.header: dict[str, Any] = {
            "model": None,
            "model_digest": None,
            "hook_name": None,
            "reason": FOREIGN_REASON,
            "folder": path.name,
            "context": max(positions),
            "d": shapes[0][2],
            "dtype": str(self.shard(0).x.dtype).removeprefix("torch."),
            "n_tokens": sum(contexts * length for contexts, length, _ in shapes),
        }

    @classmethod
    def open(cls, path: Place, ahead: int = 0) -> ForeignSource:
        """Opens the folder and checks every value.

        Args:
            path: the folder.
            ahead: bytes of files that may be read before they are requested, if it is a URL.

        Raises: SourceError naming the file with a wrong shape or type, or a value that is not
            finite.
        """
        files = dict(sorted(tensor_file_sizes(path).items()))
        if not files:
            raise SourceError(f"{path} holds no .safetensors file: name a folder with activations")
        shapes = []
        for file in (path / name for name in files):
            shapes.append(_check_tensor(file, _read_only_tensor(file)))
            if shapes[-1][2] != shapes[0][2]:
                raise SourceError(
                    f"{file} has d = {shapes[-1][2]}, but {next(iter(files))} has "
                    f"{shapes[0][2]}: put activations of one width into a folder"
                )
        return cls(path, files, shapes, ahead)

    @property
    def d(self) -> int:
        return self._shapes[0][2]

    @property
    def n_shards(self) -> int:
        return len(self._files)

    @property
    def shard_counts(self) -> list[int]:
        return [contexts * positions for contexts, positions, _ in self._shapes]

    @property
    def digest(self) -> str:
        return source_digest(self.header, self._hashes)

    @functools.cached_property
    def _hashes(self) -> list[str]:
        return [sha256(file) for file in self._files]

    def shard(self, i: int) -> Shard:
        shape = self._shapes[i]
        file = self._files[i]
        data = None if isinstance(file, Path) else self._ahead.get(i)
        x = _read_only_tensor(file, data).view(shape)
        return Shard(x, torch.ones(shape[:2], dtype=torch.bool))


def _read_only_tensor(file: Place, data: bytes | None = None) -> Tensor:
    """Reads the only tensor of a file, whose bytes may be given.

    Raises: SourceError when the file can't be read or has several tensors.
    """
    remedy = "save the activations again"
    if isinstance(file, Remote):
        tensors = parse_weights(
            file.read_bytes() if data is None else data, file, SourceError, remedy
        )
    else:
        tensors = read_weights(file, SourceError, remedy)
    if len(tensors) != 1:
        raise SourceError(f"{file} holds {len(tensors)} tensors: leave only the activations")
    return next(iter(tensors.values()))


def _check_tensor(file: Place, x: Tensor) -> tuple[int, int, int]:
    """Checks a file's tensor; returns its shape as (contexts, positions, d).

    Raises: SourceError for a wrong shape or type, or a value that is not finite or too large.
    """
    if x.dtype not in DTYPES or x.dim() not in (2, 3) or x.numel() == 0:
        kind = str(x.dtype).removeprefix("torch.")
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise SourceError(
            f"{file} holds {kind} {list(x.shape)}: activations are [n, d] or "
            f"[contexts, positions, d] of the type {types}, so convert them"
        )
    for i, part in enumerate(x.view(-1, x.shape[-1]).split(CHECKED_ROWS)):
        wrong = (~are_usable(part)).nonzero().flatten()
        if len(wrong):
            row = i * CHECKED_ROWS + int(wrong[0])
            finite = bool(part[wrong[0]].isfinite().all())
            problem = "values too large for float32" if finite else "values that are not finite"
            raise SourceError(f"{file} has {problem} in row {row}: remove or rescale them")
    contexts, positions = (x.shape[0], 1) if x.dim() == 2 else (x.shape[0], x.shape[1])
    return contexts, positions, x.shape[-1]
