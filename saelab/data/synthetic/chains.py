"""Synthetic activations whose features are known.

    x[c,t] = sum_i f_i[c,t] D_i + scale * noise * e         e ~ N(0, 1) in each dimension, |D_i| = 1
    f_i    = s_i[c,t] * scale * m_i * exp(jitter * g - jitter^2 / 2)      m_i = exp(spread * g_i)

    equal          p_i the same              linear     p_i falls to p_1 / ratio
    zipf           p_i ~ i^-exponent         in all:    sum_i p_i = l0

s_i in {0, 1} says whether feature i fires, with probability p_i at every position. Along a context
it is a two-state Markov chain with autocorrelation `persistence` (0 makes positions independent):

    P(fire | fired) = p + persistence * (1 - p)             P(fire | silent) = p * (1 - persistence)

or, with `refractory` = R, it is silent for the R positions after a firing and else fires with
probability p / (1 - R p). Between features, firings are

    independent
    correlated     s_i = 1[h_i < Phi^-1(P)],  h_i = sqrt(strength) L_i . u + sqrt(1 - strength) e_i
                   with u ~ N(0, I_rank) new at each position and random unit loadings L_i, so that
                   pairs of either sign occur and every feature keeps its own chain
    hierarchical   each parent has `children`, whose own chains fire with probability `given`, and
                   which are silent where the parent is

Every draw comes from a named stream of the data's seed that no SAE uses: an SAE of the same seed
starts with no knowledge of D. Dictionary, codes and noise have streams of their own, the codes and
the noise one for each shard.

Larger ones, with deeper trees, are made by `forest`.

Sources: toy models of superposition, Elhage et al. 2022; the copula, Nelsen 2006, chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Generator, Tensor
from torch.nn.functional import normalize

from saelab.config import Frozen, digest
from saelab.data.activations.store import FolderWriter, MemorySource, Shard, Source
from saelab.data.synthetic.trees import ForestConfig, ForestTruth, InShards
from saelab.errors import SettingError
from saelab.seeding import torch_stream

#: Why loss recovered and probing are missing for synthetic activations.
REASON = "activations are synthetic"
#: Rows per shard: what a stream shuffles at once. Our choice, 16 MB at d = 64.
SHARD_ROWS = 65_536
#: Entries of the dense code made at once, which bounds the memory. Our choice: 16 MB.
ENTRIES = 1 << 22


class SyntheticConfig(Frozen):
    """What synthetic activations are made of; the module's docstring has the equations.

    Args:
        d, features: width of the activations and number of true features.
        l0: mean number of features that fire at a position.
        frequency: how firing probabilities differ between features: 'equal', 'linear' with the
            largest over the smallest = `ratio`, 'zipf' with its `exponent`. In a hierarchy it is
            the parents' probabilities that differ like this.
        spread: standard deviation of the log of the features' magnitudes.
        jitter: standard deviation of the log of one feature's value from firing to firing.
        correlation: between the firings of features.
        strength, rank: of the 'correlated' copula.
        children, given: of the 'hierarchical' features.
        persistence: autocorrelation of a feature's firing from position to position.
        refractory: positions of silence after each firing; not together with persistence.
        orthogonal: directions in blocks of d are orthonormal; else all are independent.
        noise: standard deviation in each dimension, in units of a typical magnitude.
        positions: per context.
        scale: multiplies activations and true codes, noise included.

    Raises: SettingError for probabilities that no such process has.
    """

    d: PositiveInt = 64
    features: PositiveInt = 256
    l0: PositiveFloat = 6.656
    frequency: Literal["equal", "linear", "zipf"] = "linear"
    ratio: float = Field(default=25.0, ge=1)
    exponent: NonNegativeFloat = 1.0
    spread: NonNegativeFloat = 0.7
    jitter: NonNegativeFloat = 0.2
    correlation: Literal["independent", "correlated", "hierarchical"] = "independent"
    strength: float = Field(default=0.5, ge=0, lt=1)
    rank: PositiveInt = 8
    children: PositiveInt = 3
    given: float = Field(default=0.3, gt=0, lt=1)
    persistence: float = Field(default=0.0, ge=0, lt=1)
    refractory: NonNegativeInt = 0
    orthogonal: bool = False
    noise: NonNegativeFloat = 0.05
    positions: PositiveInt = 64
    scale: PositiveFloat = 1.0

    def model_post_init(self, _: Any) -> None:
        if self.correlation == "hierarchical" and self.features % (1 + self.children):
            remedy = f"must be a multiple of 1 + children = {1 + self.children}"
            raise SettingError("features", self.features, remedy)
        highest = float(self.own_probabilities.max())
        if highest >= 1:
            remedy = f"one feature would fire with probability {highest:.3g}: lower it or flatten"
            raise SettingError("l0", self.l0, f"{remedy} the frequencies")
        if self.refractory and self.persistence:
            raise SettingError("refractory", self.refractory, "needs persistence = 0")
        if highest * (1 + self.refractory) > 1:
            remedy = f"a feature that fires with probability {highest:.3g} has no time for it"
            raise SettingError("refractory", self.refractory, f"{remedy}: lower it, or l0")

    @property
    def parents(self) -> int:
        """Features that fire on their own; the others are children."""
        hierarchical = self.correlation == "hierarchical"
        return self.features // (1 + self.children) if hierarchical else self.features

    @property
    def own_probabilities(self) -> Tensor:
        """Of each feature's own chain, for a child given its parent; float64 [features]."""
        rank = torch.arange(1, self.parents + 1, dtype=torch.float64)
        weights = {
            "equal": torch.ones_like(rank),
            "linear": torch.linspace(1, 1 / self.ratio, self.parents, dtype=torch.float64),
            "zipf": rank**-self.exponent,
        }[self.frequency]
        families = self.features // self.parents
        total = weights.sum() * (1 + (families - 1) * self.given)
        given = torch.full((self.features - self.parents,), self.given, dtype=torch.float64)
        return torch.cat([weights * (self.l0 / total), given])

    @property
    def probabilities(self) -> Tensor:
        """With which each feature fires at a position, float64 [features]; their sum is l0."""
        own = self.own_probabilities
        roots = own[: self.parents]
        return torch.cat([roots, own[self.parents :] * roots[self.parent_of[self.parents :]]])

    @property
    def parent_of(self) -> Tensor:
        """int64 [features]; a feature without parent has itself."""
        return torch.arange(self.features) % self.parents


@dataclass(frozen=True)
class Truth(InShards):
    """The features behind the contexts of one part of the data; a function of its fields alone.

    Args:
        config, seed: decide the dictionary.
        part: parts of one seed share the dictionary and no codes or noise.
        contexts: how many.
    """

    config: SyntheticConfig
    seed: int
    part: str
    contexts: int

    @cached_property
    def directions(self) -> Tensor:
        """Unit rows D_i, float32 [features, d]."""
        c = self.config
        draw = torch.randn(c.features, c.d, generator=self._stream("directions"))
        if not c.orthogonal:
            return normalize(draw, dim=1)
        return torch.cat([torch.linalg.qr(block.T).Q.T for block in draw.split(c.d)])

    @cached_property
    def magnitudes(self) -> Tensor:
        """Mean value of each feature where it fires, float32 [features]."""
        draw = torch.randn(self.config.features, generator=self._stream("magnitudes"))
        return self.config.scale * (self.config.spread * draw).exp()

    @cached_property
    def loadings(self) -> Tensor:
        """Unit rows L_i of the correlated firings, float32 [features, rank]."""
        shape = self.config.features, self.config.rank
        return normalize(torch.randn(shape, generator=self._stream("loadings")), dim=1)

    @property
    def offset(self) -> Tensor:
        """What is added to every row, float32 [d]: nothing."""
        return torch.zeros(self.config.d)

    @property
    def shard_rows(self) -> int:
        return SHARD_ROWS

    def chunks(self, shard: int) -> Iterator[Tensor]:
        """The true codes of a shard in order, each float32 [some contexts, positions, features]."""
        stream = self._stream("codes", self.part, shard)
        most = ENTRIES // (self.config.positions * self.config.features)
        for count in self.counts(shard, most):
            yield self._values(self._fires(count, stream), stream)

    def shard(self, i: int) -> Shard:
        """The activations of the same contexts; every position counts."""
        c = self.config
        stream = self._stream("noise", self.part, i)
        parts = []
        for codes in self.chunks(i):
            x = codes @ self.directions
            if c.noise:
                x.add_(torch.randn(x.shape, generator=stream), alpha=c.scale * c.noise)
            parts.append(x)
        x = torch.cat(parts)
        return Shard(x, torch.ones(x.shape[:2], dtype=torch.bool))

    # ---- drawing -----------------------------------------------------------------------------

    def _stream(self, name: str, *keys: int | str) -> Generator:
        return torch_stream(self.seed, f"synthetic {name}", *keys)

    def _fires(self, contexts: int, stream: Generator) -> Tensor:
        """Which features fire, bool [positions, contexts, features]."""
        c = self.config
        draws = self._draws(contexts, stream)
        if c.refractory:
            fires = _rest(self._below(draws, _hazard(c)), self._waits(contexts, stream), c)
        elif c.persistence:
            fires = self._chain(draws)
        else:
            fires = self._below(draws, c.own_probabilities)
        if c.correlation == "hierarchical":
            families = fires.view(*fires.shape[:2], -1, c.parents)
            families[:, :, 1:] &= families[:, :, :1]
        return fires

    def _draws(self, contexts: int, stream: Generator) -> Tensor:
        """[positions, contexts, features]: normal for correlated features, else uniform."""
        c = self.config
        shape = c.positions, contexts, c.features
        if c.correlation != "correlated":
            return torch.rand(shape, generator=stream)
        shared = torch.randn(c.positions, contexts, c.rank, generator=stream) @ self.loadings.T
        own = torch.randn(shape, generator=stream)
        return own.mul_(math.sqrt(1 - c.strength)).add_(shared, alpha=math.sqrt(c.strength))

    def _below(self, draws: Tensor, probabilities: Tensor) -> Tensor:
        """Where draws lie among the lowest with these probabilities, float64 [features]."""
        correlated = self.config.correlation == "correlated"
        return draws < (torch.special.ndtri(probabilities) if correlated else probabilities).float()

    def _chain(self, draws: Tensor) -> Tensor:
        """The two-state chains that the draws drive; bool [positions, contexts, features]."""
        p, persistence = self.config.own_probabilities, self.config.persistence
        after_silence = self._below(draws, p * (1 - persistence))
        after_firing = self._below(draws, p + persistence * (1 - p))
        fires = after_silence
        fires[0] = self._below(draws[0], p)
        for t in range(1, len(fires)):
            fires[t] |= fires[t - 1] & after_firing[t]
        return fires

    def _waits(self, contexts: int, stream: Generator) -> Tensor:
        """Positions of silence left over from a firing before the context, [contexts, features]."""
        c = self.config
        draw = torch.rand(contexts, c.features, generator=stream)
        wait = (draw / c.own_probabilities.float()).floor() + 1
        return torch.where(wait <= c.refractory, wait, 0)

    def _values(self, fires: Tensor, stream: Generator) -> Tensor:
        """The true code [contexts, positions, features] of bool [positions, contexts, features]."""
        c = self.config
        fires = fires.transpose(0, 1).contiguous()
        where = fires.view(-1).nonzero().squeeze(1)
        size = (c.jitter * torch.randn(len(where), generator=stream) - c.jitter**2 / 2).exp_()
        codes = torch.zeros(fires.shape)
        codes.view(-1)[where] = size.mul_(self.magnitudes[where % c.features])
        return codes


def _hazard(config: SyntheticConfig) -> Tensor:
    """Probability of a firing where none is forbidden, float64 [features]."""
    p = config.own_probabilities
    return (p / (1 - config.refractory * p)).clamp(max=1)


def _rest(fires: Tensor, wait: Tensor, config: SyntheticConfig) -> Tensor:
    """Takes out, in place, the firings within `refractory` positions of the one before."""
    for now in fires:
        now &= wait <= 0
        wait = torch.where(now, config.refractory, wait - 1)
    return fires


#: Either process, and the truth behind either: config, seed, part, contexts, directions, offset,
#: magnitudes, codes, chunks, shard and n_shards.
Process = SyntheticConfig | ForestConfig
KnownTruth = Truth | ForestTruth


def parse_process(data: Any) -> Process:
    """Settings of either process from plain data; of a forest with kind = 'forest'.

    Raises: SettingError for an unknown kind or setting.
    """
    if isinstance(data, (SyntheticConfig, ForestConfig)):
        return data
    kind = data.get("kind", "") if isinstance(data, dict) else ""
    if kind not in ("", "forest"):
        raise SettingError("data.kind", kind, "known: 'forest', or none at all")
    return (ForestConfig if kind else SyntheticConfig).parse(data, where="data")


def truth_behind(config: Process, seed: int, part: str, contexts: int) -> KnownTruth:
    """The truth of some contexts; see `Truth`."""
    made = ForestTruth if isinstance(config, ForestConfig) else Truth
    return made(config, seed, part, contexts)  # type: ignore[arg-type]


def header_of(truth: KnownTruth) -> dict[str, Any]:
    """The identity of the source, from which `truth_of` makes the truth again."""
    c = truth.config
    fields = {"seed": truth.seed, "part": truth.part, "contexts": truth.contexts}
    return {
        "model": None,
        "model_digest": None,
        "hook_name": None,
        "reason": REASON,
        "synthetic": {"config": c.model_dump(mode="json"), **fields},
        "context": c.positions,
        "d": c.d,
        "dtype": "float32",
        "n_tokens": truth.contexts * c.positions,
    }


class MadeSource:
    """Activations that are made whenever a shard is asked for; only the last one is kept."""

    def __init__(self, truth: KnownTruth) -> None:
        self.truth, self.header = truth, header_of(truth)
        self._last: tuple[int, Shard] | None = None

    @property
    def d(self) -> int:
        return self.truth.config.d

    @property
    def n_shards(self) -> int:
        return self.truth.n_shards

    @property
    def shard_counts(self) -> list[int]:
        each = self.truth.shard_contexts
        counts = [min(each, self.truth.contexts - i * each) for i in range(self.n_shards)]
        return [count * self.truth.config.positions for count in counts]

    @property
    def digest(self) -> str:
        """Of what the activations are made from; not that of the same ones in memory."""
        return digest(["made", self.header])

    def shard(self, i: int) -> Shard:
        if self._last is None or self._last[0] != i:
            self._last = None  # before the next one is made, so that there are never two
            self._last = i, self.truth.shard(i)
        return self._last[1]


def generate(
    config: Process,
    seed: int,
    contexts: int,
    part: str = "train",
    folder: Path | None = None,
    keep: bool = True,
) -> Source:
    """Synthetic activations as a source; `truth_of` gives what they were made from.

    Args:
        seed: of the dictionary, and together with `part` of codes and noise.
        contexts: how many, of `config.positions` positions each.
        part: 'train', 'held_out', ...
        folder: written to and read from there, one shard in memory at a time; a complete one of the
            same identity is opened as it is. None keeps all in memory: 4 d bytes per row.
        keep: False makes each shard again whenever it is asked for, for data that fit nowhere.

    Raises: SettingError for less than one context; MismatchError when the folder holds others.
    """
    if contexts < 1:
        raise SettingError("contexts", contexts, "at least one is needed")
    truth = truth_behind(config, seed, part, contexts)
    if not keep:
        return MadeSource(truth)
    if folder is None:
        return MemorySource([truth.shard(i) for i in range(truth.n_shards)], header_of(truth))
    writer = FolderWriter(folder, header_of(truth))
    for i in range(writer.done, truth.n_shards):
        writer.add(truth.shard(i))
    return writer.finish()


def truth_of(source: Source) -> KnownTruth | None:
    """The truth behind a source that `generate` made; None for any other."""
    made = source.header.get("synthetic")
    if made is None:
        return None
    config = parse_process(made["config"])
    return truth_behind(config, made["seed"], made["part"], made["contexts"])
