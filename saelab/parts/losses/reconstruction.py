"""Reconstruction loss: |x - x_hat|^2 / d, mean over rows, in normalised space.

With targets scaled so that E|x - mean|^2 = d its value is the fraction of variance unexplained; of
several hook points, which are scaled one by one, the mean over their channels.
In the space of an input scaling s it is |s (x - x_hat)|^2 / |s|^2 instead: a control of idea A, for
training alone. Reported errors are in raw space whatever is trained on.

With a tilt t it is (1/t) log mean_n exp(t l_n) of the rows' losses l_n, which weights rows by
exp(t l_n): rare inputs, badly reconstructed, for t > 0 (TERM; Li et al. 2021, and for SAEs Muhamed
et al. 2024, 2411.00743). There l_n includes the row's L1; here penalties stay outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import mean_square
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass

if TYPE_CHECKING:
    from saelab.sae import SAE


class ReconstructionConfig(PartConfig):
    """Settings of the term.

    Args:
        space: 'raw', or 'scaled' for that of the SAE's input scaling.
        tilt: t of the equation; 0 for the mean over rows.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"tilt"})

    kind: Literal["reconstruction"] = "reconstruction"
    space: Literal["raw", "scaled"] = "raw"
    tilt: float = 0.0

    def build(self, dims: Dims) -> Reconstruction:
        return Reconstruction(self)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        return cls.example(d_sae), Example(cls(tilt=2.0))


class Reconstruction(LossTerm):
    shardable = True

    def __init__(self, config: ReconstructionConfig) -> None:
        super().__init__()
        self.space, self.tilt = config.space, config.tilt

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
            return self._loss(p, p.recon, p.target)
        assert p.sae.scaling is not None
        s = p.sae.scaling.metric()
        s = s / s.square().mean().sqrt()
        return self._loss(p, p.recon * s, p.target * s)

    def _loss(self, p: Pass, recon: Tensor, target: Tensor) -> Tensor:
        if not self.tilt:
            return p.share(mean_square(recon, target))
        rows = (recon - target).square().mean(1)
        tilted = self.tilt * rows.detach()
        largest = -self.ranks.smallest(-tilted.max())
        weights = (tilted - largest).exp()
        total = self.ranks.over_rows(weights.sum())
        value = (largest + (total / p.n).log()) / self.tilt
        return ((weights / total) * (rows - rows.detach())).sum() + p.share(value)
