"""Quadratic penalty on the distance of L0 from a target, for activations with learned thresholds.

    rows     coefficient * mean over rows of (2 / target) (L0_n - target)^2 / d_in
    batch    coefficient * (mean L0 / target - 1)^2 / d_in

L0_n = sum_i 1[z_ni > t_i], whose gradient reaches the thresholds through the pseudo-derivative of
the step. 'rows' is Gemma Scope 2's (2025), read in SAELens since its report could not be read; its
frequency penalty is not described there. 'batch' is dictionary_learning's. The division by d_in is
that of the reconstruction here, so that coefficients have the sizes of these sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat
from torch import Tensor

from saelab.errors import SettingError
from saelab.parts.base import Dims, Example, L0Rule, LossTerm, PartConfig, Pass, few

if TYPE_CHECKING:
    from saelab.sae import SAE, SAEConfig


class QuadraticL0Config(PartConfig):
    """Settings of the penalty.

    Args:
        target: active latents per row.
        over: 'rows' for the distance of each row, 'batch' for that of the batch's mean.
        coefficient: a number, or the name of the controller that sets it.
    """

    kind: Literal["quadratic_l0"] = "quadratic_l0"
    target: PositiveFloat = 32
    over: Literal["rows", "batch"] = "rows"
    coefficient: float | str = 1.0

    def build(self, dims: Dims) -> QuadraticL0:
        return QuadraticL0(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        part = cls(target=few(d_sae))
        return Example(part, part.companions)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        batch = cls(target=few(d_sae), over="batch")
        return cls.example(d_sae), Example(batch, batch.companions)

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"activation": {"kind": "jumprelu"}}

    @property
    def target_l0(self) -> float:
        return self.target

    def l0_rule(self, sae: SAEConfig) -> L0Rule:
        return "set"

    def at_l0(self, level: float, sae: SAEConfig) -> QuadraticL0Config:
        return self.patched({"target": level})


class QuadraticL0(LossTerm):
    shardable = True

    def __init__(self, config: QuadraticL0Config, dims: Dims) -> None:
        super().__init__()
        if config.target > dims.d_sae:
            remedy = f"must be at most d_sae = {dims.d_sae}"
            raise SettingError("quadratic_l0.target", config.target, remedy)
        self.coefficient, self.target, self.over = config.coefficient, config.target, config.over

    def check(self, sae: SAE) -> None:
        super().check(sae)
        sae.activation.gate(sae.W_enc.new_empty(0, sae.local_latents), None)
        parts = sae.config.all_parts()
        setting = [part.kind for part in parts if part.l0_rule(sae.config) == "set"]
        if len(setting) > 1:
            remedy = f"only one part can set the L0: leave out all but one of {', '.join(setting)}"
            raise SettingError("target", self.target, remedy)

    def loss(self, p: Pass) -> Tensor:
        gates, support = p.sae.activation.gate(p.code.pre, p.code.support), p.code.support
        scale = p.setting(self.coefficient) / p.target.shape[1]
        if self.over == "batch":
            mine = self.ranks.over_latents(gates.sum()) / p.n
            away = self.ranks.over_rows(mine.detach()) / self.target - 1
            slope = 2 * away / self.target
            return scale * (slope * (mine - mine.detach()) + p.share(away.square()))
        if support is None:
            l0 = gates.sum(1)
        else:
            l0 = gates.new_zeros(support.n_rows).index_add(0, support.rows, gates)
        away = self.ranks.over_latents(l0) - self.target
        return scale * p.share((2 / self.target) * away.square().mean())
