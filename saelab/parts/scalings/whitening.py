"""A control of idea A: the encoder's input is whitened, correlations included.

    u = C (x - b_dec),   C = S^(-tau) / g     S the covariance of the sample, symmetric power

g keeps the overall scale: the geometric mean of the eigenvalues of S^(-tau). tau 0.5 gives the unit
covariance (ZCA whitening, Bell and Sejnowski 1997). S is measured once, before training, and
frozen.
At inference a standard SAE: W_enc' = W_enc C.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from saelab.parts.base import Dims, PartConfig, Scaling

#: Smallest eigenvalue that is inverted, as a share of their mean: what `variance` uses too.
FLOOR = 1e-6


class WhiteningConfig(PartConfig):
    """tau: power of the covariance; start: as for `variance`."""

    kind: Literal["whitening"] = "whitening"
    tau: NonNegativeFloat = 0.5
    start: Literal["function", "scaled"] = "function"

    def build(self, dims: Dims) -> Whitening:
        return Whitening(self, dims)


class Whitening(Scaling):
    shardable = True
    matrix: Tensor

    def __init__(self, config: WhiteningConfig, dims: Dims) -> None:
        super().__init__()
        self.tau, self.keeps_start = config.tau, config.start == "function"
        self.register_buffer("matrix", torch.eye(dims.d_in, dtype=torch.float32))

    def fit(self, sample: Tensor) -> None:
        centred = (sample - sample.mean(0)).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        values = values + FLOOR * values.mean()
        powers = (-self.tau * (values.log() - values.log().mean())).exp()
        self.matrix.copy_((vectors * powers) @ vectors.T)

    def apply(self, centred: Tensor) -> Tensor:  # type: ignore[override]
        return centred @ self.matrix

    def fold(self) -> tuple[Tensor, Tensor]:
        return self.matrix, self.matrix.new_zeros(len(self.matrix))
