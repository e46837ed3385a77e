"""Unit-norm rows of a weight matrix: |W_i| = 1. Bricken et al. 2023 for the decoder.

The gradient's component along each row is removed before the step, so that the optimiser's moments
hold no motion that the projection after the step would undo. On the encoder it fixes the scale that
idea A's beta is otherwise free to share with W_enc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from saelab.kernels import kernels_for
from saelab.parts.base import Constraint, Dims, Example, PartConfig

if TYPE_CHECKING:
    from saelab.sae import SAE


class UnitNormConfig(PartConfig):
    """weight: the matrix whose rows are kept on the sphere."""

    kind: Literal["unit_norm"] = "unit_norm"
    weight: Literal["decoder", "encoder"] = "decoder"

    def build(self, dims: Dims) -> UnitNorm:
        return UnitNorm(self.weight)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        return cls.example(d_sae), Example(cls(weight="encoder"))

    @property
    def moves_decoder(self) -> bool:
        return self.weight == "decoder"


class UnitNorm(Constraint):
    shardable = True

    def __init__(self, weight: Literal["decoder", "encoder"]) -> None:
        super().__init__()
        self.name = "W_dec" if weight == "decoder" else "W_enc"

    @property
    def keeps_unit_rows(self) -> bool:
        return self.name == "W_dec"

    def on_gradients(self, sae: SAE) -> None:
        weight = getattr(sae, self.name)
        if weight.grad is not None:
            kernels_for(weight.device).project_out(weight.grad, weight.detach())

    def on_parameters(self, sae: SAE) -> None:
        weight = getattr(sae, self.name)
        kernels_for(weight.device).normalise(weight.data)
