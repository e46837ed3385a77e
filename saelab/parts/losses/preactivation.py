"""Pre-activation loss: latents that don't reach their thresholds are drawn to them.

    coefficient * sum_i max(t_i - z_i, 0) |W_dec_i| / d_in, mean over rows

Anthropic 2025 (Circuits Updates, January), over all latents and with gradients to t_i, z_i and
W_dec_i; against dead latents. The division by d_in is that of the reconstruction here, so that the
coefficient has the size of the source. It needs all pre-activations with their gradients: one more
dense product forward and one backward, which costs as much as an encoder of a dense code.

SAELens counts dead latents only, which is another loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saelab.parts.base import Dims, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class PreactivationConfig(PartConfig):
    """coefficient: a number, or the name of the controller that sets it."""

    kind: Literal["preactivation"] = "preactivation"
    coefficient: float | str = 3e-6

    def build(self, dims: Dims) -> Preactivation:
        return Preactivation(self)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "jumprelu"}}


class Preactivation(LossTerm):
    uses_decoder_norms = True
    shardable = True

    def __init__(self, config: PreactivationConfig) -> None:
        super().__init__()
        self.coefficient = config.coefficient

    def check(self, sae: SAE) -> None:
        super().check(sae)
        sae.activation.learned_thresholds()

    def loss(self, p: Pass) -> Tensor:
        pre = p.code.pre if p.code.support is None else p.sae.encode_all(p.u)
        below = torch.relu(p.sae.activation.learned_thresholds() - pre).sum(0)
        total = self.ranks.over_latents(torch.dot(below, p.decoder_norms))
        return total * (p.setting(self.coefficient) / (p.n * p.target.shape[1]))
