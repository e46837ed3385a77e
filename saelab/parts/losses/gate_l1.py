"""L1 on the path of a gate, which makes it sparse. Rajamanoharan et al. 2024a (2404.16014), eq. 8.

    coefficient * sum_i max(z_i + b_gate_i, 0) / sqrt(d_in), mean over rows

The gate's step passes no gradient: this term and `gate_reconstruction` train it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class GateL1Config(PartConfig):
    """Settings of the term.

    Args:
        coefficient: a number, or the name of the controller that sets it.
        decoder_norms: whether each value is multiplied by |W_dec_i|, as SAELens does, instead of
            decoder rows of norm 1.
    """

    kind: Literal["gate_l1"] = "gate_l1"
    coefficient: float | str = "sparsity"
    decoder_norms: bool = False

    def build(self, dims: Dims) -> GateL1:
        return GateL1(self)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        weighted = cls(decoder_norms=True)
        return cls.example(d_sae), Example(weighted, weighted.companions)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "gated"}, "constraints": [{"kind": "unit_norm"}]}


class GateL1(LossTerm):
    shardable = True

    def __init__(self, config: GateL1Config) -> None:
        super().__init__()
        self.coefficient, self.uses_decoder_norms = config.coefficient, config.decoder_norms

    def check(self, sae: SAE) -> None:
        super().check(sae)
        sae.activation.gate_path(sae.W_enc.new_empty(0, sae.local_latents), None)

    def loss(self, p: Pass) -> Tensor:
        opened = p.sae.activation.gate_path(p.code.pre, p.code.support)
        if self.uses_decoder_norms:
            support, norms = p.code.support, p.decoder_norms
            opened = opened * (norms if support is None else norms[support.latents])
        scale = p.setting(self.coefficient) / (p.n * math.sqrt(p.target.shape[1]))
        return self.ranks.over_latents(opened.sum()) * scale
