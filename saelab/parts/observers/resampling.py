"""Resampling of dead latents at fixed intervals. Bricken et al. 2023, appendix.

A latent that has not fired for `patience` rows starts afresh: its direction is an input drawn in
proportion to its squared error, its encoder has `encoder_norm` of the mean living norm, its bias is
0, its optimiser moments are cleared. None in the last fifth of the run, so that resets can settle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from saelab.parts.base import (
    Dims,
    Example,
    Observer,
    PartConfig,
    Pass,
    Reset,
    Scalar,
    draw_reset,
    measurement,
)
from saelab.seeding import torch_stream


class ResamplingConfig(PartConfig):
    """Settings of fixed-interval resampling.

    Args:
        every: share of the run between two resamplings.
        patience: rows without a firing after which a latent is dead.
        until: share of the run after which nothing is reset.
        encoder_norm: of the new encoder rows, relative to the mean living norm.
    """

    kind: Literal["resampling"] = "resampling"
    every: float = Field(default=0.2, gt=0, le=1)
    patience: PositiveInt = 50_000
    until: float = Field(default=0.8, gt=0, le=1)
    encoder_norm: PositiveFloat = 0.2

    def build(self, dims: Dims) -> Resampling:
        return Resampling(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        eager = cls(every=0.1, patience=100)
        return cls.example(d_sae), Example(eager, resets="resampled")

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {"resampled": measurement("resets of latents so far", "latents")}

    @property
    def moves_decoder(self) -> bool:
        return True


class Resampling(Observer):
    shardable = True
    per_latent = ("silent",)
    silent: Tensor
    resets: Tensor

    def __init__(self, config: ResamplingConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.seed = config, dims.seed
        self.every = max(1, round(config.every * dims.steps))
        self.register_buffer("silent", torch.zeros(dims.n_local, dtype=torch.int64))
        self.register_buffer("resets", torch.zeros((), dtype=torch.int64))

    def update(self, p: Pass) -> None:
        self.silent.add_(p.n).masked_fill_(p.firings > 0, 0)

    def observe(self, p: Pass) -> Reset | None:
        step = p.step + 1
        if step % self.every or step > self.config.until * p.steps:
            return None
        dead = (self.silent > self.config.patience).nonzero().flatten()
        _, count = self.ranks.before(dead.numel())
        if not count:
            return None
        self.resets += count
        generator = torch_stream(self.seed, "resampling", step)
        return draw_reset(p, dead, self.config.encoder_norm, generator)

    def resampled(self) -> int:
        return int(self.resets)

    def forget(self, latents: Tensor) -> None:
        self.silent[latents] = 0

    def scalars(self) -> dict[str, float]:
        return {"resampled": float(self.resets)}
