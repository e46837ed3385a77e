"""Mean agreement between the seeds of an arm, with its error by the jackknife over seeds.

Each value belongs to a pair of seeds, and the pairs that share a seed go up and down with it: the
means of the seeds over their pairs differ by much less than their common mean is off. With n seeds,
m pairs of them, v(i, j) the value of a pair, U the mean over all pairs, and U(-i) that over the
pairs without seed i:

    p_i      = U + (n - 1) (mean_j U(-j) - U(-i))     pseudo-values, whose mean is U
    error    = sd(p) / sqrt(n)                        the jackknife's
    interval = U +- t(n - 1) error

So the pseudo-values of seeds are to an agreement what values of seeds are to any other metric: the
verdict's estimate (`effect`) of theirs is the jackknife of a difference, paired where seeds are
shared. For v = mean + a_i + a_j + e_ij the variance from a is unbiased; that from e is too large by
the factor 2 (n - 1) / (n - 2). Two seeds have one pair, and no error.

Where every seed has as many pairs as any other, p_i - U is 2 (n - 1) / (n - 2) times the distance
of the seed's mean from U, which is what files of older versions allow.

The interval of one arm has the level alpha / WIDER, since a skewed a makes it too short (with
exponential a and hardly any e it covers 0.88 to 0.91 without); a difference needs no such remedy.

Source: the jackknife of a U statistic, Arvesen 1969; coverage by simulation, `intervals`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saelab import stats
from saelab.runtime.counting import count
from saelab.stats import Array

#: Divides the level of the interval of one arm. Our choice: the smallest whole number with which it
#: covers 0.93 at 3 to 12 seeds with exponential effects of seeds.
WIDER = 3
#: Seeds from which pairs are left without any one of them.
FEWEST = 3

#: Two seeds -> value.
Pairs = Mapping[tuple[int, int], float]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Mean over pairs of seeds and its interval; low and high are None for fewer than 3 seeds."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    pairs: int


def pseudo_values(values: Array, members: NDArray[np.int64]) -> Array:
    """Computes the pseudo-value of every seed.

    Args:
        values: of pairs, [..., m].
        members: the two seeds of each pair, int64 [m, 2], counted from 0 without gaps; without any
            one seed there must be a pair left.

    Returns: [..., n].
    """
    n, m = int(members.max()) + 1, len(members)
    belongs = np.zeros((m, n))
    belongs[np.arange(m)[:, None], members] = 1.0
    whole = values.sum(axis=-1, keepdims=True)
    without = (whole - values @ belongs) / (m - belongs.sum(axis=0))
    return whole / m + (n - 1) * (without.mean(axis=-1, keepdims=True) - without)


def replicates(pairs: Pairs) -> dict[int, float | None]:
    """Values of seeds whose mean is that over pairs and whose spread gives its error.

    Returns: seed -> pseudo-value; where there are too few pairs for them, the mean over pairs
        stands for the first seed and the others are None.
    """
    seeds = sorted({seed for pair in pairs for seed in pair})
    if not pairs:
        return {}
    left = [sum(seed not in pair for pair in pairs) for seed in seeds]
    if not all(left):
        return dict.fromkeys(seeds) | {seeds[0]: sum(pairs.values()) / len(pairs)}
    members = np.array([[seeds.index(seed) for seed in pair] for pair in pairs])
    values = pseudo_values(np.array(list(pairs.values())), members)
    return dict(zip(seeds, values.tolist(), strict=True))


def replicates_of_means(means: Mapping[int, float | None]) -> dict[int, float | None]:
    """Values of seeds as `replicates`, from the mean of each over its pairs, of which every seed
    has as many as any other; missing ones stay None."""
    present = {seed: mean for seed, mean in means.items() if mean is not None}
    n = len(present)
    if not n:
        return dict(means)
    whole = sum(present.values()) / n
    if n < FEWEST:
        return dict.fromkeys(means) | {next(iter(present)): whole}
    factor = 2 * (n - 1) / (n - 2)
    return dict.fromkeys(means) | {s: whole + factor * (v - whole) for s, v in present.items()}


def agreement(pairs: Pairs, alpha: float = 0.05) -> Agreement | None:
    """Computes the mean over pairs and its interval; None without pairs."""
    values = [value for value in replicates(pairs).values() if value is not None]
    if not values:
        return None
    low = high = None
    if len(values) > 1:
        low, high = (float(end) for end in stats.t_interval(values, alpha / WIDER))
    seeds = len({seed for pair in pairs for seed in pair})
    mean = sum(pairs.values()) / len(pairs)
    return Agreement(mean=mean, low=low, high=high, seeds=seeds, pairs=len(pairs))


def without_seeds(pairs: Pairs, lost: Iterable[int]) -> dict[tuple[int, int], float]:
    """Returns the pairs of which both seeds are left."""
    gone = set(lost)
    return {pair: value for pair, value in pairs.items() if gone.isdisjoint(pair)}


def agreement_text(result: Agreement) -> str:
    """'0.512 [0.498, 0.526], 28 pairs of 8 seeds'."""
    span = (
        "without interval, which takes 3 seeds"
        if result.low is None or result.high is None
        else f"[{result.low:.3f}, {result.high:.3f}]"
    )
    counts = f"{count(result.pairs, 'pair')} of {count(result.seeds, 'seed')}"
    return f"{result.mean:.3f} {span}, {counts}"


def coverage_text(alpha: float = 0.05) -> str:
    """Names the nominal coverage of an arm's interval: '98.3%'."""
    return f"{1 - alpha / WIDER:.1%}"
