"""Tensors of which each rank holds some latents, in one safetensors file.

The file is the one that a single process writes, whatever the number of ranks: each rank's rows go
through the first rank into their place, one rank after the other, and each rank reads its own rows
alone. No rank holds a whole tensor [d_sae, d_in].
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from saelab.files import write_atomically
from saelab.ranks import Ranks

#: What safetensors calls the kinds of numbers, in its order within a file.
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


def write_shards(
    path: Path, tensors: Mapping[str, Tensor], split: Collection[str], d_sae: int, ranks: Ranks
) -> None:
    """Writes one file; every rank calls it with its tensors, under the same names.

    Args:
        split: names of the tensors that have one entry, or row, per latent.
        d_sae: number of latents of all ranks together.
    """
    order = list(KINDS)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    parts = (
        part
        for name in names
        for part in _parts(tensors[name].detach(), name in split, d_sae, ranks)
    )
    if not ranks.first:
        assert not list(parts)  # sends; only the first rank is given any
        return
    shapes = {name: _whole(tensors[name], name in split, d_sae) for name in names}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(_header({name: tensors[name] for name in names}, shapes))
            for part in parts:
                flat = part.cpu().contiguous().reshape(-1)
                file.write(memoryview(flat.view(torch.uint8).numpy()))

    write_atomically(path, write)


def read_shard(path: Path, split: Collection[str], d_sae: int, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of a file's tensors, on the CPU."""
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            own = name in split and ranks.latents > 1
            found[name] = file.get_slice(name)[ranks.own(d_sae)] if own else file.get_tensor(name)
    return found


def _whole(tensor: Tensor, split: bool, d_sae: int) -> list[int]:
    return [d_sae, *tensor.shape[1:]] if split else list(tensor.shape)


def _parts(tensor: Tensor, split: bool, d_sae: int, ranks: Ranks) -> Iterator[Tensor]:
    """On the first rank the parts of the whole tensor, in order; the others send theirs."""
    if split and ranks.latents > 1:
        own = [ranks.own(d_sae, part) for part in range(ranks.latents)]
        shapes = [torch.Size([o.stop - o.start, *tensor.shape[1:]]) for o in own]
        yield from ranks.send_to_first(tensor, shapes)
    elif ranks.first:
        yield tensor


def _header(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> bytes:
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + torch.Size(shapes[name]).numel() * tensor.element_size()
        kind = KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
