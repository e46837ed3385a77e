"""One safetensors file of tensors whose latents are split over ranks.

The file is the one that a single process writes, whatever the number of ranks: each rank's rows go
through the first rank into their place, one rank after the other, and each rank reads only its own
rows. No rank holds a whole tensor [d_sae, d_in].
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from saelab.distributed.ranks import ALONE, Ranks
from saelab.storage.atomic import write_atomically

#: Names of dtypes in safetensors, in the order of tensors within a file.
KINDS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in KINDS.items()}


@dataclass(frozen=True)
class Shards:
    """Distribution of tensors over the ranks.

    Args:
        split: names of the tensors with one entry, or row, per latent.
        d_sae: number of latents of all ranks together.
        ranks: the ranks, each with its own latents.
    """

    split: frozenset[str] = frozenset()
    d_sae: int = 0
    ranks: Ranks = ALONE

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> str:
        """Writes one file; every rank calls it with its tensors, under the same names.

        Returns: on the first rank the file's sha256, '' on the others.
        Raises: KeyError for a dtype that has no name.
        """
        places = {dtype: place for place, dtype in enumerate(KINDS)}
        names = sorted(tensors, key=lambda name: (places[tensors[name].dtype], name))
        parts = (part for name in names for part in self._parts(name, tensors[name].detach()))
        if not self.ranks.first:
            assert not list(parts)  # they are sent: only the first rank receives any
            return ""
        content = hashlib.sha256()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for piece in itertools.chain([self._header(names, tensors)], map(_bytes, parts)):
                    content.update(piece)
                    file.write(piece)

        write_atomically(path, write)
        return content.hexdigest()

    def read(self, path: Path) -> dict[str, Tensor]:
        """Reads this rank's part of a file's tensors, on the CPU."""
        if self.ranks.latents == 1:
            return load_file(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            return {
                name: self._read(file, 8 + size, name in self.split, entry)
                for name, entry in header.items()
            }

    def _read(self, file: BinaryIO, start: int, split: bool, entry: dict[str, Any]) -> Tensor:
        """Reads a tensor, or this rank's rows of it, and no other bytes."""
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if split:
            local, row = self.ranks.own(self.d_sae), (end - begin) // self.d_sae
            shape = [local.stop - local.start, *shape[1:]]
            begin, end = begin + local.start * row, begin + local.stop * row
        file.seek(start + begin)
        content = bytearray(file.read(end - begin))
        if not content:
            return torch.empty(shape, dtype=DTYPES[entry["dtype"]])
        return torch.frombuffer(content, dtype=DTYPES[entry["dtype"]]).view(shape)

    def _parts(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        """Yields the parts of the whole tensor in order on the first rank; the others send them."""
        if name in self.split and self.ranks.latents > 1:
            slices = [self.ranks.own(self.d_sae, part) for part in range(self.ranks.latents)]
            shapes = [torch.Size([s.stop - s.start, *tensor.shape[1:]]) for s in slices]
            yield from self.ranks.send_to_first(tensor, shapes)
        elif self.ranks.first:
            yield tensor

    def _header(self, names: list[str], tensors: Mapping[str, Tensor]) -> bytes:
        header, end = {}, 0
        for name in names:
            tensor, shape = tensors[name], list(tensors[name].shape)
            if name in self.split:
                shape[0] = self.d_sae
            begin, end = end, end + torch.Size(shape).numel() * tensor.element_size()
            kind = KINDS[tensor.dtype]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


#: Distribution of the tensors of a single process.
WHOLE = Shards()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
