"""AbsTopK: the k pre-activations of a row that are largest in size, with their signs.

f_i = z_i if |z_i| is among the k largest of its row, else 0; Zhu et al. 2025 (2510.00404), eq. 10

A latent fires in both directions of its decoder row. Where k is the name of a setting it follows
that controller, one step behind; the last k is stored for inference.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from saelab.kernels import Support, kernels_for, support_of_topk, topk_over_ranks
from saelab.parts.base import Dims, Form
from saelab.parts.following import FollowsK, KConfig


class AbsTopKConfig(KConfig):
    """k: active latents per row, or the name of the controller that sets it."""

    kind: Literal["abs_topk"] = "abs_topk"

    def build(self, dims: Dims) -> AbsTopK:
        return AbsTopK(self, dims)

    @classmethod
    def of_form(cls, form: Form) -> AbsTopKConfig | None:
        return cls(k=form.k) if form.k is not None and form.signed else None


class AbsTopK(FollowsK):
    exact_k: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    shardable = True

    def dense(self, z: Tensor) -> Tensor:
        latents = z.detach().abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter(-1, latents, z.gather(-1, latents))

    def support(self, z: Tensor) -> Support | None:
        if self.ranks.latents > 1:
            return topk_over_ranks(z.abs(), self.k, self.ranks)
        return support_of_topk(kernels_for(z.device).topk(z.abs(), self.k), z.shape[-1])

    def at(self, values: Tensor, support: Support) -> Tensor:
        return values.clone()

    def export(self) -> Form:
        return Form(k=self.k, signed=True)
