"""The code of a batch: which latents are active in which row, and how strongly.

A `Support` is the set of (row, latent) pairs at which a code may be non-zero, sorted by row (k per
row fixed or ragged). A `Code` is a support with values, or, where a support would be too large, a
dense tensor. `values` is an ordinary autograd tensor, so a loss on values needs no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saelab.kernels.eager import rows_of
from saelab.kernels.table import kernels_for

#: Share of all pairs above which a dense code is cheaper, for codes of up to SMALL entries and for
#: larger ones, whose gathers miss the cache. Measured share at which both steps cost the same: 45%
#: at N 256, d 192, F 1536 with one thread, 23% at N 2048, d 768, F 12288 with two.
DENSEST_SMALL, DENSEST = 0.4, 0.2
SMALL = 1 << 20


def most_pairs(entries: int) -> int:
    """Returns the number of pairs above which a code of `entries` = N x F is stored dense."""
    return int((DENSEST_SMALL if entries <= SMALL else DENSEST) * entries)


@dataclass(eq=False)
class Support:
    """Pairs (row, latent), sorted by row.

    Args:
        offsets: positions in `latents` where the rows begin; int64 [n_rows + 1].
        latents: the latent of each pair, distinct within a row; int64 [nnz].
        d_sae: number of latents.
    """

    offsets: Tensor
    latents: Tensor
    d_sae: int

    def __post_init__(self) -> None:
        self.offsets, self.latents = self.offsets.contiguous(), self.latents.contiguous()

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of pairs."""
        return self.latents.numel()

    @cached_property
    def rows(self) -> Tensor:
        """The row of each pair; int64 [nnz]."""
        return rows_of(self.offsets, self.nnz)

    @cached_property
    def flat(self) -> Tensor:
        """Position of each pair in a flattened [n_rows, d_sae] tensor; int64 [nnz]."""
        return torch.add(self.latents, self.rows, alpha=self.d_sae)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs sorted by latent: (order [nnz], rows [nnz], offsets [d_sae + 1])."""
        kernels = kernels_for(self.latents.device)
        return kernels.by_latent(self.offsets, self.latents, self.d_sae)

    def check(self) -> None:
        """Checks that offsets and latents describe distinct pairs in range.

        Raises: ValueError when they do not.
        """
        if self.offsets[0] != 0 or self.offsets[-1] != self.nnz or (self.offsets.diff() < 0).any():
            raise ValueError("offsets must rise from 0 to the number of pairs")
        if self.nnz and (self.latents.min() < 0 or self.latents.max() >= self.d_sae):
            raise ValueError(f"latents must lie in [0, {self.d_sae})")
        if self.flat.unique().numel() != self.nnz:
            raise ValueError("a latent occurs twice in a row")


def support_above(z: Tensor, floor: Tensor | None = None) -> Support | None:
    """Selects the pairs with z_ni > floor_i (0 without floors); None beyond `most_pairs`.

    Args:
        z: float32 or bfloat16 [n_rows, d_sae]. Without floors a NaN may or may not be selected; it
            reaches the loss through the target.
        floor: float32 [d_sae] or 0-dim, compared in float32.
    """
    if floor is not None:
        floor = floor.float().expand(z.shape[1])
    pairs = kernels_for(z.device).above(z, floor, most_pairs(z.numel()))
    return None if pairs is None else Support(pairs[0], pairs[1], z.shape[1])


def support_of_topk(latents: Tensor, d_sae: int) -> Support:
    """Builds the support of k given distinct latents per row; latents int64 [n_rows, k]."""
    n_rows, k = latents.shape
    offsets = torch.arange(0, n_rows * k + 1, k, device=latents.device)
    return Support(offsets, latents.flatten(), d_sae)


@dataclass(eq=False)
class Code:
    """Values on a support, or a dense code when `support` is None.

    Args:
        values: float32 [nnz], or [n_rows, d_sae] when dense. Zeros are allowed (a pair inside a
            margin); only non-zero values count as active.
        pre: the pre-activations of the same pairs, for losses on thresholds.
        support: the pairs of the values.
    """

    values: Tensor
    pre: Tensor
    support: Support | None

    def dense(self, n_rows: int | None = None) -> Tensor:
        """Returns the code as [n_rows, d_sae]; for evaluation and tests, not for the hot path."""
        if self.support is None:
            return self.values
        support = self.support
        out = self.values.new_zeros(support.n_rows * support.d_sae)
        return out.index_put((support.flat,), self.values).view(support.n_rows, support.d_sae)

    def add_to(self, sums: Tensor, cuts: Tensor) -> None:
        """Adds the code of the rows cuts[i] to cuts[i + 1] to sums[i]; sums [m, d_sae], in place.

        No gradient. Rows before the first and after the last cut are left out.
        """
        if self.support is None:
            for i, (start, stop) in enumerate(itertools.pairwise(cuts.tolist())):
                sums[i] += self.values[start:stop].sum(0)
            return
        kernels_for(sums.device).pool(self.values, self.support, cuts, sums)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """Computes the sum over pairs of value * weight[latent]; weight [d_sae] -> 0-dim."""
        if self.support is None:
            return (self.values @ weight).sum()
        return torch.dot(self.values, weight.index_select(0, self.support.latents))

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums over rows of f and of f^2 for each latent, each [d_sae], without gradient."""
        values = self.values.detach()
        if self.support is None:
            return values.sum(0), torch.linalg.vector_norm(values, dim=0).square_()
        empty, latents = values.new_zeros(self.support.d_sae), self.support.latents
        first = empty.index_add(0, latents, values)
        return first, empty.index_add_(0, latents, values.square())

    @cached_property
    def active(self) -> Tensor:
        """Mask of the values that are not 0; bool, in the shape of `values`."""
        return self.values.detach() != 0

    @property
    def firings(self) -> Tensor:
        """Number of rows in which each latent fires; int64 [d_sae]."""
        return self._counts[0]

    @property
    def row_counts(self) -> Tensor:
        """Number of latents that fire in each row; int64 [n_rows]."""
        if self.support is None:
            return self.active.float().sum(1).long()  # exact, and faster than counting bools
        total = torch.cat([self.active.new_zeros(1, dtype=torch.int64), self.active.cumsum(0)])
        return total[self.support.offsets].diff()

    @property
    def active_pairs(self) -> int:
        """Number of active pairs of a row and a latent."""
        return self._counts[1]

    @property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        n_rows = self.values.shape[0] if self.support is None else self.support.n_rows
        return self.active_pairs / max(1, n_rows)

    @cached_property
    def _counts(self) -> tuple[Tensor, int]:
        """Number of firings of each latent, int64 [d_sae], and of all together."""
        if self.support is None:
            firings = self.active.float().sum(0).long()
            return firings, int(firings.sum())
        return kernels_for(self.values.device).firings(self.values.detach(), self.support)


def pool_codes(
    codes: Callable[[Tensor], Iterable[tuple[slice, Code]]],
    rows: Tensor,
    cuts: Tensor,
    starts: Tensor | None,
    d_sae: int,
) -> Tensor:
    """Sums the code over segments of rows.

    Args:
        codes: starts of runs of tokens -> slices of the rows, in order, and their codes.
        rows: [n, d_in].
        cuts: int64 [m + 1], rising; segment i has the consecutive rows cuts[i] to cuts[i + 1].
        starts: int64; None if runs begin at the cuts.

    Returns: float32 [m, d_sae].
    """
    sums = rows.new_zeros(len(cuts) - 1, d_sae)
    ends = cuts.new_tensor([0, len(rows)])
    starts = torch.cat([cuts, ends]).unique() if starts is None else starts
    for block, code in codes(starts):
        first = max(0, int(torch.searchsorted(cuts, block.start, right=True)) - 1)
        last = int(torch.searchsorted(cuts, block.stop))
        block_cuts = cuts[first : last + 1].clamp(block.start, block.stop) - block.start
        code.add_to(sums[first:last], block_cuts)
    return sums
