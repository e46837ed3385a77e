"""A k on a fixed schedule: the control of `rounded_k`, with the same k at the end.

k(u) = round( start * (end / start)^min(1, u / until) )      u: share of the run done
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from saelab.parts.base import Controller, Dims, PartConfig


class AnnealedKConfig(PartConfig):
    """name: the setting that it owns; start, end: k; until: share of the run with a changing k."""

    kind: Literal["annealed_k"] = "annealed_k"
    name: str = "k"
    start: PositiveInt = 100
    end: PositiveInt = 32
    until: float = Field(default=0.5, gt=0, le=1)

    def build(self, dims: Dims) -> AnnealedK:
        return AnnealedK(self, dims)


class AnnealedK(Controller):
    def __init__(self, config: AnnealedKConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.steps, self.most = max(1.0, config.until * dims.steps), dims.d_sae

    def value(self, step: int) -> float:
        c = self.config
        k = round(c.start * (c.end / c.start) ** min(1.0, step / self.steps))
        return float(min(k, self.most))
