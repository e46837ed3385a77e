"""Idea B's first sketch, taken at its word.

    coefficient * [ alpha * mean_{n,j} y_nj^2 + (1 - alpha) * mean_i ((|w_i| - mu) / sigma)^2 ]
    y_n = sum_i (f_ni - m_i) / s_i * w_i       w_i: encoder vector of latent i

m, s: running mean and std of each latent's code; mu, sigma: running mean and std of the norms |w_i|
over latents, sigma at least a thousandth of mu, since all norms start equal. All four are constants
to the gradient. The second term lies near 1 by construction; its gradient draws all norms to their
mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from saelab.kernels import decode_at, row_norms
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass
from saelab.parts.losses.similarity.running import STD_FLOOR, LatentMoments, std_of


class SimilarityLiteralConfig(PartConfig):
    """coefficient: of both terms; alpha: share of the code's; momentum: of the running values."""

    kind: Literal["similarity_literal"] = "similarity_literal"
    coefficient: float | str = 0.03
    alpha: float = Field(default=0.5, ge=0, le=1)
    momentum: float = Field(default=0.99, ge=0, lt=1)

    def build(self, dims: Dims) -> SimilarityLiteral:
        return SimilarityLiteral(self, dims)


class SimilarityLiteral(LossTerm):
    per_latent = ("moments.weight",)
    norms: Tensor
    gathered: Tensor

    def __init__(self, config: SimilarityLiteralConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.coefficient = config, config.coefficient
        self.moments = LatentMoments(dims.d_sae, config.momentum)
        # EMAs of the norms' mean and mean square, and the weight that they have gathered
        self.register_buffer("norms", torch.zeros(2, dtype=torch.float32))
        self.register_buffer("gathered", torch.zeros((), dtype=torch.float32))

    def loss(self, p: Pass) -> Tensor:
        mean, std = self.moments.standard(p.code, p.n)
        w = p.sae.W_enc
        if p.code.support is None:
            y = (p.code.values / std) @ w
        else:
            y = decode_at(p.code.values / std[p.code.support.latents], w, p.code.support)
        similar = (y - (mean / std) @ w).square().mean()
        norms = row_norms(w)
        raw = self.norms / self.gathered if float(self.gathered) else _moments(norms.detach())
        spread = torch.maximum(std_of(raw[0], raw[1]), STD_FLOOR * raw[0])
        uneven = ((norms - raw[0]) / spread).square().mean()
        alpha = self.config.alpha
        return p.setting(self.coefficient) * (alpha * similar + (1 - alpha) * uneven)

    @torch.no_grad()
    def update(self, p: Pass) -> None:
        keep = self.config.momentum
        self.moments.gather(p.code, p.n)
        self.norms.mul_(keep).add_(_moments(row_norms(p.sae.W_enc)), alpha=1 - keep)
        self.gathered.mul_(keep).add_(1 - keep)

    def forget(self, latents: Tensor) -> None:
        self.moments.forget(latents)


def _moments(values: Tensor) -> Tensor:
    return torch.stack([values.mean(), values.square().mean()])
