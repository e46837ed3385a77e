"""A penalty between L1 and L0 whose exponent falls. Karvonen et al. 2024 (2408.00113), section 3.

    coefficient * c * sum_i ((f_i |W_dec_i| + s)^p - s^p) / sqrt(d_out)^p, mean over rows

p falls from `start` to `end` in equal steps; at each step c is multiplied so that the penalty of
the batch is what it was with the last p. In the paper the decoder's rows have norm 1, s is 0 and c
follows the mean over the last 10 batches. Over the gate's path max(z_i + b_gate_i, 0) instead of f
it is the gated SAE with an annealed p (`GatedAnneal` in dictionary_learning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from saelab.errors import SettingError
from saelab.parts.base import Dims, Example, LossTerm, PartConfig, Pass, Scalar, measurement

if TYPE_CHECKING:
    from saelab.sae import SAE

#: Smallest size that is raised to a power.
SMALLEST = 1e-12
#: Share of an update by which its step may be missed through rounding.
ROUNDING = 1e-9


class LpConfig(PartConfig):
    """Settings of the penalty.

    Args:
        coefficient: a number, or the name of the controller that sets it.
        of: 'code' for f; 'gate' for the path of the gate of an activation that has one.
        start, end: of p.
        begin, until: shares of the run between which p moves.
        updates: number of equal steps in which p moves; 0 moves it after every step of training.
        smooth: s of the equation, which bounds the gradient at 0.
        keep: whether the factor c keeps the penalty where it was when p moves.
        decoder_norms: whether each f_i is multiplied by |W_dec_i|.
    """

    kind: Literal["lp"] = "lp"
    coefficient: float | str = "sparsity"
    of: Literal["code", "gate"] = "code"
    start: float = Field(default=1.0, gt=0, le=2)
    end: float = Field(default=0.2, gt=0, le=2)
    begin: float = Field(default=0.2, ge=0, lt=1)
    until: float = Field(default=1.0, gt=0, le=1)
    updates: int = Field(default=0, ge=0)
    smooth: float = Field(default=1e-3, ge=0)
    keep: bool = True
    decoder_norms: bool = True

    def build(self, dims: Dims) -> Lp:
        return Lp(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        gate = cls(of="gate", updates=4, decoder_norms=False)
        return cls.example(d_sae), Example(gate, gate.companions)

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {
            "lp.p": Scalar("exponent of the penalty", "state"),
            "lp.c": measurement("factor that keeps the penalty where it was when p moves"),
        }

    @property
    def companions(self) -> Mapping[str, Any]:
        if self.of == "code":
            return {}
        unit = [{"kind": "unit_norm"}]
        return {
            "activation": {"kind": "gated"},
            "losses": [{"kind": "gate_reconstruction"}],
            "constraints": unit,
        }


class Lp(LossTerm):
    shardable = True
    c: Tensor
    p: Tensor

    def __init__(self, config: LpConfig, dims: Dims) -> None:
        super().__init__()
        if config.begin >= config.until:
            raise SettingError("lp.begin", config.begin, f"must be below until = {config.until}")
        self.config, self.coefficient = config, config.coefficient
        self.uses_decoder_norms = config.decoder_norms
        self.register_buffer("c", torch.ones((), dtype=torch.float64))
        self.register_buffer("p", torch.tensor(config.start, dtype=torch.float64))

    def check(self, sae: SAE) -> None:
        super().check(sae)
        if self.config.of == "gate":
            sae.activation.gate_path(sae.W_enc.new_empty(0, sae.local_latents), None)

    def loss(self, p: Pass) -> Tensor:
        power = float(self.p)
        scale = p.setting(self.coefficient) * float(self.c) / p.n
        sizes = self._sizes(p)
        p.results[self] = sizes.detach()
        total = self.ranks.over_latents(self._sum(sizes, power))
        return total * (scale / math.sqrt(p.target.shape[1]) ** power)

    def update(self, p: Pass) -> None:
        c = self.config
        after = c.start + (c.end - c.start) * self._way((p.step + 1) / p.steps)
        if c.keep and after != float(self.p):
            # those of the loss: by now the parameters have moved
            sizes = p.results[self] if self in p.results else self._sizes(p)
            width = math.sqrt(p.target.shape[1])
            sums = [float(self._sum(sizes, q)) / width**q for q in (float(self.p), after)]
            old, new = self.ranks.total(*sums)
            if old > 0 and new > 0:
                self.c *= old / new
        self.p.fill_(after)

    def _way(self, share: float) -> float:
        """Returns the share of its way that p has gone after a share of the run."""
        c = self.config
        way = min(1.0, max(0.0, (share - c.begin) / (c.until - c.begin)))
        return math.floor(way * c.updates + ROUNDING) / c.updates if c.updates else way

    def _sizes(self, p: Pass) -> Tensor:
        """Sizes of the pairs that fire: at 0 the gradient has a pole."""
        code, values = p.code, p.code.values
        if self.config.of == "gate":
            values = p.sae.activation.gate_path(code.pre, code.support)
        values = values.abs()
        if self.config.decoder_norms:
            norms = p.decoder_norms
            if code.support is not None:
                norms = norms.index_select(0, code.support.latents)
            values = values * norms
        return values[values.detach() > 0]

    def _sum(self, sizes: Tensor, power: float) -> Tensor:
        s = self.config.smooth
        return ((sizes.clamp_min(SMALLEST) + s).pow(power) - s**power).sum()

    def scalars(self) -> dict[str, float]:
        return {"lp.p": float(self.p), "lp.c": float(self.c)}
