"""AuxK: dead latents learn what the living ones leave over. Gao et al. 2024, app. A.2.

    e = x - x_hat;   e_hat = sum over the k_aux largest pre-activations among dead latents
    coefficient * |e - e_hat|^2 / |e|^2

A latent is dead when it has not fired for `dead_after` rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from saelab.kernels import decode_at, kernels_for, support_of_topk
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class AuxKConfig(PartConfig):
    """k: auxiliary latents per row (d_in / 2 when None); dead_after: in rows."""

    kind: Literal["auxk"] = "auxk"
    coefficient: PositiveFloat = 1 / 32
    k: PositiveInt | None = None
    dead_after: PositiveInt = 50_000

    def build(self, dims: Dims) -> AuxK:
        return AuxK(self, dims)


class AuxK(LossTerm):
    uses_preactivations = True
    silent: Tensor

    def __init__(self, config: AuxKConfig, dims: Dims) -> None:
        super().__init__()
        self.coefficient, self.dead_after = config.coefficient, config.dead_after
        self.k = config.k or max(1, dims.d_in // 2)
        self.register_buffer("silent", torch.zeros(dims.d_sae, dtype=torch.int64))

    def loss(self, p: Pass) -> Tensor:
        dead = (self.silent > self.dead_after).nonzero().flatten()
        if not dead.numel():
            return p.recon.new_zeros(())
        error = (p.target - p.recon).detach()
        k = min(self.k, dead.numel())
        chosen = kernels_for(p.z.device).topk(p.z[:, dead], k)
        support = support_of_topk(dead[chosen], p.z.shape[1])
        values = torch.relu(p.sae.encode_at(p.u, support))
        left = error - decode_at(values, p.sae.W_dec, support)
        share = left.square().sum() / error.square().sum().clamp_min(1e-12)
        return p.setting(self.coefficient) * share

    def update(self, p: Pass) -> None:
        fired = p.code.firings > 0
        self.silent.add_(p.n).masked_fill_(fired, 0)

    def forget(self, latents: Tensor) -> None:
        self.silent[latents] = 0
