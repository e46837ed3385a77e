"""A control of idea A: the running mean of the encoder's input is taken off, nothing is scaled.

    u = (x - b_dec) - m      m the EMA mean of x - b_dec

At inference a standard SAE: W_enc' = W_enc, b_enc' = b_enc - W_enc m.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from saelab.parts.base import Dims, PartConfig, Pass, Scaling


class CentringConfig(PartConfig):
    """momentum: of the mean."""

    kind: Literal["centring"] = "centring"
    momentum: float = Field(default=0.99, ge=0, lt=1)

    def build(self, dims: Dims) -> Centring:
        return Centring(self, dims)


class Centring(Scaling):
    shardable = True
    mean: Tensor

    def __init__(self, config: CentringConfig, dims: Dims) -> None:
        super().__init__()
        self.momentum = config.momentum
        self.register_buffer("mean", torch.zeros(dims.d_in, dtype=torch.float32))

    def fit(self, sample: Tensor) -> None:
        self.mean.copy_(sample.mean(0))

    def apply(self, centred: Tensor) -> Tensor:  # type: ignore[override]
        return centred - self.mean

    def update(self, p: Pass) -> None:
        mean = p.mean(p.x) - p.sae.encoder_centre
        self.mean.lerp_(mean, 1 - self.momentum)

    def fold(self) -> tuple[Tensor, Tensor]:
        return torch.ones_like(self.mean), -self.mean
