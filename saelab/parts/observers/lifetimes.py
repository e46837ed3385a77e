"""Lifetimes of latents, and resampling by age.

    age      = last firing - birth             birth: the start, or the last resampling
    patience = min(base (1 + age / age_scale), most * base)
    a life ends when the latent has been silent for longer than its patience

The young get less patience, the old more. A latent whose life has ended starts afresh as in
`resampling`; none in the last fifth of the run, so that resets can settle. Times are in steps.
The survival curve is Kaplan and Meier's (1958): entry at birth, death as above, censored at the end
of the run and where another part resamples a living latent. A latent that fires again after its
death counts as revived; it enters no second life.
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
    Lives,
    Observer,
    PartConfig,
    Pass,
    Reset,
    Scalar,
    draw_reset,
    measurement,
)
from saelab.seeding import torch_stream

#: Bins of age over the run. Our choice: finer than any curve shows.
BINS = 200


class LifetimesConfig(PartConfig):
    """Settings of the observer.

    Args:
        resample: False only counts.
        base_steps, base_share: the least patience is the larger of both, in steps and as a share of
            the run.
        age_scale: share of the run at whose age patience has doubled.
        most: largest patience over the least.
        until: share of the run after which nothing is resampled.
        encoder_norm: of the new encoder rows, relative to the mean of the others.
    """

    kind: Literal["lifetimes"] = "lifetimes"
    resample: bool = True
    base_steps: PositiveInt = 250
    base_share: float = Field(default=0.025, ge=0, le=1)
    age_scale: PositiveFloat = 0.1
    most: float = Field(default=4.0, ge=1)
    until: float = Field(default=0.8, gt=0, le=1)
    encoder_norm: PositiveFloat = 0.2

    def build(self, dims: Dims) -> Lifetimes:
        return Lifetimes(self, dims)

    @classmethod
    def examples(cls, d_sae: int) -> tuple[Example, ...]:
        eager = cls(base_steps=3, base_share=0)
        return cls.example(d_sae), Example(eager, resets="lifetime.resamplings")

    @property
    def logged(self) -> Mapping[str, Scalar]:
        return {
            "lifetime.ended": measurement("share of latents whose life has ended"),
            "lifetime.revived": measurement(
                "share of latents that fire again after their life ended"
            ),
            "lifetime.mean_age": measurement("mean age of the latents' lives", "steps"),
            "lifetime.resamplings": measurement("resets of latents so far", "latents"),
        }

    @property
    def moves_decoder(self) -> bool:
        return self.resample


class Lifetimes(Observer):
    shardable = True
    per_latent = ("birth", "last_fired", "firings", "resamplings", "ended")
    #: The times of the reset, and the count of resets.
    survives_reset = ("birth", "last_fired", "resamplings")
    birth: Tensor
    last_fired: Tensor
    firings: Tensor
    resamplings: Tensor
    ended: Tensor
    deaths: Tensor
    censored: Tensor
    now: Tensor

    def __init__(self, config: LifetimesConfig, dims: Dims) -> None:
        super().__init__()
        self.config, self.seed, self.steps = config, dims.seed, dims.steps
        self.base = max(float(config.base_steps), config.base_share * dims.steps)
        for name in ("birth", "last_fired", "firings", "resamplings"):
            self.register_buffer(name, torch.zeros(dims.n_local, dtype=torch.int64))
        self.register_buffer("ended", torch.zeros(dims.n_local, dtype=torch.bool))
        for name in ("deaths", "censored"):
            self.register_buffer(name, torch.zeros(BINS, dtype=torch.int64))
        self.register_buffer("now", torch.zeros((), dtype=torch.int64))

    def patience(self) -> Tensor:
        """Steps of silence that end each latent's life; float32 [d_sae]."""
        age = (self.last_fired - self.birth).float()
        grown = 1 + age / (self.config.age_scale * self.steps)
        return self.base * grown.clamp_max(self.config.most)

    def silent(self) -> Tensor:
        """Latents that are silent for longer than their patience; bool [d_sae]."""
        return self.now - self.last_fired > self.patience()

    def survival(self) -> tuple[Tensor, Tensor]:
        """Kaplan-Meier's estimate.

        Returns: the share of lives that outlast each bin of age and the lives at risk at its
            beginning, both [BINS]; bin b holds ages of [b, b + 1) / BINS of the run. NaN from
            where no life is left at risk.
        """
        living = self._histogram(~self.ended)
        leave = self.deaths + self.censored + living
        at_risk = leave.flip(0).cumsum(0).flip(0)
        survival = (1 - self.deaths.double() / at_risk.double()).cumprod(0)
        return survival, at_risk

    def lives(self) -> Lives:
        survival, at_risk = self.survival()
        return Lives(survival, at_risk, int(self.deaths.sum()), self.resampled())

    def resampled(self) -> int:
        """Counts every reset, whichever part asked for it."""
        return int(self.resamplings.sum())

    def latent_columns(self) -> dict[str, Tensor]:
        """Birth and last firing in steps, firings and resamplings; firings since birth."""
        names = ("birth", "last_fired", "firings", "resamplings")
        return {name: self.get_buffer(name) for name in names}

    def update(self, p: Pass) -> None:
        self.now.fill_(p.step + 1)
        fired = p.firings
        self.firings += fired
        self.last_fired.masked_fill_(fired > 0, p.step + 1)
        dying = self.silent() & ~self.ended
        self.deaths += self._histogram(dying)
        self.ended |= dying

    def observe(self, p: Pass) -> Reset | None:
        if not self.config.resample or p.step + 1 > self.config.until * p.steps:
            return None
        dead = (self.ended & self.silent()).nonzero().flatten()
        if not self.ranks.before(dead.numel())[1]:
            return None
        draw = torch_stream(self.seed, "lifetimes", p.step + 1)
        return draw_reset(p, dead, self.config.encoder_norm, draw)

    def forget(self, latents: Tensor) -> None:
        here = torch.zeros_like(self.ended)
        here[latents] = True
        self.censored += self._histogram(here & ~self.ended)
        for name in ("birth", "last_fired"):
            self.get_buffer(name)[latents] = self.now
        self.firings[latents] = 0
        self.resamplings[latents] += 1
        self.ended[latents] = False

    def scalars(self) -> dict[str, float]:
        age, mean = self.now - self.birth, self.ranks.mean_over_latents
        return {
            "lifetime.ended": float(mean(self.ended.float())),
            "lifetime.revived": float(mean((self.ended & ~self.silent()).float())),
            "lifetime.mean_age": float(mean(age.float())),
            "lifetime.resamplings": self.ranks.total_over_latents(int(self.resamplings.sum()))[0],
        }

    def _histogram(self, which: Tensor) -> Tensor:
        """Numbers of lives by bin of age, int64 [BINS]; `which` bool [latents of this rank]."""
        age = (self.now - self.birth)[which]
        bins = (age * BINS // max(1, self.steps)).clamp(0, BINS - 1)
        return self.ranks.over_latents(torch.bincount(bins, minlength=BINS))
