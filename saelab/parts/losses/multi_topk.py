"""Multi-TopK: the code must also reconstruct with more latents than it has. Gao et al. 2024, app.

    coefficient * |x - x_hat(m k)|^2 / d_in, mean over rows

x_hat(m k) decodes the m k largest pre-activations of a row, rectified; m is 4 and the coefficient
1/8 (2406.04093, section on progressive codes). k is the L0 that the settings name, where a schedule
moves it the one that it ends at. sparsify's gradient of this term stops at the decoder; here it
reaches the encoder as in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import (
    decode_at,
    kernels_for,
    mean_square,
    support_of_topk,
    topk_over_ranks,
)
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass, few

if TYPE_CHECKING:
    from saelab.sae import SAE


class MultiTopKConfig(PartConfig):
    """multiple: m of the equation."""

    kind: Literal["multi_topk"] = "multi_topk"
    coefficient: PositiveFloat = 1 / 8
    multiple: PositiveInt = 4

    def build(self, dims: Dims) -> MultiTopK:
        return MultiTopK(self)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(), {"activation": {"kind": "topk", "k": few(d_sae)}})


class MultiTopK(LossTerm):
    uses_preactivations = True
    shardable = True

    def __init__(self, config: MultiTopKConfig) -> None:
        super().__init__()
        self.coefficient, self.multiple = config.coefficient, config.multiple

    def check(self, sae: SAE) -> None:
        super().check(sae)
        if sae.config.target_l0 is None:
            remedy = "multiplies an L0 that no part names: use an activation with a k"
            raise SettingError("multiple", self.multiple, remedy)

    def loss(self, p: Pass) -> Tensor:
        sae = p.sae
        k = min(sae.d_sae, max(1, round(self.multiple * (sae.config.target_l0 or 1))))
        sizes = p.z.abs() if sae.signed else p.z
        if self.ranks.latents > 1:
            support = topk_over_ranks(sizes, k, self.ranks)
        else:
            support = support_of_topk(kernels_for(sizes.device).topk(sizes, k), sizes.shape[1])
        values = sae.encode_at(p.u, support)
        values = values if sae.signed else torch.relu(values)
        recon = self.ranks.over_latents(decode_at(values, sae.W_dec, support)) + p.offset
        return p.setting(self.coefficient) * p.share(mean_square(recon, p.target))
