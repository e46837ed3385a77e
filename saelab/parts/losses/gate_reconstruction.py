"""Reconstruction by the path of a gate alone. Rajamanoharan et al. 2024a (2404.16014), eq. 8.

    |x - (max(pi, 0) W_dec + b_dec)|^2 / d_in, mean over rows;   pi_i = z_i + b_gate_i

The decoder and its bias get no gradient from it: the gate must reconstruct with the directions that
the code uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat
from torch import Tensor

from saelab.kernels import decode_at, mean_square
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class GateReconstructionConfig(PartConfig):
    """Settings of the term.

    Args:
        coefficient: 1 in the paper.
        frozen: whether the decoder gets no gradient, as in the paper; SAELens trains it with this
            term too.
    """

    kind: Literal["gate_reconstruction"] = "gate_reconstruction"
    coefficient: PositiveFloat = 1.0
    frozen: bool = True

    def build(self, dims: Dims) -> GateReconstruction:
        return GateReconstruction(self)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        live = cls(frozen=False)
        return cls.example(d_sae), Example(live, live.companions)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "gated"}, "constraints": [{"kind": "unit_norm"}]}


class GateReconstruction(LossTerm):
    shardable = True

    def __init__(self, config: GateReconstructionConfig) -> None:
        super().__init__()
        self.coefficient, self.frozen = config.coefficient, config.frozen

    def check(self, sae: SAE) -> None:
        super().check(sae)
        sae.activation.gate_path(sae.W_enc.new_empty(0, sae.local_latents), None)

    def loss(self, p: Pass) -> Tensor:
        support = p.code.support
        opened = p.sae.activation.gate_path(p.code.pre, support)
        w_dec, offset = p.sae.W_dec, p.offset
        if self.frozen:
            w_dec, offset = w_dec.detach(), offset.detach()
        product = opened @ w_dec if support is None else decode_at(opened, w_dec, support)
        recon = self.ranks.over_latents(product) + offset
        return p.setting(self.coefficient) * p.share(mean_square(recon, p.target))
