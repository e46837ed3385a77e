"""The stream of batches: shards in a fixed order, each read in a permutation of the seed.

The permutation of buffer b for seed s comes from the named stream (s, 'data order', b) alone, so
all arms of a seed see the same batches, whatever else runs at the same time. A stream yields
`(batch, position)`; from a position the stream continues exactly with the next batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saelab.data.activations.joined import JoinedShard, target_rows
from saelab.data.activations.store import Source
from saelab.errors import SettingError
from saelab.seeding import torch_stream

Layout = Literal["rows", "contexts"]


@dataclass(frozen=True)
class Position:
    """State of a stream: the buffer (counted over epochs) and the next row or context in it."""

    buffer: int = 0
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of the whole contexts that a batch is of.

    Args:
        ids: int64 [contexts, positions].
        mask: bool [contexts, positions]; True where the position counts: in this order the rows of
            the batch.
    """

    ids: Tensor
    mask: Tensor


@dataclass(eq=False)
class Batch:
    """One batch of activations.

    Args:
        x: float32 [N, d] rows, or [contexts, positions, d].
        positions: token position of each vector in its context; int64, shape of x without d.
        mask: bool of the same shape, False where a vector does not count; None when all count.
        segments: of rows that came in contexts: which run of tokens without a gap each belongs to,
            int64 [N], rising; None for shuffled rows. BOS, padding and the borders of documents do
            not count, so a run lies within one document.
        y: what is reconstructed, float32 as x, [..., d_out]; None where that is x.
        tokens: of whole contexts; None where rows are shuffled or left out, or no ids are stored.
    """

    x: Tensor
    positions: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None
    y: Tensor | None = None
    tokens: Tokens | None = None

    @property
    def n(self) -> int:
        """Number of vectors."""
        return self.positions.numel()

    def rows(self) -> Batch:
        """Returns the counted vectors as rows."""
        if self.x.dim() == 2:
            return self if self.mask is None else self._select(self.mask)
        mask = torch.ones_like(self.positions).bool() if self.mask is None else self.mask
        begins = mask.clone()
        begins[:, 1:] &= ~mask[:, :-1]
        segments = begins.flatten().cumsum(0).view_as(mask) - 1
        rows = Batch(self.x, self.positions, None, segments, y=self.y)._select(mask)
        rows.tokens = self.tokens
        return rows

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with x, y and segments on the device."""
        segments = None if self.segments is None else self.segments.to(device)
        y = None if self.y is None else self.y.to(device)
        x, positions = self.x.to(device), self.positions
        return Batch(x, positions, self.mask, segments, y=y, tokens=self.tokens)

    def within(self, low: int, high: int) -> Batch:
        """Returns the rows whose token position lies in [low, high)."""
        return self._select((self.positions >= low) & (self.positions < high))

    def part(self, rows: slice) -> Batch:
        """Returns the given rows, without segments, because a slice may cut a context."""
        if rows == slice(0, len(self.x)):
            return self
        y = None if self.y is None else self.y[rows]
        return Batch(self.x[rows], self.positions[rows], y=y)

    def _select(self, keep: Tensor) -> Batch:
        """Returns the vectors of a bool mask, as rows."""
        segments = None if self.segments is None else self.segments[keep]
        y = None if self.y is None else self.y[keep]
        return Batch(self.x[keep], self.positions[keep], None, segments, y=y)

    @property
    def starts(self) -> Tensor | None:
        """Start of each segment of the rows, and N; int64 [m + 1]."""
        return None if self.segments is None else starts_of(self.segments)


def starts_of(segments: Tensor) -> Tensor:
    """Returns the start of each segment, and N, from rising segment numbers [N]; int64 [m + 1]."""
    counts = segments.unique_consecutive(return_counts=True)[1]
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def batches(
    source: Source, seed: int, size: int, layout: Layout = "rows", start: Position = Position()
) -> Iterator[tuple[Batch, Position]]:
    """Yields batches without end, from `start` on, each with the position after it.

    Args:
        source: activations; its shards are the buffers.
        seed: decides the order within each buffer.
        size: rows per batch; in the 'contexts' layout the number of whole contexts is
            size / positions. The rest of a buffer that fills no batch is left out.

    Raises: SettingError when every buffer holds less than one batch.
    """
    buffer, offset = start.buffer, start.offset
    too_small = 0
    while True:
        x, positions, mask, y, ids = _buffer(source, buffer % source.n_shards, layout)
        count = size if layout == "rows" else max(1, size // x.shape[1])
        too_small = too_small + 1 if len(x) < count else 0
        if too_small == source.n_shards:
            remedy = f"a shard holds only {len(x)}: lower the batch size or harvest more tokens"
            raise SettingError("batch_size", size, remedy)
        order = torch.randperm(len(x), generator=torch_stream(seed, "data order", buffer))
        while offset + count <= len(x):
            index = order[offset : offset + count]
            offset += count
            batch = Batch(x[index].float(), positions[index], None if mask is None else mask[index])
            batch.y = None if y is None else y[index].float()
            if ids is not None and mask is not None:
                batch.tokens = Tokens(ids[index].long(), mask[index])
            yield batch, Position(buffer, offset)
        buffer, offset = buffer + 1, 0


def _buffer(
    source: Source, index: int, layout: Layout
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns vectors, positions, mask, targets and token ids of a shard; mask and ids of rows are
    None, and the targets are where the vectors are reconstructed."""
    shard = source.shard(index)
    if layout == "rows":
        x, positions = shard.rows()
        return x, positions, None, target_rows(shard), None
    length = shard.x.shape[1]
    positions = torch.arange(length).expand(shard.x.shape[:2])
    y = shard.y if isinstance(shard, JoinedShard) else None
    return shard.x, positions, shard.mask, y, shard.ids


def steps_in(source: Source, size: int) -> int:
    """Counts the batches of `size` rows in one pass over the source."""
    return sum(int(source.shard(i).mask.sum()) // size for i in range(source.n_shards))
