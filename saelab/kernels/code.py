"""The code of a batch: which latents are active in which row, and how strongly.

A `Support` is the set of (row, latent) pairs at which a code may be non-zero, sorted by row (k per
row fixed or ragged). A `Code` is a support with values, or, where a support would be too large, a
dense tensor. `values` is an ordinary autograd tensor, so a loss on values needs no kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

#: Above this share of possible pairs a dense code is cheaper. Measured with one thread at
#: d 192, F 1536, N 256: a step costs a third of a dense one at 2% and as much near 25%.
DENSEST = 0.25


@dataclass(eq=False)
class Support:
    """Pairs (row, latent), sorted by row.

    Args:
        offsets: where each row begins in `latents`; int64 [n_rows + 1].
        latents: the latent of each pair, distinct within a row; int64 [nnz].
        d_sae: number of latents.
    """

    offsets: Tensor
    latents: Tensor
    d_sae: int

    @property
    def n_rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        return self.latents.numel()

    @cached_property
    def rows(self) -> Tensor:
        """The row of each pair; int64 [nnz]."""
        counts = self.offsets.diff()
        index = torch.arange(self.n_rows, device=counts.device)
        return index.repeat_interleave(counts, output_size=self.nnz)

    @cached_property
    def flat(self) -> Tensor:
        """Position of each pair in a flattened [n_rows, d_sae] tensor; int64 [nnz]."""
        return torch.add(self.latents, self.rows, alpha=self.d_sae)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same pairs sorted by latent: (order [nnz], rows [nnz], offsets [d_sae + 1])."""
        order = _stable_order(self.latents, self.d_sae)
        counts = torch.bincount(self.latents, minlength=self.d_sae)
        offsets = torch.zeros(self.d_sae + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return order, self.rows[order], offsets

    def check(self) -> None:
        """Raises: ValueError unless offsets and latents describe distinct pairs in range."""
        if self.offsets[0] != 0 or self.offsets[-1] != self.nnz or (self.offsets.diff() < 0).any():
            raise ValueError("offsets must rise from 0 to the number of pairs")
        if self.nnz and (self.latents.min() < 0 or self.latents.max() >= self.d_sae):
            raise ValueError(f"latents must lie in [0, {self.d_sae})")
        if self.flat.unique().numel() != self.nnz:
            raise ValueError("a latent occurs twice in a row")


def support_of_mask(mask: Tensor) -> Support | None:
    """The support of a bool mask [n_rows, d_sae], or None when it is denser than `DENSEST`."""
    d_sae = mask.shape[1]
    if _count(mask) > DENSEST * mask.numel():
        return None
    flat = _indices(mask)
    first_of_row = torch.arange(0, mask.numel() + 1, d_sae, device=mask.device)
    support = Support(torch.searchsorted(flat, first_of_row), flat % d_sae, d_sae)
    support.__dict__["flat"] = flat
    return support


def _count(mask: Tensor) -> int:
    on_cpu = mask.device.type == "cpu"
    return int(np.count_nonzero(mask.numpy()) if on_cpu else mask.count_nonzero())


def positive(z: Tensor) -> Tensor:
    """z > 0 as a bool mask. On a CPU a bfloat16 is compared as the integer of its bits, which has
    the same sign and is faster. A NaN may count as either; it reaches the loss by the target."""
    if z.device.type == "cpu" and z.dtype == torch.bfloat16:
        return torch.from_numpy(z.view(torch.int16).numpy() > 0)
    return z > 0


def _indices(mask: Tensor) -> Tensor:
    """Flat indices of the true entries, rising; numpy is 6 times faster than torch on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()


def _stable_order(latents: Tensor, d_sae: int) -> Tensor:
    """A stable argsort; numpy sorts 16-bit keys by radix, 4 times faster than torch on a CPU."""
    if latents.device.type == "cpu" and d_sae <= np.iinfo(np.int16).max:
        keys = latents.numpy().astype(np.int16)
        return torch.from_numpy(np.argsort(keys, kind="stable"))
    return torch.argsort(latents, stable=True)


def support_of_topk(latents: Tensor, d_sae: int) -> Support:
    """The support of k distinct latents per row; latents int64 [n_rows, k]."""
    n_rows, k = latents.shape
    offsets = torch.arange(0, n_rows * k + 1, k, device=latents.device)
    return Support(offsets, latents.flatten(), d_sae)


@dataclass(eq=False)
class Code:
    """Values on a support, or a dense code when `support` is None.

    Args:
        values: float32 [nnz], or [n_rows, d_sae] when dense. Zeros are allowed (a pair inside a
            margin); only non-zero values count as active.
        pre: the pre-activations at the same places, for losses on thresholds.
        support: where the values stand.
    """

    values: Tensor
    pre: Tensor
    support: Support | None

    def dense(self, n_rows: int | None = None) -> Tensor:
        """The code as [n_rows, d_sae]; for evaluation and tests, not for the hot path."""
        if self.support is None:
            return self.values
        support = self.support
        out = self.values.new_zeros(support.n_rows * support.d_sae)
        return out.index_put((support.flat,), self.values).view(support.n_rows, support.d_sae)

    def weighted_sum(self, weight: Tensor) -> Tensor:
        """sum over pairs of value * weight[latent]; weight [d_sae]; a scalar."""
        if self.support is None:
            return (self.values @ weight).sum()
        return torch.dot(self.values, weight[self.support.latents])

    @cached_property
    def active(self) -> Tensor:
        """Bool, shape of `values`: where a latent fires."""
        return self.values.detach() != 0

    @cached_property
    def firings(self) -> Tensor:
        """How many rows each latent fires in; int64 [d_sae]."""
        if self.support is None:
            return self.active.sum(0)
        return torch.bincount(self.support.latents[self.active], minlength=self.support.d_sae)

    @cached_property
    def l0(self) -> float:
        """Mean number of active latents per row."""
        n_rows = self.values.shape[0] if self.support is None else self.support.n_rows
        return int(self.active.sum()) / max(1, n_rows)
