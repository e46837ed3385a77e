"""A fixed schedule: a setting that rises linearly from 0 to its value, then stays."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from saelab.parts.base import Controller, Dims, PartConfig


class RampConfig(PartConfig):
    """Sets `name` to `value` after a linear rise over the first `warmup` share of the run."""

    kind: Literal["ramp"] = "ramp"
    name: str = "sparsity"
    value: float = 0.04
    warmup: float = Field(default=0.1, ge=0, le=1)

    def build(self, dims: Dims) -> Ramp:
        return Ramp(self, dims)

    @property
    def fixed_penalty(self) -> float:
        return self.value


class Ramp(Controller):
    shardable = True

    def __init__(self, config: RampConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.rise = max(1.0, config.warmup * dims.steps)

    def value(self, step: int) -> float:
        return self.config.value * min(1.0, (step + 1) / self.rise)
