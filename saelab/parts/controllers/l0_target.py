"""Keeps L0 at a target by adjusting the sparsity coefficient while the cell trains.

A proportional-integral controller on the logarithm of the coefficient:

    e_t       = clip(log(L0_t / target_t), -1, 1)       L0_t: EMA of the batch's L0
    log c_t   = I_t + proportional * e_t,    I_t = I_{t-1} + integral * e_t / max(steps, SHORT)

target_t falls geometrically from the first batch's L0 to the target over the first `warmup` share
of the run: the sparsity warm-up. The controller replaces trial runs for each arm's penalty: every
arm reaches the same L0 by the same rule (docs/decisions/0002). Our choice of gains: the largest
that neither overshoot nor oscillate on the embedded model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from saelab.parts.base import Controller, Dims, L0Rule, PartConfig, Pass, Scalar

if TYPE_CHECKING:
    from saelab.sae import SAEConfig

#: Steps below which the integral term no longer quickens. Our choice: in runs of 117 to 512 steps
#: the weights can follow this, and L0 still arrives within 3% of the target.
SHORT = 2000


class L0TargetConfig(PartConfig):
    """Settings of the controller.

    Args:
        name: the setting that it owns.
        target: mean number of active latents per row.
        start: first value of the coefficient.
        warmup: share of the run over which the target falls.
    """

    kind: Literal["l0_target"] = "l0_target"
    name: str = "sparsity"
    target: PositiveFloat = 32
    start: PositiveFloat = 1e-2
    warmup: float = Field(default=0.15, gt=0, le=1)
    proportional: float = Field(default=1.0, ge=0)
    integral: float = Field(default=60.0, ge=0)
    smoothing: float = Field(default=0.9, ge=0, lt=1)

    def build(self, dims: Dims) -> L0Target:
        return L0Target(self, dims)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {self.name: Scalar("coefficient that holds the L0 at its target", "state")}

    @property
    def target_l0(self) -> float:
        return self.target

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Sets nothing where no part has the coefficient."""
        return "set" if sae.has_user(self.name) else None

    def at_l0(self, level: float, sae: SAEConfig) -> L0TargetConfig:
        return self.patched({"target": level})


class L0Target(Controller):
    shardable = True
    state: Tensor

    def __init__(self, config: L0TargetConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.steps, self.name = config, dims.steps, config.name
        # integral term, EMA of log L0, log of the first L0, last error
        start = [math.log(config.start), math.nan, math.nan, 0.0]
        self.register_buffer("state", torch.tensor(start, dtype=torch.float64))

    def value(self, step: int) -> float:
        integral, _, _, error = self.state.tolist()
        return math.exp(integral + self.config.proportional * error)

    def update(self, p: Pass) -> None:
        c = self.config
        integral, smooth, first, _ = self.state.tolist()
        now = math.log(max(p.l0, 1e-3))
        smooth = now if math.isnan(smooth) else c.smoothing * smooth + (1 - c.smoothing) * now
        first = now if math.isnan(first) else first
        share = min(1.0, (p.step + 1) / max(1.0, c.warmup * self.steps))
        target = math.log(c.target) + (1 - share) * max(0.0, first - math.log(c.target))
        error = max(-1.0, min(1.0, smooth - target))
        integral += c.integral * error / max(self.steps, SHORT)
        self.state.copy_(self.state.new_tensor([integral, smooth, first, error]))

    def scalars(self) -> dict[str, float]:
        return {self.name: self.value(0)}
