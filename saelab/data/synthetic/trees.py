"""Synthetic activations at scale: correlated features on trees, as in SynthSAEBench.

    x = sum_i v_i D_i + b        |D_i| = 1, |b| = bias
    p_i = lowest + (highest - lowest) (i^-exponent - n^-exponent) / (1 - n^-exponent)      i = 1..n
    s_i = 1[L_i . u + sqrt(1 - |L_i|^2) e_i > Phi^-1(1 - q_i)]      u ~ N(0, I_rank), e_i ~ N(0, 1)
    v_i = s_i relu(m_i + t_i g_i)        L_i ~ N(0, strength^2 I), |L_i|^2 <= 0.99
                                         t_i = |N(sd_mean, sd_sd)|, m_i from `first` to `last`

`roots` features are the roots of trees in which every node has `children` down to `depth`, numbered
level by level; the others belong to no tree. A child is silent where its parent is; of the children
of one parent that fire at once one remains, drawn evenly; a child's value is multiplied by v_parent
/ m_parent. q_i compensates for the silencing: q_i = p_i (1 + sum of the siblings' p / p_parent) /
p_parent, at most 1, and p_i without a parent.

The directions start random and are pushed apart by `apart_steps` steps of Adam on

    sum_{i != j} (D_i . D_j)^2 + n sum_i (|D_i|^2 - 1)^2

Positions are independent. Given u the e_i are independent, so those of children are drawn only
where their parent fires: memory holds the nodes without parent and a list of firings, never rows x
features. Every draw comes from a named stream of the data's seed.

Source: SynthSAEBench, Chanin and Garriga-Alonso 2026 (arXiv 2602.14687), whose 16k model the
defaults are; benchmarks/synthetic_parity.py compares their generator with this one.
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
ROWS_AT_ONCE, SHARD_ROWS = 2048, 65_536
#: Smallest variance of a feature's independent noise, so that the others never determine it.
MIN_NOISE = 0.01


class ForestConfig(Frozen):
    """Settings of such activations; the defaults are SynthSAEBench-16k.

    Args:
        d, features: width of the activations and number of true features.
        highest, lowest, exponent: parameters of the firing probabilities.
        roots, children, depth: shape of the trees; depth 0 makes no trees.
        rank, strength: parameters of the correlations.
        first, last: mean value of the first and of the last feature when it fires.
        sd_mean, sd_sd: folded normal from which standard deviations are drawn.
        bias: length of the vector that is added to every row.
        apart_steps, apart_lr: steps and learning rate of pushing the directions apart.
        positions: positions of a context; they are independent.

    Raises: SettingError for impossible probabilities, or more nodes than features.
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
        """Number of nodes of each level, the roots first."""
        return [self.roots * self.children**level for level in range(self.depth + 1)]

    @property
    def nodes(self) -> int:
        """Number of features that belong to a tree; they are the first ones."""
        return sum(self.level_sizes) if self.depth else 0

    @property
    def parent_of(self) -> Tensor:
        """Index of each feature's parent, int64 [features]; a feature without parent has itself."""
        parent = torch.arange(self.features)
        below = self.nodes - self.roots if self.depth else 0
        parent[self.roots : self.roots + below] = torch.arange(below) // self.children
        return parent

    @property
    def probabilities(self) -> Tensor:
        """p_i, the intended rates of the features; float64 [features]."""
        rank = torch.arange(1, self.features + 1, dtype=torch.float64)
        weight = rank**-self.exponent
        share = (weight - weight[-1]) / (1 - weight[-1]) if self.features > 1 else weight
        return self.lowest + (self.highest - self.lowest) * share

    @property
    def unsilenced_probabilities(self) -> Tensor:
        """q_i, before parents and siblings silence any firing; float64 [features]."""
        p, parent = self.probabilities, self.parent_of
        is_child = parent != torch.arange(self.features)
        family = torch.zeros_like(p).index_add_(0, parent[is_child], p[is_child])[parent]
        compensated = p / p[parent] * (1 + (family - p) / p[parent])
        return torch.where(is_child, compensated, p).clamp(max=1)


class ShardedTruth(ABC):
    """Base of synthetic contexts in shards; each kind of features defines its chunks."""

    config: Any
    contexts: int

    @property
    @abstractmethod
    def shard_rows(self) -> int:
        """Approximate number of rows of each shard but the last."""

    @property
    def shard_contexts(self) -> int:
        """Number of contexts of each shard but the last."""
        return max(1, self.shard_rows // self.config.positions)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.contexts / self.shard_contexts)

    def codes(self) -> Tensor:
        """Returns all true codes, float32 [contexts, positions, features].

        `chunks` needs less memory.
        """
        return torch.cat([codes for i in range(self.n_shards) for codes in self.chunks(i)])

    @abstractmethod
    def chunks(self, shard: int) -> Iterator[Tensor]:
        """Yields the true codes of a shard in order, each float32 [n, positions, features]."""

    def counts(self, shard: int, most: int) -> Iterator[int]:
        """Yields the numbers of contexts of a shard's chunks, each at most `most`."""
        remaining = min(self.shard_contexts, self.contexts - shard * self.shard_contexts)
        while remaining:
            count = min(remaining, max(1, most))
            yield count
            remaining -= count


@dataclass(frozen=True)
class ForestTruth(ShardedTruth):
    """True features of the contexts of one part of the data; a function of its fields alone.

    Args:
        config, seed: decide the dictionary.
        part: parts of one seed share the dictionary, but no codes.
        contexts: number of contexts.
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
        draw = torch.randn(self.config.d, generator=self._stream("offset"), dtype=torch.float32)
        return self.config.bias * normalize(draw, dim=0)

    @cached_property
    def magnitudes(self) -> Tensor:
        """m_i, float32 [features]."""
        return torch.linspace(
            self.config.first, self.config.last, self.config.features, dtype=torch.float32
        )

    @cached_property
    def deviations(self) -> Tensor:
        """t_i, float32 [features]."""
        draw = torch.randn(
            self.config.features, generator=self._stream("deviations"), dtype=torch.float32
        )
        return (self.config.sd_mean + self.config.sd_sd * draw).abs()

    @cached_property
    def loadings(self) -> Tensor:
        """L_i, float32 [features, rank]."""
        c = self.config
        draw = c.strength * torch.randn(
            c.features, c.rank, generator=self._stream("loadings"), dtype=torch.float32
        )
        length = draw.norm(dim=1, keepdim=True)
        return draw * (math.sqrt(1 - MIN_NOISE) / length).clamp(max=1)

    @property
    def shard_rows(self) -> int:
        """Approximate number of rows of each shard but the last."""
        return SHARD_ROWS

    def chunks(self, shard: int) -> Iterator[Tensor]:
        """Yields the true codes of a shard in order, each float32 [n, positions, features]."""
        for firings in self._draw_shard(shard):
            codes = torch.zeros(firings.n, self.config.features, dtype=torch.float32)
            codes[firings.rows, firings.features] = firings.values
            yield codes.view(-1, self.config.positions, self.config.features)

    def shard(self, i: int) -> Shard:
        """Returns the activations of the same contexts; every position counts."""
        c = self.config
        x = torch.cat([self._activations(firings) for firings in self._draw_shard(i)])
        x = x.view(-1, c.positions, c.d)
        return Shard(x, torch.ones(x.shape[:2], dtype=torch.bool))

    # ---- drawing -----------------------------------------------------------------------------

    def _stream(self, name: str, *keys: int | str) -> Generator:
        return torch_stream(self.seed, f"forest {name}", *keys)

    @cached_property
    def _noise_thresholds(self) -> tuple[Tensor, Tensor]:
        """Threshold of each feature's noise, and the noise's scale; float32 [features]."""
        above = -torch.special.ndtri(self.config.unsilenced_probabilities).float()
        return above, (1 - self.loadings.square().sum(1)).sqrt()

    def _draw_shard(self, shard: int) -> Iterator[_Firings]:
        """Yields the firings of a shard, a few contexts at a time."""
        c = self.config
        stream = self._stream("codes", self.part, shard)
        for count in self.counts(shard, ROWS_AT_ONCE // c.positions):
            yield self._draw_firings(count * c.positions, stream)

    def _draw_firings(self, n: int, stream: Generator) -> _Firings:
        """Draws the firings of n rows."""
        c = self.config
        shared = torch.randn(n, c.rank, generator=stream, dtype=torch.float32)
        levels = [self._draw_without_parents(torch.arange(c.nodes, c.features), shared, stream)]
        if c.depth:
            levels.append(self._draw_without_parents(torch.arange(c.roots), shared, stream))
        first = 0
        for size in c.level_sizes[:-1]:
            levels.append(self._draw_children(levels[-1], first, first + size, shared, stream))
            first += size
        rows, features, values = (
            torch.cat([getattr(level, name) for level in levels])
            for name in ("rows", "features", "values")
        )
        order = rows.argsort(stable=True)
        return _Firings(n, rows[order], features[order], values[order])

    def _draw_without_parents(self, which: Tensor, shared: Tensor, stream: Generator) -> _Firings:
        """Draws the firings of features without parents.

        Args:
            which: int64, their numbers.
            shared: u of each row, float32 [rows, rank].
            stream: generator of all draws.
        """
        above, scale = self._noise_thresholds
        noise = torch.randn(len(shared), len(which), generator=stream, dtype=torch.float32).mul_(
            scale[which]
        )
        rows, columns = (noise.add_(shared @ self.loadings[which].T) > above[which]).nonzero().T
        features = which[columns]
        values = self._draw_values(features, stream)
        on = values > 0
        return _Firings(len(shared), rows[on], features[on], values[on])

    def _draw_children(
        self, parents: _Firings, first: int, start: int, shared: Tensor, stream: Generator
    ) -> _Firings:
        """Draws the firings of the children of firing parents.

        Args:
            parents: firings of one level.
            first, start: numbers of the level's first node and of its first child.
            shared: u of each row, float32 [rows, rank].
            stream: generator of all draws.
        """
        c = self.config
        above, scale = self._noise_thresholds
        features = start + (parents.features - first)[:, None] * c.children
        features = features + torch.arange(c.children)
        noise = scale[features] * torch.randn(features.shape, generator=stream, dtype=torch.float32)
        mean = (self.loadings[features] * shared[parents.rows][:, None]).sum(2)
        values = self._draw_values(features, stream)
        on = (noise + mean > above[features]) & (values > 0)
        lot = torch.rand(features.shape, generator=stream, dtype=torch.float32).masked_fill_(
            ~on, -1
        )
        winner = torch.zeros_like(on).scatter_(1, lot.argmax(1, keepdim=True), True)
        which, child = (on & winner).nonzero().T
        parent = parents.values[which] / self.magnitudes[parents.features[which]]
        value = values[which, child] * parent
        return _Firings(parents.n, parents.rows[which], features[which, child], value)

    def _draw_values(self, features: Tensor, stream: Generator) -> Tensor:
        """Draws the values of firings of the features, which may be zero."""
        draw = torch.randn(features.shape, generator=stream, dtype=torch.float32)
        return draw.mul_(self.deviations[features]).add_(self.magnitudes[features]).relu_()

    def _activations(self, firings: _Firings) -> Tensor:
        """Returns the activations of firings, float32 [rows, d]."""
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
    """Firings in n rows: their rows, features and values; int64, int64, float32 [firings]."""

    n: int
    rows: Tensor
    features: Tensor
    values: Tensor


@lru_cache(maxsize=2)
def _directions(features: int, d: int, steps: int, lr: float, seed: int) -> Tensor:
    """Returns the directions, cached, because pushing 16k of them apart takes minutes."""
    draw = torch.randn(
        features, d, generator=torch_stream(seed, "forest directions"), dtype=torch.float32
    )
    return push_apart(normalize(draw, dim=1), steps, lr)


def push_apart(rows: Tensor, steps: int, lr: float) -> Tensor:
    """Returns the unit rows [n, d] pushed apart by Adam; see the module's docstring.

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
