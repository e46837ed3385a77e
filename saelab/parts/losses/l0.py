"""Step penalty on the number of active latents, for activations with a learned threshold.

    coefficient * sum_i 1[z_i > t_i], mean over rows; Rajamanoharan et al. 2024b, eq. 9

Its gradient reaches the thresholds through the pseudo-derivative of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from saelab.parts.base import Dims, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class L0Config(PartConfig):
    """coefficient: a number, or the name of the controller that sets it."""

    kind: Literal["l0"] = "l0"
    coefficient: float | str = "sparsity"

    def build(self, dims: Dims) -> L0:
        return L0(self)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "jumprelu"}}


class L0(LossTerm):
    shardable = True

    def __init__(self, config: L0Config) -> None:
        super().__init__()
        self.coefficient = config.coefficient

    def check(self, sae: SAE) -> None:
        super().check(sae)
        sae.activation.gate(sae.W_enc.new_empty(0, sae.local_latents), None)

    def loss(self, p: Pass) -> Tensor:
        gates = p.sae.activation.gate(p.code.pre, p.code.support)
        return self.ranks.over_latents(gates.sum()) * (p.setting(self.coefficient) / p.n)
