"""Simulated coverage of intervals that are not made of independent cells: the agreement between
seeds, whose values belong to pairs, and an effect over documents of the text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from saelab import stats
from saelab.runtime.counting import count
from saelab.seeding import numpy_stream
from saelab.stats import Array
from saelab.verdict.agreement import WIDER, pseudo_values
from saelab.verdict.effect import estimate
from saelab.verdict.over_texts import half_width
from saelab.verdict.simulation.cells import CORRELATIONS, KINDS, draw_noise, draw_two
from saelab.verdict.simulation.rows import Row, share_row

#: Seeds of an arm.
SEEDS = (3, 5, 8)
#: Spread of what a pair adds, as a share of the spread of what a seed adds to all of its pairs. The
#: design's study has 0.5; the shipped arms lie between.
OF_PAIR = (0.1, 0.5, 1.0)
#: Documents of a text, and what the interval then covers of an effect that differs between them as
#: exponential numbers do: with few documents the one that has most of it is often not among them.
SKEWED = {20: 0.9, 60: 0.92, 200: 0.93}


def agreement_rows(studies: int, seed: int) -> Iterator[Row]:
    """Intervals of the agreement of one arm, and of the difference of two with the same seeds."""
    for kind in KINDS:
        for n in SEEDS:
            for share in OF_PAIR:
                for r in CORRELATIONS:
                    stream = numpy_stream(
                        seed, "simulation", f"agreement {kind} {n} {share:g} {r:g}"
                    )
                    of_seed = draw_two(n, kind, r, studies, stream)
                    one, other = (_pseudo_values(values, share, stream) for values in of_seed)
                    cells = f"{kind}, {count(n, 'seed')}, noise of a pair {share:g} of a seed's"
                    low, high = estimate(one, other, n).interval(0.05)
                    yield share_row(
                        "difference of two agreements: interval covers",
                        f"{cells}, r = {r:g}",
                        (low <= 0) & (high >= 0),
                        (0.93, 1.0),
                    )
                low, high = stats.t_interval(one, 0.05 / WIDER)
                inside = (low <= 0) & (high >= 0)
                yield share_row(
                    "agreement of an arm's seeds: interval covers", cells, inside, (0.93, 1.0)
                )


def _pseudo_values(of_seed: Array, share: float, stream: np.random.Generator) -> Array:
    """Draws v(i, j) = a_i + a_j + e_ij of all pairs of seeds.

    Args:
        of_seed: a [studies, n].
        share: standard deviation of e.

    Returns: pseudo-values [studies, n].
    """
    studies, n = of_seed.shape
    pairs = np.stack(np.triu_indices(n, 1), axis=1)
    values = of_seed[:, pairs].sum(axis=-1) + share * stream.normal(size=(studies, len(pairs)))
    return pseudo_values(values, pairs)


def text_rows(studies: int, seed: int) -> Iterator[Row]:
    """Intervals over documents of unequal lengths, between which the effect differs."""
    for kind in KINDS:
        for n in SKEWED:
            stream = numpy_stream(seed, "simulation", f"texts {kind} {n}")
            tokens = np.exp(0.7 * stream.normal(size=(studies, n)))
            power = tokens * np.exp(0.2 * stream.normal(size=tokens.shape))
            effect = draw_noise(stream, kind, tokens.shape)
            estimate_ = (effect * power).sum(axis=1) / power.sum(axis=1)
            z = power / power.sum(axis=1, keepdims=True) * (effect - estimate_[:, None])
            inside = np.abs(estimate_) <= half_width(z, tokens, 0.05)
            yield share_row(
                "effect over texts: 95% interval covers",
                f"{kind}, {count(n, 'document')} of lengths that differ by a factor of 2",
                inside,
                (SKEWED[n] if kind == "skewed" else 0.93, 1.0),
            )
