"""TopK: the k largest pre-activations of a row, negative ones set to zero. Gao et al. 2024, eq. 5.

f_i = max(z_i, 0) if z_i is among the k largest of its row, else 0

Where k is the name of a setting it follows that controller, one step behind; the last k is stored
for inference.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from saelab.kernels import Support, kernels_for, support_of_topk, topk_over_ranks
from saelab.parts.base import Dims, Form
from saelab.parts.following import FollowsK, KConfig


class TopKConfig(KConfig):
    """k: active latents per row, or the name of the controller that sets it."""

    kind: Literal["topk"] = "topk"
    k_means: ClassVar[str] = "latents per token, of TopK"

    def build(self, dims: Dims) -> TopK:
        return TopK(self, dims)

    @classmethod
    def of_form(cls, form: Form) -> TopKConfig | None:
        return None if form.k is None or form.signed else cls(k=form.k)


class TopK(FollowsK):
    exact_k: ClassVar[bool] = True
    shardable = True

    def dense(self, z: Tensor) -> Tensor:
        values, latents = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, latents, torch.relu(values))

    def support(self, z: Tensor) -> Support | None:
        if self.ranks.latents > 1:
            return topk_over_ranks(z, self.k, self.ranks)
        return support_of_topk(kernels_for(z.device).topk(z, self.k), z.shape[-1])

    def selection_k(self) -> int:
        return self.k

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values)

    def export(self) -> Form:
        return Form(k=self.k)
