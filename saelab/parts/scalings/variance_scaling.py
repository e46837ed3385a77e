"""Idea A at the input: per-dimension variance raised to a temperature, and two global scalars.

    s_j = ((v_j + eps) / vbar)^(-tau)   v_j running variance, vbar geometric mean, eps 1e-6 mean v
    u   = beta * s * (x - b_dec) + theta     z = W_enc u + b_enc

tau 0 is no scaling, 0.5 unit variance, 1 over-corrects. At inference this is a standard SAE:

    W_enc' = W_enc diag(beta s),   b_enc' = b_enc + theta * W_enc 1

so what it can change is the optimisation, not the set of functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from saelab.errors import SettingError
from saelab.parts.base import (
    Dims,
    Example,
    LossTerm,
    PartConfig,
    Pass,
    Scalar,
    Scaling,
    Stored,
    log_spread,
    measurement,
)
from saelab.parts.scalings.temperature import Temperature, TemperatureFields


class VarianceScalingConfig(TemperatureFields):
    """Settings of idea A1.

    Args:
        tau, temperature, tau_end, rate, tau_lr: of the variance's temperature (temperature.py).
        statistics: 'running' (EMA, frozen for inference) or 'batch' (a control: a token's code then
            depends on its batch).
        tying: 'global' (one beta and theta), 'per_feature' (vectors over input dimensions), 'scale'
            (one beta alone), 'off'.
        beta, theta: where they start.
        momentum: of the running variance.
        start: 'function' starts as the same function as the unscaled SAE; 'scaled' starts with
            W_enc = W_dec before scaling.
        literal: the idea's first sketch: x / (var + 1e-6)^tau without the geometric mean.
    """

    kind: Literal["variance"] = "variance"
    statistics: Literal["running", "batch"] = "running"
    tying: Literal["global", "per_feature", "scale", "off"] = "global"
    beta: float = 1.0
    theta: float = 0.0
    momentum: float = Field(default=0.99, ge=0, lt=1)
    start: Literal["function", "scaled"] = "function"
    literal: bool = False

    def build(self, dims: Dims) -> VarianceScaling:
        return VarianceScaling(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        each = cls(tying="per_feature", temperature="learned_schedule", tau_end=0.1)
        return cls.example(d_sae), Example(each), Example(cls(statistics="batch"))

    @property
    def logged(self) -> Mapping[str, Scalar]:
        spread = measurement("standard deviation of log variance over input dimensions")
        return {
            "beta": Scalar("factor of the scaled input"),
            "theta": Scalar("shift of the scaled input", free_sign=self.theta == 0),
            "tau": self.temperature_scalar,
            **self.schedule_scalars,
            **({"spread": spread} if self.statistics == "running" else {}),
        }


class VarianceScaling(Scaling):
    variance: Tensor

    def __init__(self, config: VarianceScalingConfig, dims: Dims) -> None:
        super().__init__()
        if config.start == "function" and config.beta == 0:
            raise SettingError("scaling.beta", 0, "can't start as a function: set start = 'scaled'")
        self.config, self.lr = config, config.lr
        self.keeps_start = config.start == "function"
        self.register_buffer("variance", torch.ones(dims.d_in, dtype=torch.float32))
        shape = (dims.d_in,) if config.tying == "per_feature" else ()
        learned = config.tying != "off"
        self.beta = nn.Parameter(
            torch.full(shape, config.beta, dtype=torch.float32), requires_grad=learned
        )
        shifts = learned and config.tying != "scale"
        self.theta = nn.Parameter(
            torch.full(shape, config.theta, dtype=torch.float32), requires_grad=shifts
        )
        self.temperature = Temperature(config)

    def learned(self) -> dict[str, nn.Parameter]:
        named = {"beta": self.beta, "theta": self.theta}
        trained = {name: p for name, p in named.items() if p.requires_grad}
        return trained | self.temperature.learned()

    def stored(self) -> dict[str, tuple[Stored, ...]]:
        names = ("beta", "theta")
        places = {name: (Stored(p),) for name, p in self.learned().items() if name in names}
        return places | self.temperature.stored()

    @property
    def shardable(self) -> bool:  # type: ignore[override]
        """False with the batch's statistics, which would be those of one rank's rows."""
        return self.config.statistics == "running"

    @property
    def foldable(self) -> bool:  # type: ignore[override]
        return self.config.statistics == "running"

    def gain(self, variance: Tensor) -> Tensor:
        """s of the module's equation; [d_in] -> [d_in]."""
        if self.config.literal:
            return (variance + 1e-6).pow(-self.temperature.tau())
        floored = (variance + 1e-6 * variance.mean()).clamp_min(torch.finfo(variance.dtype).tiny)
        centre = floored.log().mean().exp()
        return (floored / centre).pow(-self.temperature.tau())

    def fit(self, sample: Tensor) -> None:
        self.variance.copy_(sample.var(0, correction=0))

    def apply(self, centred: Tensor) -> Tensor:  # type: ignore[override]
        if self.config.statistics == "batch":
            variance = _variance(centred.detach())
        else:
            variance = self.variance
        return torch.addcmul(self.theta, centred, self.beta * self.gain(variance))

    def update(self, p: Pass) -> None:
        if self.config.statistics == "running":
            variance = p.mean((p.x - p.mean(p.x)).square_())
            self.variance.lerp_(variance, 1 - self.config.momentum)
        self.temperature.move_on(p.step, p.steps)

    def fold(self) -> tuple[Tensor, Tensor]:
        gain = (self.beta * self.gain(self.variance)).detach()
        return gain, self.theta.detach().expand_as(gain)

    def metric(self) -> Tensor:
        return self.gain(self.variance).detach()

    def learned_gains(self) -> tuple[Tensor, Tensor] | None:
        if self.config.tying != "per_feature":
            return None
        return self.variance, self.beta * self.gain(self.variance)

    def scalars(self) -> dict[str, float]:
        """`spread` is the standard deviation of log v_j; batch statistics keep no v."""
        values = {
            "beta": float(self.beta.detach().mean()),
            "theta": float(self.theta.detach().mean()),
        }
        if self.config.statistics == "running":
            values["spread"] = float(log_spread(self.variance))
        return values | self.temperature.scalars()


def _variance(x: Tensor) -> Tensor:
    """Variance of each column by its definition; [n, d] -> [d]. Torch's is several times slower."""
    return (x - x.mean(0)).square_().mean(0)


class ScalarPriorConfig(PartConfig):
    """c_beta (beta - beta_0)^2 + c_theta (theta - theta_0)^2, mean over features if per feature."""

    kind: Literal["scalar_prior"] = "scalar_prior"
    c_beta: float = Field(default=1e-3, ge=0)
    c_theta: float = Field(default=1e-3, ge=0)
    beta_0: float = 1.0
    theta_0: float = 0.0

    def build(self, dims: Dims) -> ScalarPrior:
        return ScalarPrior(self)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"scaling": {"kind": "variance"}}


class ScalarPrior(LossTerm):
    shardable = True

    def __init__(self, config: ScalarPriorConfig) -> None:
        super().__init__()
        self.config = config

    def loss(self, p: Pass) -> Tensor:
        scaling, c = p.sae.scaling, self.config
        if not isinstance(scaling, VarianceScaling):
            return p.recon.new_zeros(())
        beta = (scaling.beta - c.beta_0).square().mean()
        theta = (scaling.theta - c.theta_0).square().mean()
        return p.share(c.c_beta * beta + c.c_theta * theta)
