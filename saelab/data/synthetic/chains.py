"""Synthetic activations with known features.

    x[c,t] = sum_i f_i[c,t] D_i + scale * noise * e         e ~ N(0, 1) in each dimension, |D_i| = 1
    f_i    = s_i[c,t] * scale * m_i * exp(jitter * g - jitter^2 / 2)      m_i = exp(spread * g_i)

    equal          p_i the same              linear     p_i falls to p_1 / ratio
    zipf           p_i ~ i^-exponent         in all:    sum_i p_i = l0

s_i in {0, 1} is 1 if feature i fires, with probability p_i at every position. Along a context it is
a two-state Markov chain with autocorrelation `persistence` (0 makes positions independent):

    P(fire | fired) = p + persistence * (1 - p)             P(fire | silent) = p * (1 - persistence)

or, with `refractory` = R, it is silent for the R positions after a firing and otherwise fires with
probability p / (1 - R p). Between features, firings are

    independent
    correlated     s_i = 1[h_i < Phi^-1(P)],  h_i = sqrt(strength) L_i . u + sqrt(1 - strength) e_i
                   with u ~ N(0, I_rank) new at each position and random unit loadings L_i, so that
                   pairs of both signs occur and every feature has its chain
    hierarchical   each parent has `children`, whose chains fire with probability `given`, and which
                   are silent where the parent is

Every draw comes from a named stream of the data's seed that no SAE uses, so an SAE of the same seed
starts without knowledge of D. Dictionary, codes and noise have separate streams, the codes and the
noise one for each shard.

Larger data with deeper trees come from `trees.py` (kind 'forest').

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
from saelab.data.synthetic.trees import ForestConfig, ForestTruth, ShardedTruth
from saelab.errors import SettingError
from saelab.runtime.torch_defaults import standard_torch
from saelab.seeding import torch_stream

#: Why loss recovered and probing are missing for synthetic activations.
SYNTHETIC_REASON = "activations are synthetic"
#: Rows of a shard, which a stream shuffles at once. Our choice, 16 MB at d = 64.
SHARD_ROWS = 65_536
#: Entries of the dense code that are made at once, which bounds the memory. Our choice: 16 MB.
ENTRIES = 1 << 22


class SyntheticConfig(Frozen):
    """Settings of synthetic activations; the module's docstring has the equations.

    Args:
        d, features: width of the activations and number of true features.
        l0: mean number of features that fire at a position.
        frequency: distribution of firing probabilities: 'equal', 'linear' with the largest over the
            smallest = `ratio`, 'zipf' with its `exponent`. In a hierarchy it is the distribution of
            the parents' probabilities.
        spread: standard deviation of the log of the features' magnitudes.
        jitter: standard deviation of the log of one feature's value from firing to firing.
        correlation: dependence between the firings of features.
        strength, rank: parameters of the 'correlated' copula.
        children, given: parameters of the 'hierarchical' features.
        persistence: autocorrelation of a feature's firing from position to position.
        refractory: positions of silence after each firing; not together with persistence.
        orthogonal: directions in blocks of d are orthonormal; otherwise all are independent.
        noise: standard deviation in each dimension, in units of a typical magnitude.
        positions: positions of a context.
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
        highest = float(self.chain_probabilities.max())
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
        """Number of features that have no parent; the others are children."""
        hierarchical = self.correlation == "hierarchical"
        return self.features // (1 + self.children) if hierarchical else self.features

    @property
    def chain_probabilities(self) -> Tensor:
        """Firing probability of each chain, for a child given its parent; float64 [features]."""
        rank = torch.arange(1, self.parents + 1, dtype=torch.float64)
        weights = {
            "equal": torch.ones_like(rank),
            "linear": torch.linspace(1, 1 / self.ratio, self.parents, dtype=torch.float64),
            "zipf": rank**-self.exponent,
        }[self.frequency]
        families = self.features // self.parents
        total = weights.sum() * (1 + (families - 1) * self.given)
        children = torch.full((self.features - self.parents,), self.given, dtype=torch.float64)
        return torch.cat([weights * (self.l0 / total), children])

    @property
    def probabilities(self) -> Tensor:
        """Firing probability of each feature at a position, float64 [features]; the sum is l0."""
        p = self.chain_probabilities
        roots = p[: self.parents]
        return torch.cat([roots, p[self.parents :] * roots[self.parent_of[self.parents :]]])

    @property
    def parent_of(self) -> Tensor:
        """Index of each feature's parent, int64 [features]; a feature without parent has itself."""
        return torch.arange(self.features) % self.parents


@dataclass(frozen=True)
class Truth(ShardedTruth):
    """True features of the contexts of one part of the data; a function of its fields alone.

    Args:
        config, seed: decide the dictionary.
        part: parts of one seed share the dictionary, but no codes or noise.
        contexts: number of contexts.
    """

    config: SyntheticConfig
    seed: int
    part: str
    contexts: int

    @cached_property
    def directions(self) -> Tensor:
        """Unit rows D_i, float32 [features, d]."""
        c = self.config
        draw = torch.randn(
            c.features, c.d, generator=self._stream("directions"), dtype=torch.float32
        )
        if not c.orthogonal:
            return normalize(draw, dim=1)
        return torch.cat([torch.linalg.qr(block.T).Q.T for block in draw.split(c.d)])

    @cached_property
    def magnitudes(self) -> Tensor:
        """Mean value of each feature when it fires, float32 [features]."""
        draw = torch.randn(
            self.config.features, generator=self._stream("magnitudes"), dtype=torch.float32
        )
        return self.config.scale * (self.config.spread * draw).exp()

    @cached_property
    def loadings(self) -> Tensor:
        """Unit rows L_i of the correlated firings, float32 [features, rank]."""
        shape = self.config.features, self.config.rank
        return normalize(
            torch.randn(shape, generator=self._stream("loadings"), dtype=torch.float32), dim=1
        )

    @property
    def offset(self) -> Tensor:
        """Vector that is added to every row, float32 [d]: zeros."""
        return torch.zeros(self.config.d, dtype=torch.float32)

    @property
    def shard_rows(self) -> int:
        """Approximate number of rows of each shard but the last."""
        return SHARD_ROWS

    def chunks(self, shard: int) -> Iterator[Tensor]:
        """Yields the true codes of a shard in order, each float32 [n, positions, features]."""
        stream = self._stream("codes", self.part, shard)
        most = ENTRIES // (self.config.positions * self.config.features)
        for count in self.counts(shard, most):
            yield self._draw_values(self._draw_firings(count, stream), stream)

    def shard(self, i: int) -> Shard:
        """Returns the activations of the same contexts; every position counts."""
        c = self.config
        stream = self._stream("noise", self.part, i)
        parts = []
        for codes in self.chunks(i):
            x = codes @ self.directions
            if c.noise:
                x.add_(
                    torch.randn(x.shape, generator=stream, dtype=torch.float32),
                    alpha=c.scale * c.noise,
                )
            parts.append(x)
        x = torch.cat(parts)
        return Shard(x, torch.ones(x.shape[:2], dtype=torch.bool))

    # ---- drawing -----------------------------------------------------------------------------

    def _stream(self, name: str, *keys: int | str) -> Generator:
        return torch_stream(self.seed, f"synthetic {name}", *keys)

    def _draw_firings(self, contexts: int, stream: Generator) -> Tensor:
        """Draws which features fire, bool [positions, contexts, features]."""
        c = self.config
        draws = self._draw_numbers(contexts, stream)
        if c.refractory:
            fires = self._is_below(draws, _hazard(c))
            _silence_after_firing(fires, self._draw_waits(contexts, stream), c)
        elif c.persistence:
            fires = self._run_chains(draws)
        else:
            fires = self._is_below(draws, c.chain_probabilities)
        if c.correlation == "hierarchical":
            families = fires.view(*fires.shape[:2], -1, c.parents)
            families[:, :, 1:] &= families[:, :, :1]
        return fires

    def _draw_numbers(self, contexts: int, stream: Generator) -> Tensor:
        """Draws [positions, contexts, features], normal for correlated features, else uniform."""
        c = self.config
        shape = c.positions, contexts, c.features
        if c.correlation != "correlated":
            return torch.rand(shape, generator=stream, dtype=torch.float32)
        shared = (
            torch.randn(c.positions, contexts, c.rank, generator=stream, dtype=torch.float32)
            @ self.loadings.T
        )
        independent = torch.randn(shape, generator=stream, dtype=torch.float32)
        independent.mul_(math.sqrt(1 - c.strength))
        return independent.add_(shared, alpha=math.sqrt(c.strength))

    def _is_below(self, draws: Tensor, probabilities: Tensor) -> Tensor:
        """Returns where draws are below the quantiles of these probabilities [features]."""
        correlated = self.config.correlation == "correlated"
        return draws < (torch.special.ndtri(probabilities) if correlated else probabilities).float()

    def _run_chains(self, draws: Tensor) -> Tensor:
        """Runs the two-state chains on the draws; returns bool [positions, contexts, features]."""
        p, persistence = self.config.chain_probabilities, self.config.persistence
        after_silence = self._is_below(draws, p * (1 - persistence))
        after_firing = self._is_below(draws, p + persistence * (1 - p))
        fires = after_silence
        fires[0] = self._is_below(draws[0], p)
        for t in range(1, len(fires)):
            fires[t] |= fires[t - 1] & after_firing[t]
        return fires

    def _draw_waits(self, contexts: int, stream: Generator) -> Tensor:
        """Draws the positions of silence after a firing before the context [contexts, features]."""
        c = self.config
        draw = torch.rand(contexts, c.features, generator=stream, dtype=torch.float32)
        wait = (draw / c.chain_probabilities.float()).floor() + 1
        return torch.where(wait <= c.refractory, wait, 0)

    def _draw_values(self, fires: Tensor, stream: Generator) -> Tensor:
        """Draws the true codes [contexts, positions, features] of firings.

        Args:
            fires: bool [positions, contexts, features].
            stream: generator of all draws.
        """
        c = self.config
        fires = fires.transpose(0, 1).contiguous()
        index = fires.view(-1).nonzero().squeeze(1)
        size = (
            c.jitter * torch.randn(len(index), generator=stream, dtype=torch.float32)
            - c.jitter**2 / 2
        ).exp_()
        codes = torch.zeros(fires.shape, dtype=torch.float32)
        codes.view(-1)[index] = size.mul_(self.magnitudes[index % c.features])
        return codes


def _hazard(config: SyntheticConfig) -> Tensor:
    """Returns the probability of a firing where none is forbidden, float64 [features]."""
    p = config.chain_probabilities
    return (p / (1 - config.refractory * p)).clamp(max=1)


def _silence_after_firing(fires: Tensor, wait: Tensor, config: SyntheticConfig) -> None:
    """Removes, in place, the firings within `refractory` positions of the previous one."""
    for now in fires:
        now &= wait <= 0
        wait = torch.where(now, config.refractory, wait - 1)


#: The two processes, and the truth of each: config, seed, part, contexts, directions, offset,
#: magnitudes, codes, chunks, shard and n_shards.
Process = SyntheticConfig | ForestConfig
KnownTruth = Truth | ForestTruth


def parse_process(data: Any) -> Process:
    """Parses the settings of a process from plain data; a forest has kind = 'forest'.

    Raises: SettingError for an unknown kind or setting.
    """
    if isinstance(data, (SyntheticConfig, ForestConfig)):
        return data
    kind = data.get("kind", "") if isinstance(data, dict) else ""
    if kind not in ("", "forest"):
        raise SettingError("data.kind", kind, "use 'forest', or leave it out")
    return (ForestConfig if kind else SyntheticConfig).parse(data, where="data")


def make_truth(config: Process, seed: int, part: str, contexts: int) -> KnownTruth:
    """Returns the true features of the contexts of a part; see `Truth`."""
    truth_class = ForestTruth if isinstance(config, ForestConfig) else Truth
    return truth_class(config, seed, part, contexts)  # type: ignore[arg-type]


def truth_header(truth: KnownTruth) -> dict[str, Any]:
    """Returns the identity of the source, from which `truth_of` rebuilds the truth."""
    c = truth.config
    fields = {"seed": truth.seed, "part": truth.part, "contexts": truth.contexts}
    return {
        "model": None,
        "model_digest": None,
        "hook_name": None,
        "reason": SYNTHETIC_REASON,
        "synthetic": {"config": c.model_dump(mode="json"), **fields},
        "context": c.positions,
        "d": c.d,
        "dtype": "float32",
        "n_tokens": truth.contexts * c.positions,
    }


class SyntheticSource:
    """Activations that are generated whenever a shard is requested; only the last one is stored."""

    def __init__(self, truth: KnownTruth) -> None:
        self.truth, self.header = truth, truth_header(truth)
        self._last: tuple[int, Shard] | None = None

    @property
    def d(self) -> int:
        return self.truth.config.d

    @property
    def n_shards(self) -> int:
        return self.truth.n_shards

    @property
    def shard_counts(self) -> list[int]:
        contexts = self.truth.shard_contexts
        counts = [min(contexts, self.truth.contexts - i * contexts) for i in range(self.n_shards)]
        return [count * self.truth.config.positions for count in counts]

    @property
    def digest(self) -> str:
        """Hash of the settings; it differs from the digest of the same activations in memory."""
        return digest(["made", self.header])

    def shard(self, i: int) -> Shard:
        if self._last is None or self._last[0] != i:
            self._last = None  # so that memory never holds two
            self._last = i, self.truth.shard(i)
        return self._last[1]


@standard_torch()
def generate(
    config: Process,
    seed: int,
    contexts: int,
    part: str = "train",
    folder: Path | None = None,
    keep: bool = True,
) -> Source:
    """Generates synthetic activations as a source; `truth_of` returns their true features.

    Args:
        config: the process.
        seed: seed of the dictionary, and together with `part` of codes and noise.
        contexts: number of contexts, of `config.positions` positions each.
        part: 'train', 'held_out', ...
        folder: folder in which the activations are stored, with one shard in memory at a time; a
            complete one of the same identity is opened as it is. None keeps all in memory: 4 d
            bytes per row.
        keep: False generates each shard again whenever it is requested, for data that fit nowhere.

    Raises: SettingError for less than one context; MismatchError when the folder holds other
        activations.
    """
    if contexts < 1:
        raise SettingError("contexts", contexts, "at least one is needed")
    truth = make_truth(config, seed, part, contexts)
    if not keep:
        return SyntheticSource(truth)
    if folder is None:
        return MemorySource([truth.shard(i) for i in range(truth.n_shards)], truth_header(truth))
    writer = FolderWriter(folder, truth_header(truth))
    for i in range(writer.done, truth.n_shards):
        writer.add(truth.shard(i))
    return writer.finish()


def truth_of(source: Source) -> KnownTruth | None:
    """Returns the true features of a source that `generate` made; None for any other source."""
    fields = source.header.get("synthetic")
    if fields is None:
        return None
    config = parse_process(fields["config"])
    return make_truth(config, fields["seed"], fields["part"], fields["contexts"])
