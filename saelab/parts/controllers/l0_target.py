"""Keeps L0 at a target by adjusting the sparsity coefficient while the cell trains.

A controller with a proportional term and two integrals, on the logarithm of the coefficient:

    e_t     = clip(log(L0_t / target_t), -LARGEST, LARGEST)     L0_t: EMA of the batch's L0
    log c_t = I_t + proportional * e_t
    I_t     = I_{t-1} + d_t + integral * e_t / T                T = max(steps, SHORT)
    d_t     = d_{t-1} + drift * clip(e_t, -SLOW, SLOW) / T^2    once target_t has arrived

target_t falls geometrically from the first batch's L0 to the target over the first `warmup` share
of the run: the sparsity warm-up. The controller replaces trial runs for each arm's penalty: every
arm reaches the same L0 by the same rule (docs/decisions/0002).

The coefficient that holds an L0 is not constant: as the learning rate falls it rises by a steady
r per step. With one integral the L0 would end e = r T / integral beside the target, where
integral * e / T = r (2.5% for ReLU at a gain of 60). The second integral learns r, so that the
error of a steady rise is 0. Two integrals need damping. L0 follows the coefficient with a lag where
the penalty acts on weights, and where it moves thresholds under Adam nearly integrates it,

    lag         d log L0 / dt = (s log(c* / c) - log(L0 / target)) / tau
    integrator  d log L0 / dt = b log(c* / c)

and the loop is stable (Routh) where drift < integral T (1 + s proportional) / tau, or for the
integrator integral < b T proportional^2 and so on: a large proportional gain holds both. Our choice
of gains: those that hold L0 on the embedded model within 1% from the middle of the run on for ReLU,
JumpReLU and ideas A and B, by a factor of about 2 below those at which JumpReLU oscillates.
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
        # integral term, its drift per step, EMA of log L0, log of the first L0, log of the value
        start = [math.log(config.start), 0.0, math.nan, math.nan, math.log(config.start)]
        self.register_buffer("state", torch.tensor(start, dtype=torch.float64))

    def value(self, step: int) -> float:
        return math.exp(float(self.state[4]))

    def update(self, p: Pass) -> None:
        c, horizon = self.config, max(self.steps, SHORT)
        integral, drift, smooth, first, _ = self.state.tolist()
        now = math.log(max(p.l0, 1e-3))
        smooth = now if math.isnan(smooth) else c.smoothing * smooth + (1 - c.smoothing) * now
        first = now if math.isnan(first) else first
        share = min(1.0, (p.step + 1) / max(1.0, c.warmup * self.steps))
        target = math.log(c.target) + (1 - share) * max(0.0, first - math.log(c.target))
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
