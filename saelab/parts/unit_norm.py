"""Unit-norm decoder rows: |W_dec_i| = 1. Bricken et al. 2023.

The gradient's component along each row is removed before the step, so that the optimiser's moments
hold no motion that the projection after the step would undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import normalize

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
        rows = sae.W_dec.detach()
        grad.sub_(rows * torch.linalg.vecdot(grad, rows).unsqueeze(1))

    def on_parameters(self, sae: SAE) -> None:
        sae.W_dec.data.copy_(normalize(sae.W_dec.data, dim=1))
