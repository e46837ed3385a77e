"""ReLU: f = max(z, 0). Bricken et al. 2023."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saelab.kernels import Support, support_above
from saelab.parts.base import Activation, Dims, Form, PartConfig


class ReLUConfig(PartConfig):
    """Has no settings."""

    kind: Literal["relu"] = "relu"

    def build(self, dims: Dims) -> ReLU:
        return ReLU()

    @classmethod
    def of_form(cls, form: Form) -> ReLUConfig | None:
        other = (form.threshold, form.k, form.affine, form.pursuit)
        return cls() if all(part is None for part in other) else None


class ReLU(Activation):
    shardable = True

    def dense(self, z: Tensor) -> Tensor:
        return torch.relu(z)

    def support(self, z: Tensor) -> Support | None:
        return support_above(z)

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values)

    def floor(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device="cpu")

    def selection_floor(self) -> Tensor:
        return self.floor()

    def export(self) -> Form:
        return Form()
