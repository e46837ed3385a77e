"""A setting between two values over a share of the run: for penalties, exponents and numbers k.

    u = (step + 1) / steps        s = (u - begin) / (until - begin), kept in [0, 1]

    linear      start + (end - start) s
    geometric   start (end / start)^s
    cosine      start + (end - start) (1 - cos(pi s)) / 2
    steps       linear, with s rounded down to a multiple of 1 / stairs

Annealing of a penalty's exponent is Karvonen et al. 2024 (2408.00113), section 3, with the linear
shape; the others are the usual ones of learning rates.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from saelab.errors import SettingError
from saelab.parts.base import Controller, Dims, Example, L0Rule, PartConfig, few

if TYPE_CHECKING:
    from saelab.sae import SAEConfig


class ScheduleConfig(PartConfig):
    """Settings of the schedule.

    Args:
        name: the setting that it owns.
        start, end: its values before `begin` and from `until` on.
        begin, until: shares of the run between which it moves.
        shape: of the way between the two.
        stairs: number of equal steps of the shape 'steps'.
    """

    kind: Literal["schedule"] = "schedule"
    name: str = "sparsity"
    start: float = 0.0
    end: float = 0.04
    begin: float = Field(default=0.0, ge=0, lt=1)
    until: float = Field(default=1.0, gt=0, le=1)
    shape: Literal["linear", "geometric", "cosine", "steps"] = "linear"
    stairs: PositiveInt = 4

    def build(self, dims: Dims) -> Schedule:
        return Schedule(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        k = {"name": "k", "start": d_sae // 2, "end": few(d_sae), "until": 0.5}
        follower = {"activation": {"kind": "topk", "k": "k"}}
        geometric = cls.parse({**k, "shape": "geometric"})
        return cls.example(d_sae), Example(geometric, follower)

    @property
    def fixed_penalty(self) -> float:
        return self.end

    def l0_rule(self, sae: SAEConfig) -> L0Rule | None:
        """Decides the L0 where the activation follows it, at an end that no level changes."""
        return "found" if self.name == sae.activation.l0_setting else None

    def value(self, step: int, steps: int) -> float:
        """The value before a step of a run of so many steps."""
        share = ((step + 1) / steps - self.begin) / (self.until - self.begin)
        share = min(1.0, max(0.0, share))
        if self.shape == "geometric":
            return self.start * (self.end / self.start) ** share
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        if self.shape == "steps":
            share = math.floor(share * self.stairs) / self.stairs
        return self.start + (self.end - self.start) * share


class Schedule(Controller):
    shardable = True

    def __init__(self, config: ScheduleConfig, dims: Dims) -> None:
        super().__init__()
        if config.begin >= config.until:
            remedy = f"must be below until = {config.until}"
            raise SettingError("begin", config.begin, remedy)
        if config.shape == "geometric" and not min(config.start, config.end) > 0:
            least = min(config.start, config.end)
            name = "start" if config.start == least else "end"
            raise SettingError(name, least, "must be above 0 where the shape is 'geometric'")
        self.config, self.name, self.steps = config, config.name, dims.steps

    def value(self, step: int) -> float:
        return self.config.value(step, self.steps)
