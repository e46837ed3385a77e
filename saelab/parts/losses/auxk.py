"""AuxK: dead latents learn what the living ones leave over. Gao et al. 2024, app. A.2.

    e = x - x_hat;   e_hat = sum over the k_aux largest pre-activations among dead latents
    coefficient * |e - e_hat|^2 / |e|^2

Where codes are signed, the largest are those in size. A latent is dead when it has not fired for
`dead_after` rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from saelab.kernels import Support, decode_at, kernels_for, support_of_topk, topk_over_ranks
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass


class AuxKConfig(PartConfig):
    """k: auxiliary latents per row (d_out / 2 when None); dead_after: in rows."""

    kind: Literal["auxk"] = "auxk"
    coefficient: PositiveFloat = 1 / 32
    k: PositiveInt | None = None
    dead_after: PositiveInt = 50_000

    def build(self, dims: Dims) -> AuxK:
        return AuxK(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(dead_after=100))


class AuxK(LossTerm):
    uses_preactivations = True
    reads_them_rarely = True  # where latents are dead
    shardable = True
    per_latent = ("silent",)
    silent: Tensor

    def __init__(self, config: AuxKConfig, dims: Dims) -> None:
        super().__init__()
        self.coefficient, self.dead_after = config.coefficient, config.dead_after
        self.k = config.k or max(1, dims.d_out // 2)
        self.register_buffer("silent", torch.zeros(dims.n_local, dtype=torch.int64))

    def loss(self, p: Pass) -> Tensor:
        dead = (self.silent > self.dead_after).nonzero().flatten()
        _, count = self.ranks.before(dead.numel())
        if not count:
            return p.recon.new_zeros(())
        error = (p.target - p.recon).detach()
        signed = p.sae.activation.signed
        sizes = p.z[:, dead].abs() if signed else p.z[:, dead]
        support = self._chosen(sizes, dead, min(self.k, count))
        values = p.sae.encode_at(p.u, support)
        values = values if signed else torch.relu(values)
        left = error - self.ranks.over_latents(decode_at(values, p.sae.W_dec, support))
        energy = self.ranks.over_rows(error.square().sum())
        return p.setting(self.coefficient) * (left.square().sum() / energy.clamp_min(1e-12))

    def _chosen(self, sizes: Tensor, dead: Tensor, k: int) -> Support:
        """The k largest of each row's pre-activations of the dead latents, [N, dead]."""
        latents = len(self.silent)
        if self.ranks.latents == 1:
            return support_of_topk(dead[kernels_for(sizes.device).topk(sizes, k)], latents)
        among = topk_over_ranks(sizes, k, self.ranks)
        return Support(among.offsets, dead[among.latents], latents)

    def update(self, p: Pass) -> None:
        fired = p.firings > 0
        self.silent.add_(p.n).masked_fill_(fired, 0)

    def forget(self, latents: Tensor) -> None:
        self.silent[latents] = 0
