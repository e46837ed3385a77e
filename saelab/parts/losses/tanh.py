"""Tanh penalty: L1 for small values, a count of latents for large ones.

    coefficient * sum_i tanh(steepness f_i |W_dec_i|), mean over rows

Jermyn et al. 2024 (Circuits Updates, February); with a JumpReLU and decoder norms Anthropic 2025
(Circuits Updates, January), whose steepness 4 is in the units used here (E|x|^2 = d_in). Beside
their loss stands `preactivation`, against dead latents.
"""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class TanhConfig(PartConfig):
    """Settings of the penalty.

    Args:
        coefficient: a number, or the name of the controller that sets it.
        steepness: of the tanh.
        decoder_norms: whether each f_i is multiplied by |W_dec_i|.
    """

    kind: Literal["tanh"] = "tanh"
    coefficient: float | str = "sparsity"
    steepness: PositiveFloat = 4.0
    decoder_norms: bool = True

    def build(self, dims: Dims) -> Tanh:
        return Tanh(self)


class Tanh(LossTerm):
    shardable = True

    def __init__(self, config: TanhConfig) -> None:
        super().__init__()
        self.coefficient, self.steepness = config.coefficient, config.steepness
        self.uses_decoder_norms = config.decoder_norms

    def loss(self, p: Pass) -> Tensor:
        sizes, support = p.sizes.values * self.steepness, p.code.support
        if self.uses_decoder_norms:
            norms = p.decoder_norms
            sizes = sizes * (norms if support is None else norms.index_select(0, support.latents))
        return self.ranks.over_latents(sizes.tanh().sum()) * (p.setting(self.coefficient) / p.n)
