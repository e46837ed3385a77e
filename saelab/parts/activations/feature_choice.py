"""Feature choice: each latent takes its best rows of a batch. Ayonrinde 2024 (2411.02124).

    training    f = z at the m largest positive z of each latent over the batch; m = k N / d_sae
    inference   f = z 1[z > t_i],   t_i = EMA of the latent's smallest selected value

The paper's mutual choice, k N pairs of the batch with no bound for rows or latents, is `batchtopk`.
Where k N / d_sae is no whole number, the latents whose next value is largest take one row more, so
that a batch has k N pairs; below 1, only these take any. With few rows the choice is coarse: use
batches of several times d_sae / k rows.

Only the abstract could be read: m alike for all latents is its plain form; its m by a Zipf
distribution and aux_zipf_loss are left out. Thresholds for inference are ours, as BatchTopK's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.errors import SettingError
from saelab.kernels import Support, support_above
from saelab.parts.base import (
    Activation,
    Dims,
    Example,
    Form,
    L0Rule,
    PartConfig,
    Pass,
    few,
    nearest_k,
)

if TYPE_CHECKING:
    from saelab.sae import SAEConfig


class FeatureChoiceConfig(PartConfig):
    """k: mean active latents per row; momentum: of the thresholds' EMA."""

    kind: Literal["feature_choice"] = "feature_choice"
    k: PositiveInt = 32
    momentum: float = Field(default=0.99, ge=0, lt=1)

    def build(self, dims: Dims) -> FeatureChoice:
        return FeatureChoice(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(k=few(d_sae)))

    @property
    def target_l0(self) -> float:
        return self.k

    def l0_rule(self, sae: SAEConfig) -> L0Rule:
        return "set"

    def at_l0(self, level: float, sae: SAEConfig) -> FeatureChoiceConfig:
        return self.patched({"k": nearest_k(level)})


class FeatureChoice(Activation):
    couples_batch: ClassVar[bool] = True
    per_latent = ("ema", "count")
    ema: Tensor
    count: Tensor

    def __init__(self, config: FeatureChoiceConfig, dims: Dims) -> None:
        super().__init__()
        if config.k > dims.d_sae:
            raise SettingError("activation.k", config.k, f"must be at most d_sae = {dims.d_sae}")
        self.k, self.momentum = config.k, config.momentum
        self.register_buffer("ema", torch.zeros(dims.n_local, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(dims.n_local, dtype=torch.int64))

    @property
    def threshold(self) -> Tensor:
        weight = 1 - torch.pow(self.momentum, self.count.double())
        return (self.ema / weight.clamp_min(1e-12)).float()

    def floor(self) -> Tensor:
        return self.threshold.clamp_min(0)

    def _chosen(self, z: Tensor) -> Tensor:
        """Pairs that the latents take; bool [N, d_sae]."""
        n, d_sae = z.shape
        each, rest = divmod(self.k * n, d_sae)
        best = z.topk(min(n, each + 1), dim=0)
        chosen = torch.zeros_like(z, dtype=torch.bool)
        chosen.scatter_(0, best.indices[:each], True)
        if rest:
            latents = best.values[each].topk(rest).indices
            chosen[best.indices[each, latents], latents] = True
        return chosen & (z > 0)

    def dense(self, z: Tensor) -> Tensor:
        return z * (self._chosen(z.detach()) if self.training else z > self.floor())

    def support(self, z: Tensor) -> Support | None:
        if not self.training:
            return support_above(z, self.floor())
        return support_above(torch.where(self._chosen(z), z, -1.0))

    def at(self, values: Tensor, support: Support) -> Tensor:
        if not self.training:
            return values * (values > self.floor()[support.latents])
        return torch.relu(values)

    def update(self, p: Pass) -> None:
        values, support = p.code.values.detach(), p.code.support
        least = self.ema.new_full(self.ema.shape, math.inf)
        if support is None:
            least = torch.where(values > 0, values, math.inf).amin(0)
        else:
            on = values > 0
            least.scatter_reduce_(0, support.latents[on], values[on], "amin")
        fired = least < math.inf
        new = self.momentum * self.ema + (1 - self.momentum) * least
        self.ema.copy_(torch.where(fired, new, self.ema))
        self.count.add_(fired)

    def forget(self, latents: Tensor) -> None:
        self.ema[latents] = 0
        self.count[latents] = 0

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        """Multiplies the stored thresholds by exp(`by`)."""
        self.ema.mul_(math.exp(by))
        return True

    def export(self) -> Form:
        return Form(threshold=self.floor())
