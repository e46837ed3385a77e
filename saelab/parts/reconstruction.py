"""Reconstruction loss: |x - x_hat|^2 / d_in, mean over rows, in normalised space.

With inputs scaled so that E|x - mean|^2 = d_in its value is the fraction of variance unexplained.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from saelab.kernels import mean_square
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class ReconstructionConfig(PartConfig):
    kind: Literal["reconstruction"] = "reconstruction"

    def build(self, dims: Dims) -> Reconstruction:
        return Reconstruction()


class Reconstruction(LossTerm):
    def loss(self, p: Pass) -> Tensor:
        return mean_square(p.recon, p.target)
