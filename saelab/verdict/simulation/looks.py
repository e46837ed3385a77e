"""Simulated comparisons that are judged again and again, each time with the seeds that the verdict
asked for; studies with equal numbers of seeds are judged together."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saelab import stats
from saelab.seeding import numpy_stream
from saelab.stats import Array
from saelab.verdict.effect import Effect, estimate
from saelab.verdict.judge import POWER, Rules, choose_words
from saelab.verdict.simulation.cells import CORRELATIONS, FVU, SESOI, Kind, draw_two
from saelab.verdict.simulation.rows import Row, share_row

#: Seeds of the first look and at most, and number of looks at most.
FIRST, MOST, LOOKS = 3, 60, 6


def look_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """Judging, adding the seeds that the verdict asks for, and judging again."""
    for r in CORRELATIONS:
        for sd in (0.0017, 0.003, 0.005, 0.008):
            stream = numpy_stream(seed, "simulation", f"looks {kind} {sd:g} {r:g}")
            of_cell = sd / math.sqrt(2 * (1 - r))
            arm, base = (FVU + of_cell * side for side in draw_two(MOST, kind, r, studies, stream))
            yield share_row(
                "no effect, up to 6 looks: a difference",
                f"{kind}, from 3 to 60 seeds, sd of differences {sd:g}, r = {r:g}",
                look_again(arm, base),
                (0.0, 0.05),
            )


def look_again(arm: Array, base: Array) -> NDArray[np.bool_]:
    """Judges studies up to `LOOKS` times; True where a look finds a difference [studies].

    Args:
        arm, base: cells of the same seeds [studies, MOST].
    """
    differs = np.zeros(len(arm), dtype=bool)
    seeds = np.full(len(arm), FIRST)  # 0 once a study has ended
    for look in range(1, LOOKS + 1):
        level = Rules(primary="fvu", direction="lower", sesoi=SESOI, looks=look).level(1)
        for n in np.unique(seeds[seeds > 0]).tolist():
            group = np.flatnonzero(seeds == n)
            effect = estimate(arm[group, :n], base[group, :n], n)
            differs[group] = effect.p < level
            seeds[group] = np.where(differs[group], 0, -_next_seeds(effect, level))
        seeds = -seeds  # the new numbers were negative, so that no study was judged twice
    return differs


def _next_seeds(effect: Effect, level: float) -> NDArray[np.int_]:
    """Seeds at the next look; 0 where there is none."""
    low, high = effect.interval(level)
    word = choose_words(effect.mean, low, high, SESOI)
    needed = np.minimum(MOST, seeds_needed(effect, SESOI, level))
    return np.where((word == "cannot tell yet") & (effect.n[0] < MOST), needed, 0)


def seeds_needed(effect: Effect, sesoi: float, level: float) -> NDArray[np.int_]:
    """Seeds that `judge.seeds_to_tell` asks for, of many comparisons at once: 0 for none, and
    MOST + 1 for any number above MOST."""
    present, sd = min(effect.n[:2]), effect.pair_sd
    to_find, to_exclude = smallest_ratios(level)
    flips = math.ceil(math.log2(2 / level))
    find = _fewest(to_find, sesoi, sd, flips)
    exclude = _fewest(to_exclude, sesoi, sd, 2)
    planned = np.where((find > 0) & (exclude > 0), np.maximum(find, exclude), 0)
    size = np.abs(effect.mean)
    observed = np.where(size >= sesoi, _fewest(to_find, size, sd, flips), 0)
    return np.where(planned > present, planned, np.where(observed > present, observed, 0))


def _fewest(ratios: Array, size: Array | float, sd: Array, without_spread: int) -> NDArray[np.int_]:
    """Fewest seeds at which an effect of this size is enough; as `seeds_needed` returns them.

    Args:
        ratios: smallest ones that are enough at 2, 3, ... MOST seeds and at `stats.MOST_PAIRS`.
        without_spread: the number where sd is 0.
    """
    ratio = size / np.where(sd > 0, sd, 1.0)
    n = 2 + np.searchsorted(-ratios, -ratio, side="left")
    return np.where(sd > 0, np.where(n > MOST + 1, 0, n), without_spread)


@functools.cache
def smallest_ratios(level: float) -> tuple[Array, Array]:
    """Smallest effects, in standard deviations of a difference, that have the power `judge.POWER`
    at 2, 3, ... MOST and at `stats.MOST_PAIRS` seeds: to be found, and to be excluded if there is
    none.
    """
    from scipy.optimize import brentq

    def to_exclude(n: int) -> float:
        def excess(ratio: float) -> float:
            return stats.tost_power(n, ratio, level / 2) - POWER

        return float(brentq(excess, 0.0, 10 / level, xtol=1e-10))  # type: ignore[arg-type]

    seeds = [*range(2, MOST + 1), stats.MOST_PAIRS]
    to_find = [stats.detectable_ratio(n - 1, level, POWER) / math.sqrt(n) for n in seeds]
    return np.array(to_find), np.array([to_exclude(n) for n in seeds])
