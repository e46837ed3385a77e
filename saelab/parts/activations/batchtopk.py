"""BatchTopK: the k*N largest positive pre-activations of a batch. Bussmann et al. 2024, eq. 1.

    training    f = z where z is among the k*N largest of the batch and positive
    inference   f = z * 1[z > threshold], threshold = EMA of the batch's smallest selected value

The stored threshold makes a token's code independent of its batch.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from saelab.kernels import Support, kernels_for, support_above
from saelab.parts.base import Dims, Form, Pass, correct_bias
from saelab.parts.following import FollowsK, KConfig

#: Share of the stored threshold that a batch's cut is expected to exceed. Our choice: cuts of
#: batches differ by a few percent, and a lower share computes more pairs in vain.
EXPECTED = 0.95


class BatchTopKConfig(KConfig):
    """k: mean active latents per row, or the name of the controller that sets it; momentum: of the
    threshold's EMA."""

    kind: Literal["batchtopk"] = "batchtopk"
    momentum: float = Field(default=0.99, ge=0, lt=1)

    def build(self, dims: Dims) -> BatchTopK:
        return BatchTopK(self, dims)


class BatchTopK(FollowsK):
    couples_batch: ClassVar[bool] = True
    shardable = True
    ema: Tensor
    count: Tensor

    def __init__(self, config: BatchTopKConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.momentum = config.momentum
        self.register_buffer("ema", torch.zeros((), dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def threshold(self) -> Tensor:
        return correct_bias(self.ema, self.momentum, int(self.count))

    def _floor(self, z: Tensor) -> Tensor:
        """The value that selected ones lie above; float32, 0-dim."""
        if not self.training:
            return self.floor()
        if not self.ranks.alone:
            cut = float(self.ranks.kth_largest(z[z > 0].float(), self._most(len(z)), True))
        elif not z.numel():
            return self.ema.new_zeros(())
        else:
            cut = kernels_for(z.device).kth_largest(z, min(self.k * z.shape[0], z.numel()))
        return self._below(cut)

    def _below(self, cut: float) -> Tensor:
        """The largest floor that a value at the cut lies above; float32, 0-dim."""
        return torch.nextafter(self.ema.new_tensor(cut), self.ema.new_tensor(-1.0)).clamp_min(0)

    def selection_floor(self) -> Tensor | None:
        """A little less than the cut of the batches before, which is much like this batch's."""
        return EXPECTED * self.floor() if int(self.count) else None

    def narrow(self, support: Support, values: Tensor) -> tuple[Support, Tensor] | None:
        most = min(self._most(support.n_rows), support.n_rows * support.d_sae)
        if len(values) < most:
            return None
        kernels = kernels_for(values.device)
        below = self._below(kernels.kth_largest(values, most))
        offsets, latents, kept = kernels.keep_above(values, below, support)
        return Support(offsets, latents, support.d_sae), kept

    def floor(self) -> Tensor:
        return self.threshold.clamp_min(0)

    def dense(self, z: Tensor) -> Tensor:
        return z * (z.detach() > self._floor(z.detach()))

    def support(self, z: Tensor) -> Support | None:
        return support_above(z, self._floor(z))

    def at(self, values: Tensor, support: Support) -> Tensor:
        if not self.training:
            return values * (values > self.threshold)
        keep = values > 0
        most = self._most(support.n_rows)
        spare = self.ranks.total(support.nnz)[0] - most
        if spare > 0:  # a bfloat16 selection has ties at its cut: the exact values decide
            keep &= values >= self.ranks.kth_largest(values.detach(), most, everywhere=True)
        return values * keep

    def _most(self, rows: int) -> int:
        """Active pairs of the batch at most.

        Args:
            rows: of the batch that this rank has.
        """
        return self.k * int(self.ranks.total_over_rows(rows)[0])

    def update(self, p: Pass) -> None:
        super().update(p)
        active = p.code.values.detach()[p.code.active]
        least = active.min() if active.numel() else active.new_tensor(math.inf)
        least = self.ranks.smallest(least)
        if bool(least < math.inf):
            self.ema.mul_(self.momentum).add_(least, alpha=1 - self.momentum)
            self.count += 1

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        """Multiplies the stored threshold by exp(`by`)."""
        self.ema.mul_(math.exp(by))
        return True

    def export(self) -> Form:
        return Form(threshold=self.threshold)
