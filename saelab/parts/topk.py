"""TopK: the k largest pre-activations of a row, negative ones set to zero. Gao et al. 2024, eq. 5.

f_i = max(z_i, 0) if z_i is among the k largest of its row, else 0
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import Support, kernels_for, support_of_topk
from saelab.parts.base import Activation, Dims, PartConfig


class TopKConfig(PartConfig):
    """k: active latents per row."""

    kind: Literal["topk"] = "topk"
    k: PositiveInt = 32

    def build(self, dims: Dims) -> TopK:
        return TopK(self.k, dims)


class TopK(Activation):
    exact_k: ClassVar[bool] = True

    def __init__(self, k: int, dims: Dims) -> None:
        super().__init__()
        if k > dims.d_sae:
            raise SettingError("activation.k", k, f"must be at most d_sae = {dims.d_sae}")
        self.k = k

    def dense(self, z: Tensor) -> Tensor:
        values, latents = z.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(z).scatter(-1, latents, torch.relu(values))

    def support(self, z: Tensor) -> Support | None:
        return support_of_topk(kernels_for(z.device).topk(z, self.k), z.shape[-1])

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values)

    def export(self) -> dict[str, Any]:
        return {"architecture": "topk", "k": self.k}
