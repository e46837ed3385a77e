"""Unit-norm decoder rows: |W_dec_i| = 1. Bricken et al. 2023.

The gradient's component along each row is removed before the step, so that the optimiser's moments
hold no motion that the projection after the step would undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from saelab.kernels import kernels_for
from saelab.parts.base import Constraint, Dims, PartConfig

if TYPE_CHECKING:
    from saelab.sae import SAE


class UnitNormConfig(PartConfig):
    kind: Literal["unit_norm"] = "unit_norm"

    def build(self, dims: Dims) -> UnitNorm:
        return UnitNorm()


class UnitNorm(Constraint):
    def on_gradients(self, sae: SAE) -> None:
        grad = sae.W_dec.grad
        if grad is None:
            return
        kernels_for(grad.device).project_out(grad, sae.W_dec.detach())

    def on_parameters(self, sae: SAE) -> None:
        kernels_for(sae.W_dec.device).normalise(sae.W_dec.data)
