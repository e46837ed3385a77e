"""Idea A at the threshold: one global pair of scalars, scaled by each latent's own spread.

    f_t   = z_t 1[z_t > thr_t]
    thr_t = u max(theta + gamma rest + beta a_{t-1}, theta / 4)
    u     = sdbar^(1 - 2 tau) sd^(2 tau)  sd EMA standard deviation of z, sdbar its geometric mean
    r_t   = z_t 1[z_t > theta u] / sd     rest EMA mean of r
    a_t   = rho a_{t-1} + (1 - rho)(r_t - rest),   a = 0 where a segment of tokens begins
    rho   = min(sigmoid(rho_0 - T log(sd^2 / sdbar^2)), 1 - 4 / context)

A latent that has fired more than it does at rest has a higher threshold for a while (beta > 0, as
in neurons with spike-frequency adaptation, Bellec et al. 2018) or a lower one (beta < 0). theta,
beta, gamma, rho_0 and T are single dimensionless numbers; sd, sdbar, rest and the trace a are
constants for the gradient. With beta = 0 this is a JumpReLU with one number for all thresholds.

Gradients to the threshold are JumpReLU's straight-through ones (Rajamanoharan et al. 2024b, eq.
11-12) with a bandwidth that is scaled like the threshold, K the box kernel:

    theta, gamma, tau   -(thr / h) K((z - thr) / h) g         g = dL/df
    beta, rho_0, T      the same with g + 2 / (N d) (thr / 2 - f) for g: the gradient half way up
                        the step, because f jumps by thr and the loss is quadratic in it

The second needs unit-norm decoder rows, which the tying needs too: free norms would undo it. The
trace is one pass over the pre-activations (`kernels`), which carries da/drho along; the gradient
from the trace into the encoder is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from saelab.errors import SettingError
from saelab.kernels import Adaptation, Support, gate, kernels_for, moments, trace
from saelab.parts.base import (
    Activation,
    Dims,
    Example,
    Form,
    Pass,
    Refusal,
    Scalar,
    Stored,
    log_spread,
    measurement,
)
from saelab.parts.scalings.temperature import Temperature, TemperatureFields

if TYPE_CHECKING:
    from saelab.sae import SAE

Learnable = Literal["theta", "beta", "gamma", "rho", "T"]
#: Lowest threshold, as a share of theta u.
LOWEST = 0.25
#: Latents whose mean drive is above this share of the average one count as living.
LIVING = 1e-4
#: Smallest variance that is divided by, as a share of the mean one.
FLOOR = 1e-6


class TiedThresholdConfig(TemperatureFields):
    """Settings of idea A2.

    Args:
        theta, beta, gamma, rho, T: where the scalars start; rho in (0, 1) is that of a latent with
            the mean variance.
        learned: which of them are trained. With beta 0 and not among them thresholds don't move;
            otherwise batches of whole contexts are needed.
        tying: 'global' (one theta and one beta) or 'per_feature' (one for each latent).
        trace: 'own'; 'permuted' drives each segment's trace by another segment of the batch (a
            control: the same statistics without its own past); 'mean' replaces the trace by its
            mean, 0 (the static twin).
        bandwidth: of the kernel, in units of u.
        momentum: of sd and of rest.
        context: positions of a context, which bound rho.
    """

    kind: Literal["tied_threshold"] = "tied_threshold"
    theta: PositiveFloat = 0.5
    beta: float = 0.0
    gamma: float = 0.0
    rho: float = Field(default=0.8, gt=0, lt=1)
    T: float = 0.0
    learned: tuple[Learnable, ...] = ("theta",)
    tying: Literal["global", "per_feature"] = "global"
    trace: Literal["own", "permuted", "mean"] = "own"
    bandwidth: PositiveFloat = 0.5
    momentum: float = Field(default=0.99, ge=0, lt=1)
    context: PositiveInt = 128
    lr: NonNegativeFloat | None = 1e-2

    def build(self, dims: Dims) -> TiedThreshold:
        return TiedThreshold(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        driven = cls(gamma=0.3, learned=("theta", "gamma"), temperature="learned")
        return cls.example(d_sae), Example(driven, driven.companions)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {
            "beta": Scalar("how strongly the trace moves the thresholds"),
            "theta": Scalar("threshold in units of each latent's spread"),
            "tau": self.temperature_scalar,
            "rho": Scalar("decay of the trace per token"),
            "gamma": Scalar("how strongly the mean drive moves the thresholds", reported=False),
            "T": Scalar("how the decay depends on the variance", reported=False),
            **self.schedule_scalars,
            "spread": measurement("standard deviation of log variance over living latents"),
        }

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"constraints": [{"kind": "unit_norm", "weight": "decoder"}]}


@dataclass(eq=False)
class TracedSupport(Support):
    """A support with the trace at each pair.

    Args:
        trace, slope: a before the row and da / drho, float32 [nnz].
        moments: sums over the batch's rows of z, z^2 and r, float32 [3, d_sae].
    """

    trace: Tensor
    slope: Tensor
    moments: Tensor


class _TiedJump(torch.autograd.Function):
    """z 1[z > thr]; `plain` and `midway` both hold thr and get the two gradients."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, plain: Tensor, midway: Tensor, width: Tensor, curvature: float
    ) -> Tensor:
        ctx.save_for_backward(z, plain, width)
        ctx.curvature = curvature
        return z * (z > plain)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (g,) = grads
        z, threshold, width = ctx.saved_tensors
        fires = z > threshold
        near = ((z - threshold).abs() < width / 2) * (-threshold / width)
        g_midway = g + ctx.curvature * (threshold / 2 - z * fires)
        return g * fires, near * g, near * g_midway, None, None


class TiedThreshold(Activation):
    fitted: ClassVar[bool] = True
    variance: Tensor
    rest: Tensor

    def __init__(self, config: TiedThresholdConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.lr, self.dims = config, config.lr, dims
        each = ("log_theta", "beta") if config.tying == "per_feature" else ()
        self.per_latent = ("variance", "rest", *each)
        self.survives_reset = self.per_latent  # a new latent begins as the average one
        shape = (dims.d_sae,) if config.tying == "per_feature" else ()

        def scalar(name: Learnable, value: float, shape: tuple[int, ...] = ()) -> nn.Parameter:
            return nn.Parameter(
                torch.full(shape, value, dtype=torch.float32), requires_grad=name in config.learned
            )

        self.log_theta = scalar("theta", math.log(config.theta), shape)
        self.beta = scalar("beta", config.beta, shape)
        self.gamma = scalar("gamma", config.gamma)
        self.rho_0 = scalar("rho", math.log(config.rho / (1 - config.rho)))
        self.T = scalar("T", config.T)
        if self.is_static:  # nothing depends on them
            self.rho_0.requires_grad_(False)
            self.T.requires_grad_(False)
            if config.trace == "mean":
                self.beta.requires_grad_(False)
        self.temperature = Temperature(config)
        self.register_buffer("variance", torch.ones(dims.d_sae, dtype=torch.float32))
        self.register_buffer("rest", torch.zeros(dims.d_sae, dtype=torch.float32))

    @property
    def is_static(self) -> bool:
        """True where thresholds never move along a context."""
        c = self.config
        return c.trace == "mean" or (c.beta == 0 and "beta" not in c.learned)

    @property
    def needs_contexts(self) -> bool:  # type: ignore[override]
        return not self.is_static

    def check(self, sae: SAE) -> None:
        if not any(part.fixes_decoder_norms for part in sae.config.constraints):
            remedy = "free decoder norms undo a tied threshold: add the constraint unit_norm"
            raise SettingError("activation", "tied_threshold", remedy)

    def learned(self) -> dict[str, nn.Parameter]:
        named = {"theta": self.log_theta, "beta": self.beta, "gamma": self.gamma}
        named |= {"rho": self.rho_0, "T": self.T}
        trained = {name: p for name, p in named.items() if p.requires_grad}
        return trained | self.temperature.learned()

    def stored(self) -> dict[str, tuple[Stored, ...]]:
        """Places of the scalars that are trained or not 0, and on which the thresholds depend."""
        places = {"theta": Stored(self.log_theta, "log"), "gamma": Stored(self.gamma)}
        if not self.is_static:
            places |= {"beta": Stored(self.beta), "rho": Stored(self.rho_0, "logit")}
            places |= {"T": Stored(self.T)}
        used = {n: (s,) for n, s in places.items() if s.link != "value" or bool(s.tensor.any())}
        return used | self.temperature.stored()

    # ---- statistics --------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, z: Tensor) -> None:
        """Takes the statistics of the first batch; z [n, d_sae]."""
        self.variance.copy_(z.var(0, correction=0))
        self.rest.copy_(moments(z, self.rule())[2] / len(z))

    def update(self, p: Pass) -> None:
        support = p.code.support
        assert isinstance(support, TracedSupport)
        sums = support.moments / p.n
        weight = 1 - self.config.momentum
        self.variance.lerp_(sums[1] - sums[0].square(), weight)
        self.rest.lerp_(sums[2], weight)
        self.temperature.move_on(p.step, p.steps)

    def forget(self, latents: Tensor) -> None:
        self.variance[latents] = self._spread()[0].square()
        self.rest[latents] = self.rest.mean()

    def _spread(self) -> tuple[Tensor, Tensor]:
        """sdbar, 0-dim, and sd [d_sae]."""
        variance = self.variance.clamp_min(FLOOR * float(self.variance.mean()))
        logs = variance.log() / 2
        return logs[self._living()].mean().exp(), logs.exp()

    def _living(self) -> Tensor:
        """Mask of the latents that count as living; all where none does; bool [d_sae]."""
        living = self.rest > LIVING * self.rest.mean()
        return living if bool(living.any()) else torch.ones_like(living)

    # ---- thresholds --------------------------------------------------------------------------

    def unit(self) -> Tensor:
        """u [d_sae], with a gradient to a learned tau."""
        centre, sd = self._spread()
        return centre * (sd / centre).pow(2 * self.temperature.tau())

    def decay(self) -> Tensor:
        """rho [d_sae], with gradients to rho_0 and T."""
        centre, sd = self._spread()
        most = max(0.0, 1 - 4 / self.config.context)
        return torch.sigmoid(self.rho_0 - 2 * self.T * (sd / centre).log()).clamp_max(most)

    @torch.no_grad()
    def rule(self) -> Adaptation:
        """Inputs of the kernels, without gradient, float32 [d_sae] each."""
        unit, theta = self.unit(), self.log_theta.exp()
        slope = torch.zeros_like(unit) if self.config.trace == "mean" else unit * self.beta
        margin = unit * (self.config.bandwidth / 2 if self.training else 0.0)
        return Adaptation(
            base=unit * (theta + self.gamma * self.rest),
            slope=slope,
            low=LOWEST * unit * theta,
            margin=margin,
            fire=unit * theta,
            per_sd=1 / self._spread()[1],
            rest=self.rest,
            rho=self.decay(),
        )

    def _thresholds(self, support: Support | None, a: Tensor, slope: Tensor) -> _Thresholds:
        """Thresholds at the pairs of a support [nnz], or dense [N, d_sae] without one."""

        def at(x: Tensor) -> Tensor:
            return x if support is None or x.dim() == 0 else x.index_select(0, support.latents)

        theta, unit = self.log_theta.exp(), self.unit()
        level, low, unit = at(theta + self.gamma * self.rest), at(LOWEST * theta), at(unit)
        width = unit.detach() * self.config.bandwidth
        if self.config.trace == "mean":
            plain = (unit * torch.maximum(level, low)).expand_as(a)
            return _Thresholds(plain, plain.detach(), width)
        rho = self.decay()
        through_rho = at(rho - rho.detach()) * slope if rho.requires_grad else 0.0
        moved = at(self.beta) * (a + through_rho)
        plain = unit * torch.maximum(level + moved.detach(), low)
        midway = unit.detach() * torch.maximum(level.detach() + moved, low.detach())
        return _Thresholds(plain, midway, width)

    # ---- the code ----------------------------------------------------------------------------

    def support(self, z: Tensor, starts: Tensor | None = None) -> Support:
        """Returns the pairs; never asks for the dense path, which would store a trace of every
        latent at every row."""
        starts, drivers, rule = self._segments(len(z), starts, z.device)
        traced = kernels_for(z.device).trace_above(z, rule, starts, drivers, z.numel())
        assert traced is not None
        offsets, latents, a, slope, sums = traced
        return TracedSupport(offsets, latents, z.shape[1], trace=a, slope=slope, moments=sums)

    def dense(self, z: Tensor, starts: Tensor | None = None) -> Tensor:
        thresholds = self._dense_thresholds(z, starts)
        return self._jump(z, thresholds, z.shape[0])

    def at(self, values: Tensor, support: Support) -> Tensor:
        return self._jump(values, self._at(support), support.n_rows)

    def gate(self, z: Tensor, support: Support | None) -> Tensor:
        """1[z > thr] with the pseudo-derivative to all scalars; without a support, z [N, d_sae] is
        taken as rows that begin a segment."""
        if support is None:
            nothing = torch.zeros_like(z)
            thresholds = self._thresholds(None, nothing, nothing)
        else:
            thresholds = self._at(support)
        return gate(z, thresholds.whole, thresholds.width)

    def _jump(self, z: Tensor, t: _Thresholds, rows: int) -> Tensor:
        curvature = 2 / (rows * self.dims.d_out)
        return _TiedJump.apply(z, t.plain, t.midway, t.width, curvature)  # type: ignore[return-value]

    def _at(self, support: Support) -> _Thresholds:
        """Thresholds at a support; one chosen by its floors alone (`SAE.codes`) has no trace, and
        needs none."""
        if isinstance(support, TracedSupport):
            return self._thresholds(support, support.trace, support.slope)
        assert self.is_static
        nothing = torch.zeros(
            len(support.latents), device=support.latents.device, dtype=torch.float32
        )
        return self._thresholds(support, nothing, nothing)

    def _dense_thresholds(self, z: Tensor, starts: Tensor | None) -> _Thresholds:
        starts, drivers, rule = self._segments(len(z), starts, z.device)
        a, slope = trace(z.detach(), rule, starts, drivers)
        return self._thresholds(None, a, slope)

    def _segments(
        self, rows: int, starts: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Adaptation]:
        """Returns where segments begin, which segment drives each, and the rule.

        Raises: SettingError when the thresholds move and no segments are given.
        """
        rule = self.rule()
        if self.is_static:  # every row on its own: no trace is made
            starts = torch.arange(rows + 1, device=device)
        if starts is None:
            remedy = "its thresholds follow the context: give `starts`, or layout = 'contexts'"
            raise SettingError("tied_threshold: starts", None, remedy)
        permuted = self.config.trace == "permuted"
        if permuted and len(starts) == 2:  # no other segment: an empty one drives no trace
            starts = torch.cat([starts, starts[-1:]])
        itself = torch.arange(len(starts) - 1, device=device)
        if not permuted:
            return starts, itself, rule
        return starts, (itself + max(1, len(itself) // 2)) % len(itself), rule

    # ---- inference ---------------------------------------------------------------------------

    def floor(self) -> Tensor | None:
        return self.initial_floor() if self.is_static else None

    def initial_floor(self) -> Tensor:
        rule = self.rule()
        return torch.maximum(rule.base, rule.low)

    def scalars(self) -> dict[str, float]:
        values = {
            "theta": self.log_theta.detach().exp().mean(),
            "beta": self.beta.detach().mean(),
            "gamma": self.gamma.detach(),
            "rho": self.rho_0.detach().sigmoid(),
            "T": self.T.detach(),
        }
        scalars = {name: float(value) for name, value in values.items()}
        scalars["spread"] = float(log_spread(self.variance[self._living()]))
        return scalars | self.temperature.scalars()

    def latent_scale(self) -> Tensor:
        return self.unit()

    def without_context(self) -> TiedThresholdConfig:
        """Replaces the trace by its mean, as with beta = 0."""
        return self.config.patched({"trace": "mean"})

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        """Multiplies theta by exp(`by`), as training does."""
        self.log_theta.add_(by)
        return True

    def export(self) -> Form | Refusal:
        """Returns a JumpReLU's form, where the thresholds don't move."""
        floor = self.floor()
        if floor is None:
            return Refusal("follows the context, which no standard SAE does")
        return Form(threshold=floor)


@dataclass(frozen=True)
class _Thresholds:
    """Thresholds of equal value: `plain` with gradients to theta, gamma and tau, `midway` to beta,
    rho_0 and T; and the kernel's width."""

    plain: Tensor
    midway: Tensor
    width: Tensor

    @property
    def whole(self) -> Tensor:
        """The thresholds with all gradients."""
        return self.plain + (self.midway - self.midway.detach())
