"""Synthetic activations at scale: correlated features on trees, as in SynthSAEBench.

    x = sum_i v_i D_i + b        |D_i| = 1, |b| = bias
    p_i = lowest + (highest - lowest) (i^-exponent - n^-exponent) / (1 - n^-exponent)      i = 1..n
    s_i = 1[L_i . u + sqrt(1 - |L_i|^2) e_i > Phi^-1(1 - q_i)]      u ~ N(0, I_rank), e_i ~ N(0, 1)
    v_i = s_i relu(m_i + t_i g_i)        L_i ~ N(0, strength^2 I), |L_i|^2 <= 0.99
                                         t_i = |N(sd_mean, sd_sd)|, m_i from `first` to `last`

`roots` features are the roots of trees in which every node has `children` down to `depth`, numbered
level by level; the others stand alone. A child is silent where its parent is; of the children of
one parent that fire at once one stays, drawn evenly; a child's value is multiplied by v_parent /
m_parent. q_i makes up for what is silenced: q_i = p_i (1 + sum of the siblings' p / p_parent) /
p_parent, at most 1, and p_i without a parent.

The directions start random and are pushed apart by `apart_steps` steps of Adam on

    sum_{i != j} (D_i . D_j)^2 + n sum_i (|D_i|^2 - 1)^2

Positions are independent. Given u every e_i is on its own, so those of children are drawn only
where their parent fires: what is made at once is the nodes without parent and a list of what fires,
never rows x features. Every draw comes from a named stream of the data's seed.

Source: SynthSAEBench, Chanin and Garriga-Alonso 2026 (arXiv 2602.14687), whose 16k model the
defaults are; what their generator and this one give is held side by side in
benchmarks/synthetic_parity.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Generator, Tensor
from torch.nn.functional import normalize

from saelab.config import Frozen
from saelab.data.activations.store import Shard
from saelab.errors import SettingError
from saelab.seeding import torch_stream

#: Rows whose firings are drawn at once, and rows of a shard. Our choice: at 16k features a dense
#: code of the former is 134 MB, and the latter are 201 MB at d = 768.
ROWS, SHARD_ROWS = 2048, 65_536
#: The least variance of a firing's own noise, so that no feature is decided by the others alone.
OWN_NOISE = 0.01


class ForestConfig(Frozen):
    """What such activations are made of; the defaults are SynthSAEBench-16k.

    Args:
        d, features: width of the activations and number of true features.
        highest, lowest, exponent: of the firing probabilities.
        roots, children, depth: of the trees; depth 0 leaves every feature alone.
        rank, strength: of the correlations.
        first, last: mean value of the first and of the last feature where it fires.
        sd_mean, sd_sd: of the folded normal that standard deviations are drawn from.
        bias: length of what is added to every row.
        apart_steps, apart_lr: of pushing the directions apart.
        positions: per context; they are independent.

    Raises: SettingError for probabilities that are none, or more nodes than features.
    """

    kind: Literal["forest"] = "forest"
    d: PositiveInt = 768
    features: PositiveInt = 16_384
    highest: float = Field(default=0.4, gt=0, le=1)
    lowest: float = Field(default=5e-4, gt=0, le=1)
    exponent: PositiveFloat = 0.5
    roots: PositiveInt = 128
    children: PositiveInt = 4
    depth: NonNegativeInt = 3
    rank: PositiveInt = 25
    strength: NonNegativeFloat = 0.1
    first: PositiveFloat = 5.0
    last: PositiveFloat = 4.0
    sd_mean: NonNegativeFloat = 0.5
    sd_sd: NonNegativeFloat = 0.5
    bias: NonNegativeFloat = 0.5
    apart_steps: NonNegativeInt = 100
    apart_lr: PositiveFloat = 3e-4
    positions: PositiveInt = 64

    def model_post_init(self, _: Any) -> None:
        if self.lowest >= self.highest:
            raise SettingError("lowest", self.lowest, f"must be below highest = {self.highest}")
        if self.nodes > self.features:
            remedy = f"the trees have {self.nodes} nodes: lower roots, children or depth"
            raise SettingError("features", self.features, remedy)

    @property
    def level_sizes(self) -> list[int]:
        """Nodes of each level, the roots first."""
        return [self.roots * self.children**level for level in range(self.depth + 1)]

    @property
    def nodes(self) -> int:
        """Features that belong to a tree; they are the first ones."""
        return sum(self.level_sizes) if self.depth else 0

    @property
    def parent_of(self) -> Tensor:
        """int64 [features]; a feature without parent has itself."""
        parent = torch.arange(self.features)
        below = self.nodes - self.roots if self.depth else 0
        parent[self.roots : self.roots + below] = torch.arange(below) // self.children
        return parent

    @property
    def probabilities(self) -> Tensor:
        """p_i, what the features' rates are aimed at; float64 [features]."""
        rank = torch.arange(1, self.features + 1, dtype=torch.float64)
        weight = rank**-self.exponent
        share = (weight - weight[-1]) / (1 - weight[-1]) if self.features > 1 else weight
        return self.lowest + (self.highest - self.lowest) * share

    @property
    def own_probabilities(self) -> Tensor:
        """q_i, before parents and siblings silence anything; float64 [features]."""
        p, parent = self.probabilities, self.parent_of
        below = parent != torch.arange(self.features)
        family = torch.zeros_like(p).index_add_(0, parent[below], p[below])[parent]
        made_up = p / p[parent] * (1 + (family - p) / p[parent])
        return torch.where(below, made_up, p).clamp(max=1)


class InShards(ABC):
    """Made contexts in shards of some rows; each kind of features says what its chunks hold."""

    config: Any
    contexts: int

    @property
    @abstractmethod
    def shard_rows(self) -> int:
        """Rows of each shard but the last, about."""

    @property
    def shard_contexts(self) -> int:
        """Contexts of each shard but the last."""
        return max(1, self.shard_rows // self.config.positions)

    @property
    def n_shards(self) -> int:
        return math.ceil(self.contexts / self.shard_contexts)

    def codes(self) -> Tensor:
        """All true codes, float32 [contexts, positions, features]; `chunks` needs less memory."""
        return torch.cat([codes for i in range(self.n_shards) for codes in self.chunks(i)])

    @abstractmethod
    def chunks(self, shard: int) -> Iterator[Tensor]:
        """The true codes of a shard in order, each float32 [some contexts, positions, features]."""

    def counts(self, shard: int, most: int) -> Iterator[int]:
        """The contexts of a shard, at most so many at once."""
        left = min(self.shard_contexts, self.contexts - shard * self.shard_contexts)
        while left:
            count = min(left, max(1, most))
            yield count
            left -= count


@dataclass(frozen=True)
class ForestTruth(InShards):
    """The features behind the contexts of one part of the data; a function of its fields alone.

    Args:
        config, seed: decide the dictionary.
        part: parts of one seed share the dictionary and no codes.
        contexts: how many.
    """

    config: ForestConfig
    seed: int
    part: str
    contexts: int

    @property
    def directions(self) -> Tensor:
        """Unit rows D_i, float32 [features, d]."""
        c = self.config
        return _directions(c.features, c.d, c.apart_steps, c.apart_lr, self.seed)

    @cached_property
    def offset(self) -> Tensor:
        """b, float32 [d]."""
        draw = torch.randn(self.config.d, generator=self._stream("offset"))
        return self.config.bias * normalize(draw, dim=0)

    @cached_property
    def magnitudes(self) -> Tensor:
        """m_i, float32 [features]."""
        return torch.linspace(self.config.first, self.config.last, self.config.features)

    @cached_property
    def deviations(self) -> Tensor:
        """t_i, float32 [features]."""
        draw = torch.randn(self.config.features, generator=self._stream("deviations"))
        return (self.config.sd_mean + self.config.sd_sd * draw).abs()

    @cached_property
    def loadings(self) -> Tensor:
        """L_i, float32 [features, rank]."""
        c = self.config
        draw = c.strength * torch.randn(c.features, c.rank, generator=self._stream("loadings"))
        length = draw.norm(dim=1, keepdim=True)
        return draw * (math.sqrt(1 - OWN_NOISE) / length).clamp(max=1)

    @property
    def shard_rows(self) -> int:
        return SHARD_ROWS

    def chunks(self, shard: int) -> Iterator[Tensor]:
        """The true codes of a shard in order, each float32 [some contexts, positions, features]."""
        for firings in self._drawn(shard):
            codes = torch.zeros(firings.n, self.config.features)
            codes[firings.rows, firings.features] = firings.values
            yield codes.view(-1, self.config.positions, self.config.features)

    def shard(self, i: int) -> Shard:
        """The activations of the same contexts; every position counts."""
        c = self.config
        x = torch.cat([self._activations(firings) for firings in self._drawn(i)])
        x = x.view(-1, c.positions, c.d)
        return Shard(x, torch.ones(x.shape[:2], dtype=torch.bool))

    # ---- drawing -----------------------------------------------------------------------------

    def _stream(self, name: str, *keys: int | str) -> Generator:
        return torch_stream(self.seed, f"forest {name}", *keys)

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        """Where the own noise of each feature makes it fire, and its scale; float32 [features]."""
        above = -torch.special.ndtri(self.config.own_probabilities).float()
        return above, (1 - self.loadings.square().sum(1)).sqrt()

    def _drawn(self, shard: int) -> Iterator[_Firings]:
        """What fires in a shard, some contexts at a time."""
        c = self.config
        stream = self._stream("codes", self.part, shard)
        for count in self.counts(shard, ROWS // c.positions):
            yield self._firings(count * c.positions, stream)

    def _firings(self, n: int, stream: Generator) -> _Firings:
        """What fires in n rows."""
        c = self.config
        shared = torch.randn(n, c.rank, generator=stream)
        levels = [self._alone(torch.arange(c.nodes, c.features), shared, stream)]
        if c.depth:
            levels.append(self._alone(torch.arange(c.roots), shared, stream))
        first = 0
        for size in c.level_sizes[:-1]:
            levels.append(self._below(levels[-1], first, first + size, shared, stream))
            first += size
        rows, features, values = (
            torch.cat([getattr(level, name) for level in levels])
            for name in ("rows", "features", "values")
        )
        order = rows.argsort(stable=True)
        return _Firings(n, rows[order], features[order], values[order])

    def _alone(self, which: Tensor, shared: Tensor, stream: Generator) -> _Firings:
        """Features without parents."""
        above, scale = self._own
        own = torch.randn(len(shared), len(which), generator=stream).mul_(scale[which])
        rows, columns = (own.add_(shared @ self.loadings[which].T) > above[which]).nonzero().T
        features = which[columns]
        values = self._values(features, stream)
        on = values > 0
        return _Firings(len(shared), rows[on], features[on], values[on])

    def _below(
        self, parents: _Firings, first: int, start: int, shared: Tensor, stream: Generator
    ) -> _Firings:
        """The children of what fired: of nodes from `first` on, which are numbered from `start`."""
        c = self.config
        above, scale = self._own
        features = start + (parents.features - first)[:, None] * c.children
        features = features + torch.arange(c.children)
        own = scale[features] * torch.randn(features.shape, generator=stream)
        mean = (self.loadings[features] * shared[parents.rows][:, None]).sum(2)
        values = self._values(features, stream)
        on = (own + mean > above[features]) & (values > 0)
        lot = torch.rand(features.shape, generator=stream).masked_fill_(~on, -1)
        alone = torch.zeros_like(on).scatter_(1, lot.argmax(1, keepdim=True), True)
        which, place = (on & alone).nonzero().T
        parent = parents.values[which] / self.magnitudes[parents.features[which]]
        value = values[which, place] * parent
        return _Firings(parents.n, parents.rows[which], features[which, place], value)

    def _values(self, features: Tensor, stream: Generator) -> Tensor:
        draw = torch.randn(features.shape, generator=stream)
        return draw.mul_(self.deviations[features]).add_(self.magnitudes[features]).relu_()

    def _activations(self, firings: _Firings) -> Tensor:
        """float32 [rows, d]."""
        starts = torch.searchsorted(firings.rows, torch.arange(firings.n))
        x = torch.nn.functional.embedding_bag(
            firings.features,
            self.directions,
            starts,
            mode="sum",
            per_sample_weights=firings.values,
        )
        return x + self.offset


@dataclass(frozen=True, eq=False)
class _Firings:
    """What fires in n rows: its row, feature and value; int64, int64, float32 [firings]."""

    n: int
    rows: Tensor
    features: Tensor
    values: Tensor


@lru_cache(maxsize=2)
def _directions(features: int, d: int, steps: int, lr: float, seed: int) -> Tensor:
    """Kept: pushing 16k directions apart takes minutes."""
    draw = torch.randn(features, d, generator=torch_stream(seed, "forest directions"))
    return push_apart(normalize(draw, dim=1), steps, lr)


def push_apart(rows: Tensor, steps: int, lr: float) -> Tensor:
    """Unit rows [n, d], pushed apart by Adam; see above.

    The gradient, 4 (D D^T D - |D_i|^2 D_i + n (|D_i|^2 - 1) D_i), needs no n x n matrix.
    """
    rows = rows.clone()
    n = len(rows)
    optimiser = torch.optim.Adam([rows], lr=lr)
    for _ in range(steps):
        square = rows.square().sum(1, keepdim=True)
        rows.grad = rows @ (rows.T @ rows)
        rows.grad.sub_(rows * (square - n * (square - 1))).mul_(4)
        optimiser.step()
    return normalize(rows.detach(), dim=1)
