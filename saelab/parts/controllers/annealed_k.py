"""A k on a fixed schedule: the control of `rounded_k`, with the same k at the end.

k(u) = round( start * (end / start)^min(1, u / until) )      u: share of the run done
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from saelab.parts.base import Controller, Dims, Example, L0Rule, PartConfig, few, nearest_k

if TYPE_CHECKING:
    from saelab.sae import SAEConfig

#: Where k ends when neither the settings nor a study's plan say it, as `topk` has it.
END = 32


class AnnealedKConfig(PartConfig):
    """Settings of the schedule.

    Args:
        name: the setting that it owns.
        start, end: k; an end of None is the L0 at which a study compares its arms.
        until: share of the run with a changing k.
    """

    kind: Literal["annealed_k"] = "annealed_k"
    name: str = "k"
    start: PositiveInt = 100
    end: PositiveFloat | None = None
    until: float = Field(default=0.5, gt=0, le=1)

    def build(self, dims: Dims) -> AnnealedK:
        return AnnealedK(self, dims)

    @classmethod
    def example(cls, d_sae: int) -> Example:
        return Example(cls(start=2 * few(d_sae)), {"activation": {"kind": "topk", "k": "k"}})

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Decides the L0 where the activation follows it: 'set' unless `end` fixes it."""
        if self.name != sae.activation.l0_setting:
            return None
        return "set" if self.end is None else "found"

    def at_l0(self, level: float, sae: SAEConfig) -> AnnealedKConfig:
        return self.patched({"end": nearest_k(level)}) if self.l0_rule(sae) == "set" else self


class AnnealedK(Controller):
    shardable = True

    def __init__(self, config: AnnealedKConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.steps, self.most = max(1.0, config.until * dims.steps), dims.d_sae

    def value(self, step: int) -> float:
        start, end = self.config.start, self.config.end or END
        k = round(start * (end / start) ** min(1.0, step / self.steps))
        return float(min(max(1, k), self.most))
