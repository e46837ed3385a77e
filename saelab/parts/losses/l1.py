"""Sparsity penalties on values: L1, with or without decoder norms.

    coefficient * sum_i |f_i| |W_dec_i| / sqrt(d_out), mean over rows   Conerly et al. 2024
    coefficient * sum_i |f_i| / sqrt(d_out), mean over rows             Bricken et al. 2023

The decoder norm makes the penalty independent of how a latent's scale is split between its encoder
and its decoder. Without it the constraint `unit_norm` must keep the decoder's rows at norm 1, or
they would grow while the values shrink. d_out is the width of what is reconstructed; where that is
several hook points, |W_dec_i| is the sum of the norms at each (Lindsey et al. 2024).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from saelab.errors import SettingError
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class L1Config(PartConfig):
    """Settings of the term.

    Args:
        coefficient: a number, or the name of the controller that sets it.
        decoder_norms: whether each f_i is multiplied by |W_dec_i|.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"decoder_norms"})

    kind: Literal["l1"] = "l1"
    coefficient: float | str = "sparsity"
    decoder_norms: bool = True

    def build(self, dims: Dims) -> L1:
        return L1(self)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        bricken = {"constraints": [{"kind": "unit_norm"}]}
        return cls.example(d_sae), Example(cls(decoder_norms=False), bricken)


class L1(LossTerm):
    shardable = True

    def __init__(self, config: L1Config) -> None:
        super().__init__()
        self.coefficient, self.uses_decoder_norms = config.coefficient, config.decoder_norms

    def check(self, sae: SAE) -> None:
        super().check(sae)
        fixed = any(part.fixes_decoder_norms for part in sae.config.constraints)
        if not (fixed or self.uses_decoder_norms):
            remedy = "needs decoder rows of norm 1: add the constraint 'unit_norm'"
            raise SettingError("decoder_norms", False, remedy)

    def loss(self, p: Pass) -> Tensor:
        scale = p.setting(self.coefficient) / (p.n * math.sqrt(p.target.shape[1]))
        if not self.uses_decoder_norms:
            return self.ranks.over_latents(p.sizes.values.sum()) * scale
        return self.ranks.over_latents(p.sizes.weighted_sum(p.decoder_norms)) * scale
