"""Orthogonality of decoder rows, in chunks. After OrtSAE, Korznikov et al. 2025 (2509.22033).

    coefficient * mean over latents i of max(0, max_j cos(W_dec_i, W_dec_j))^2

j goes over the other latents of i's chunk; chunks are drawn anew at each step, so that the cost is
linear in d_sae. Gradients go to both rows of each pair. The paper's activation is BatchTopK.

Only the paper's abstract could be read: pairs of high cosine are penalised, at a cost linear in
d_sae. The square, the mean, 0.25, the size of chunks and how often the term is computed could not
be checked against it, so results are no reproduction of OrtSAE.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from saelab.parts.base import Dims, LossTerm, PartConfig, Pass
from saelab.seeding import torch_stream


class OrthogonalityConfig(PartConfig):
    """Settings of the term.

    Args:
        coefficient: of the mean.
        chunk: latents that are compared with each other; the cost is d_sae * chunk * d_in.
        every: the term is computed at every so many steps, and is 0 between them.
    """

    kind: Literal["orthogonality"] = "orthogonality"
    coefficient: PositiveFloat = 0.25
    chunk: int = Field(default=1024, ge=2)
    every: PositiveInt = 1

    def build(self, dims: Dims) -> Orthogonality:
        return Orthogonality(self, dims)


class Orthogonality(LossTerm):
    def __init__(self, config: OrthogonalityConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.d_sae, self.seed = config, dims.d_sae, dims.seed
        self.coefficient = config.coefficient

    def chunks(self, step: int) -> list[Tensor]:
        """The latents of each chunk at a step; their sizes differ by one at most."""
        stream = torch_stream(self.seed, "orthogonality", step)
        order = torch.randperm(self.d_sae, generator=stream, dtype=torch.int64, device="cpu")
        return list(order.tensor_split(-(-self.d_sae // self.config.chunk)))

    def loss(self, p: Pass) -> Tensor:
        w_dec = p.sae.W_dec
        if p.step % self.config.every:
            return p.recon.new_zeros(())
        rows = normalize(w_dec, dim=1)
        nearest = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for latents in self.chunks(p.step):
            inside = latents.to(rows.device)
            some = rows.detach()[inside]
            cosines = some @ some.T
            if p.sae.signed:  # rows of either sign are one direction
                cosines = cosines.abs()
            nearest[inside] = inside[cosines.fill_diagonal_(-torch.inf).argmax(1)]
        cosines = torch.linalg.vecdot(rows, rows[nearest])
        cosines = cosines if p.sae.signed else cosines.clamp_min(0)
        return p.setting(self.coefficient) * cosines.square().mean()
