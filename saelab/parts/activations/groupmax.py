"""GroupMax: the largest pre-activation of each of k groups. sparsify (EleutherAI), `groupmax`.

    f_i = max(z_i, 0) where z_i is the largest of its group, else 0

The groups are k runs of d_sae / k consecutive latents. A row has at most k active latents, and
latents of one group are never active together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import Support, support_of_topk
from saelab.parts.base import Activation, Dims, Example, L0Rule, PartConfig, Refusal, few, nearest_k

if TYPE_CHECKING:
    from saelab.sae import SAEConfig


def nearest_divisor(k: int, d_sae: int) -> int:
    """The divisor of d_sae that is nearest to k."""
    small = [i for i in range(1, int(d_sae**0.5) + 1) if d_sae % i == 0]
    return min((*small, *(d_sae // i for i in small)), key=lambda divisor: abs(divisor - k))


class GroupMaxConfig(PartConfig):
    """k: number of groups, which divides d_sae."""

    kind: Literal["groupmax"] = "groupmax"
    k: PositiveInt = 32

    def build(self, dims: Dims) -> GroupMax:
        return GroupMax(self.k, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(k=nearest_divisor(few(d_sae), d_sae)))

    @property
    def target_l0(self) -> float:
        return self.k

    def l0_rule(self, sae: SAEConfig) -> L0Rule:
        return "set"

    def at_l0(self, level: float, sae: SAEConfig) -> GroupMaxConfig:
        return self.patched({"k": nearest_k(level)})


class GroupMax(Activation):
    exact_k: ClassVar[bool] = True

    def __init__(self, k: int, dims: Dims) -> None:
        super().__init__()
        if k > dims.d_sae:
            raise SettingError("activation.k", k, f"must be at most d_sae = {dims.d_sae}")
        if dims.d_sae % k:
            remedy = (
                f"does not divide d_sae = {dims.d_sae} into groups of one size: use "
                f"{nearest_divisor(k, dims.d_sae)}"
            )
            raise SettingError("activation.k", k, remedy)
        self.k = k

    def _chosen(self, z: Tensor) -> Tensor:
        """The latent of each group that is largest; int64 [N, k]."""
        size = z.shape[1] // self.k
        first = torch.arange(0, z.shape[1], size, dtype=torch.int64, device=z.device)
        return z.unflatten(1, (self.k, size)).argmax(-1) + first

    def dense(self, z: Tensor) -> Tensor:
        latents = self._chosen(z.detach())
        return torch.zeros_like(z).scatter(-1, latents, torch.relu(z.gather(-1, latents)))

    def support(self, z: Tensor) -> Support | None:
        return support_of_topk(self._chosen(z), z.shape[1])

    def at(self, values: Tensor, support: Support) -> Tensor:
        return torch.relu(values)

    def export(self) -> Refusal:
        return Refusal("takes the largest latent of each group, which no standard SAE does")
