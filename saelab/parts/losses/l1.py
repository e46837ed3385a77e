"""Sparsity penalties on values: L1 weighted by decoder norms. Conerly et al. 2024.

    coefficient * sum_i |f_i| |W_dec_i| / sqrt(d_in), mean over rows

The decoder norm makes the penalty independent of how a latent's scale is split between its encoder
and its decoder.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor

from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class L1Config(PartConfig):
    """coefficient: a number, or the name of the controller that sets it."""

    kind: Literal["l1"] = "l1"
    coefficient: float | str = "sparsity"

    def build(self, dims: Dims) -> L1:
        return L1(self)


class L1(LossTerm):
    uses_decoder_norms: ClassVar[bool] = True
    shardable = True

    def __init__(self, config: L1Config) -> None:
        super().__init__()
        self.coefficient = config.coefficient

    def loss(self, p: Pass) -> Tensor:
        scale = p.setting(self.coefficient) / (p.n * math.sqrt(p.x.shape[1]))
        return self.ranks.over_latents(p.sizes.weighted_sum(p.decoder_norms)) * scale
