"""Reconstruction loss: |x - x_hat|^2 / d, mean over rows, in normalised space.

With targets scaled so that E|x - mean|^2 = d its value is the fraction of variance unexplained; of
several hook points, which are scaled one by one, the mean over their channels.
In the space of an input scaling s it is |s (x - x_hat)|^2 / |s|^2 instead: a control of idea A, for
training alone. Reported errors are in raw space whatever is trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import mean_square
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class ReconstructionConfig(PartConfig):
    """space: 'raw', or 'scaled' for that of the SAE's input scaling."""

    kind: Literal["reconstruction"] = "reconstruction"
    space: Literal["raw", "scaled"] = "raw"

    def build(self, dims: Dims) -> Reconstruction:
        return Reconstruction(self.space)


class Reconstruction(LossTerm):
    shardable = True

    def __init__(self, space: Literal["raw", "scaled"]) -> None:
        super().__init__()
        self.space = space

    def check(self, sae: SAE) -> None:
        if self.space == "scaled":
            if sae.scaling is None:
                raise SettingError("space", "scaled", "needs a scaling: set one")
            if sae.has_target:
                remedy = "is the space of the input, which is not reconstructed here: use 'raw'"
                raise SettingError("space", "scaled", remedy)
            sae.scaling.metric()

    def loss(self, p: Pass) -> Tensor:
        if self.space == "raw":
            return p.share(mean_square(p.recon, p.target))
        assert p.sae.scaling is not None
        s = p.sae.scaling.metric()
        s = s / s.square().mean().sqrt()
        return p.share(mean_square(p.recon * s, p.target * s))
