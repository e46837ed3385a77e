"""Keeps L0 at a target by adjusting the sparsity coefficient while the cell trains.

A controller of the coefficient's logarithm with a proportional term, two integrals and a lead:

    e_t     = clip(log(L0_t / target_t), -LARGEST, LARGEST)     L0_t: EMA of the batch's L0
    log c_t = I_t + proportional * e_t + lead * (1 - rate_t)    rate_t: share of the learning rate
    I_t     = I_{t-1} + d_t + integral * e_t / T                T = max(steps, SHORT)
    d_t     = d_{t-1} + drift * e_t / T^2   where |e_t| < NEAR and target_t has arrived
            = FORGET * d_{t-1}              elsewhere

    target_t = target * exp(correction)

The correction is 0 but where held-out text has another L0 than training batches by more than 5%
(saelab/training/calibration_text.py). target_t falls geometrically from the first batch's L0 to the
target over the first `warmup` share of the run: the sparsity warm-up. The controller replaces trial
runs for each arm's penalty: every arm reaches the same L0 by the same rule (docs/decisions/0002).

Why a lead and two integrals: the coefficient that holds an L0 rises while the learning rate falls,
by 15 to 36% on the embedded model. One integral follows a rise of r per step at a distance,
integral * e / T = r, which was 2.6% of L0 at r = 0.3 / 391, T = 2000 and a gain of 60. The lead
makes most of the rise before an error shows, and the second integral learns what is left of r, so
that the error of a steady rise is 0. It learns near the target only: what it learned on the way
there would push L0 past it for hundreds of steps.

Why a small gain and a short EMA: L0 follows the coefficient with a lag where the penalty acts on
weights, and where it moves thresholds under Adam it nearly integrates the distance to the holding
coefficient c*,

    weights      tau d log L0 / dt = s log(c* / c) - log(L0 / target)
    thresholds       d log L0 / dt = b log(c* / c)

The second loop needs integral < T b proportional^2 / 4 to be damped, so the proportional gain must
not be small; Adam's momentum and the EMA delay the first, which with a gain of 6 and an EMA of 0.9
swung by 15% at L0 16. Our choice of gains, by trial at L0 16 to 64: below those at which an arm
swings (a proportional gain of 4 with this EMA, at L0 16); docs/decisions/0015.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from saelab.parts.base import (
    Controller,
    Dims,
    Example,
    L0Rule,
    PartConfig,
    Pass,
    Scalar,
    few,
)

if TYPE_CHECKING:
    from saelab.sae import SAEConfig

#: Steps below which the integral terms no longer quicken. Our choice: in runs of 117 to 512 steps
#: the weights can follow this.
SHORT = 2000
#: The largest error, in log L0, that moves the coefficient. Our choice: where L0 is still far away
#: the coefficient changes at a fixed pace, at which the weights follow.
LARGEST = 0.4
#: Error below which the drift is learned; and what is left of it after a step with a larger one.
#: Our choice: no drift is learned from the way to the target.
NEAR, FORGET = 0.06, 0.95


class L0TargetConfig(PartConfig):
    """Settings of the controller.

    Args:
        name: the setting that it owns.
        target: mean number of active latents per row.
        start: first value of the coefficient.
        warmup: share of the run over which the target falls.
        proportional, integral, drift: gains.
        lead: rise of the coefficient's logarithm while the learning rate falls to 0.
        smoothing: weight of the past in the EMA of log L0.
    """

    kind: Literal["l0_target"] = "l0_target"
    name: str = "sparsity"
    target: PositiveFloat = 32
    start: PositiveFloat = 1e-2
    warmup: float = Field(default=0.15, gt=0, le=1)
    proportional: float = Field(default=2.5, ge=0)
    integral: float = Field(default=150.0, ge=0)
    drift: float = Field(default=800.0, ge=0)
    lead: float = Field(default=0.2, ge=0)
    smoothing: float = Field(default=0.7, ge=0, lt=1)

    def build(self, dims: Dims) -> L0Target:
        return L0Target(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(target=few(d_sae)), {"losses": [{"kind": "l1"}]})

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
    follows_text = True
    state: Tensor

    def __init__(self, config: L0TargetConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.steps, self.name = config, dims.steps, config.name
        self.correction = 0.0
        # integral term, its drift per step, EMA of log L0, log of the first L0, log of the value
        start = [math.log(config.start), 0.0, math.nan, math.nan, math.log(config.start)]
        self.register_buffer("state", torch.tensor(start, dtype=torch.float64, device="cpu"))

    def value(self, step: int) -> float:
        return math.exp(float(self.state[4]))

    def update(self, p: Pass) -> None:
        c, horizon = self.config, max(self.steps, SHORT)
        integral, drift, smooth, first, _ = self.state.tolist()
        now = math.log(max(p.l0, 1e-3))
        smooth = now if math.isnan(smooth) else c.smoothing * smooth + (1 - c.smoothing) * now
        first = now if math.isnan(first) else first
        share = min(1.0, (p.step + 1) / max(1.0, c.warmup * self.steps))
        target = math.log(c.target) + self.correction
        target += (1 - share) * max(0.0, first - math.log(c.target))
        error = max(-LARGEST, min(LARGEST, smooth - target))
        if abs(error) < NEAR and share == 1.0:
            drift += c.drift * error / horizon**2
        else:
            drift *= FORGET
        integral += drift + c.integral * error / horizon
        value = integral + c.proportional * error + c.lead * (1 - p.rate)
        self.state.copy_(self.state.new_tensor([integral, drift, smooth, first, value]))

    def scalars(self) -> dict[str, float]:
        return {self.name: self.value(0)}
