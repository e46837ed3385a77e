"""JumpReLU, straight-through gradients for its thresholds. Rajamanoharan et al. 2024b, eq. 11-12.

    f_i = z_i * 1[z_i > t_i],   t_i = exp(log_t_i)
    pseudo-derivatives, K the box kernel of width h:
        df/dt_i   = -(t_i / h) * K((z_i - t_i) / h)
        d1/dt_i   = -(1 / h)   * K((z_i - t_i) / h)

With `to_input` z gets the negative of the threshold's pseudo-derivative besides, as a step that
depends on z - t alone would give it (Anthropic, January 2025: "to all parameters").

The threshold is kept as its logarithm with a learning rate of its own: at the weights' rate it
would hardly move in a short run. The support holds a margin of half a bandwidth below the
threshold, where only the pseudo-derivative is non-zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from saelab.kernels import Support, gate, jump, support_above
from saelab.parts.base import Activation, Dims, Example, Form, PartConfig, Scalar, Stored


class JumpReLUConfig(PartConfig):
    """Settings of the activation.

    Args:
        threshold: the start, in normalised units (E|x|^2 = d_in).
        bandwidth: of the kernel, in the same units.
        to_input: whether the pseudo-derivatives reach the pre-activations too.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"to_input"})

    kind: Literal["jumprelu"] = "jumprelu"
    threshold: PositiveFloat = 0.5
    bandwidth: PositiveFloat = 0.5
    to_input: bool = False
    lr: NonNegativeFloat | None = 1e-2

    def build(self, dims: Dims) -> JumpReLU:
        return JumpReLU(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        return cls.example(d_sae), Example(cls(to_input=True))

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {"threshold": Scalar("geometric mean of the thresholds", "state")}

    @classmethod
    def of_form(cls, form: Form) -> JumpReLUConfig | None:
        return cls() if form.threshold is not None and form.affine is None else None


class JumpReLU(Activation):
    shardable = True
    per_latent = ("log_threshold",)
    #: It goes on from the threshold that its predecessor had, as every run so far did.
    survives_reset = ("log_threshold",)

    def __init__(self, config: JumpReLUConfig, dims: Dims) -> None:
        super().__init__()
        self.bandwidth, self.lr, self.to_input = config.bandwidth, config.lr, config.to_input
        start = torch.full((dims.n_local,), math.log(config.threshold), dtype=torch.float32)
        self.log_threshold = nn.Parameter(start)

    @property
    def threshold(self) -> Tensor:
        return self.log_threshold.exp()

    def _threshold_at(self, support: Support | None) -> Tensor:
        log = self.log_threshold
        return (log if support is None else log[support.latents]).exp()

    def dense(self, z: Tensor) -> Tensor:
        threshold = self.threshold.expand_as(z)
        return jump(z, threshold, self.bandwidth, self.to_input)

    def support(self, z: Tensor) -> Support | None:
        return support_above(z, self.selection_floor() if self.training else self.floor())

    def selection_floor(self) -> Tensor:
        return self.floor() - self.bandwidth / 2

    def floor(self) -> Tensor:
        return self.threshold.detach()

    def at(self, values: Tensor, support: Support) -> Tensor:
        threshold = self._threshold_at(support)
        return jump(values, threshold, self.bandwidth, self.to_input)

    def gate(self, z: Tensor, support: Support | None) -> Tensor:
        """1[z > t] at the support (or densely), with the pseudo-derivative to the threshold."""
        threshold = self._threshold_at(support)
        return gate(z, threshold.expand_as(z), self.bandwidth, self.to_input)

    def learned_thresholds(self) -> Tensor:
        return self.threshold

    def stored(self) -> dict[str, tuple[Stored, ...]]:
        """Returns the place of all thresholds, which are scaled together."""
        return {"threshold": (Stored(self.log_threshold, "log"),)}

    def raise_thresholds(self, by: float, bias: Tensor | None) -> bool:
        """Multiplies the thresholds by exp(`by`)."""
        self.log_threshold.add_(by)
        return True

    def scalars(self) -> dict[str, float]:
        return {"threshold": float(self.ranks.mean_over_latents(self.log_threshold).exp())}

    def export(self) -> Form:
        return Form(threshold=self.threshold.detach())

    def load_form(self, form: Form) -> None:
        assert form.threshold is not None
        self.log_threshold.data.copy_(form.threshold.clamp_min(0).log())
