"""ReLU: f = max(z, 0). Bricken et al. 2023."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from saelab.kernels import Support, support_above
from saelab.parts.base import Activation, Dims, PartConfig


class ReLUConfig(PartConfig):
    kind: Literal["relu"] = "relu"

    def build(self, dims: Dims) -> ReLU:
        return ReLU()


class ReLU(Activation):
    shardable = True

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z)

    def support(self, z: Tensor) -> Support | None:
        return support_above(z)

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values)

    def floor(self) -> Tensor:
        return torch.zeros(())

    def export(self) -> dict[str, Any]:
        return {"architecture": "standard"}
