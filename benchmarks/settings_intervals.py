"""Candidates for the intervals over settings: which of them keep 95%, and how wide they are.

    python benchmarks/settings_intervals.py [--studies 20000]

Prints, over 3, 5 and 8 settings of 8+8 or 3+8 cells and spreads between settings of 0, 1 and 3
standard errors (and with one setting whose cells spread five times as much), the smallest and the
largest coverage of each candidate, and its median width at a spread of 1 over that of the one used.

    PM        weights 1 / (tau^2 + e_i^2), tau by Paule and Mandel, from estimated e_i
    HK        Hartung and Knapp's standard error; HK >= 1: with their factor at least 1
    Nagashima draws tau from its confidence distribution (generalised Q), then mean and new effect
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import t as student

from saelab.stats import Array
from saelab.verdict.across_settings import intervals
from saelab.verdict.effect import estimate

LEVEL = 0.05
#: Draws of Nagashima's interval, and the share of studies that it is computed for.
DRAWS, SHARE = 400, 0.1

Spreads = Callable[[int], Array]


def draw(
    k: int, cells: tuple[int, int], tau: float, spreads: Spreads, studies: int
) -> tuple[Array, Array, Array]:
    """Measured effects and their variances [studies, k], and the true effect of a new setting."""
    stream = np.random.default_rng([k, *cells, round(tau)])
    n_arm, n_base = cells
    between = tau * math.sqrt(1 / n_arm + 1 / n_base)
    true = between * stream.normal(size=(studies, k + 1))
    of_seed = math.sqrt(0.3) * stream.normal(size=(studies, k, max(cells)))
    arm, base = (math.sqrt(0.7) * stream.normal(size=(studies, k, n)) for n in cells)
    sd = spreads(k)[:, None]
    arm, base = sd * (arm + of_seed[..., :n_arm]), sd * (base + of_seed[..., :n_base])
    effect = estimate(arm + true[:, :k, None], base, min(cells))
    return effect.mean, effect.variance, true[:, k]


def weighted(y: Array, v: Array, tau2: Array) -> tuple[Array, Array, Array]:
    """Weighted mean, sum of weights, and generalised Q, along the last axis."""
    w = 1 / (v + tau2[..., None])
    total = w.sum(axis=-1)
    mean = (w * y).sum(axis=-1) / total
    return mean, total, (w * (y - mean[..., None]) ** 2).sum(axis=-1)


def solve(y: Array, v: Array, goal: Array | float) -> Array:
    """tau^2 at which the generalised Q equals the goal; 0 where it is smaller everywhere."""
    high = np.full(y.shape[:-1], 1e4 * (float(np.ptp(y)) ** 2 + float(v.max())))
    low = np.zeros_like(high)
    for _ in range(60):
        middle = np.sqrt(np.maximum(low, 1e-9) * high)
        above = weighted(y, v, middle)[2] > goal
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(weighted(y, v, np.zeros_like(low))[2] <= goal, 0.0, low)


def candidates(y: Array, v: Array) -> Iterator[tuple[str, Array, Array]]:
    """Yields the name of each candidate, its middle and its half width, all [studies]."""
    k = y.shape[-1]
    t1, t2 = (float(student.ppf(1 - LEVEL / 2, k - n)) for n in (1, 2))
    ours = intervals(y, LEVEL)
    yield "mean: equal weights, HK (used)", ours.mean, ours.half
    tau2 = solve(y, v, k - 1)
    mean, total, q = weighted(y, v, tau2)
    factor = q / (k - 1)
    yield "mean: PM weights, HK", mean, t1 * np.sqrt(factor / total)
    yield "mean: PM weights, HK >= 1", mean, t1 * np.sqrt(np.maximum(factor, 1) / total)
    yield "new: equal weights, t(k-1) (used)", ours.mean, ours.new_half
    yield "new: Higgins, t(k-2)", mean, t2 * np.sqrt(tau2 + 1 / total)
    yield "new: PM and HK, t(k-2)", mean, t2 * np.sqrt(tau2 + factor / total)
    largest = np.maximum(factor, 1)
    yield "new: PM and HK >= 1, t(k-1)", mean, t1 * np.sqrt(tau2 + largest / total)


def nagashima(y: Array, v: Array, stream: np.random.Generator) -> tuple[Array, Array]:
    """Middle and half width of the prediction interval from draws of tau^2."""
    k, shape = y.shape[-1], (len(y), DRAWS)
    y, v = (np.broadcast_to(x[:, None], (*shape, k)) for x in (y, v))
    tau2 = solve(y, v, stream.chisquare(k - 1, size=shape))
    mean, total, q = weighted(y, v, tau2)
    error = np.sqrt(q / ((k - 1) * total))
    new = mean + np.sqrt(tau2) * stream.normal(size=shape)
    new -= stream.standard_t(k - 1, size=shape) * error
    low, high = np.quantile(new, [LEVEL / 2, 1 - LEVEL / 2], axis=1)
    return (low + high) / 2, (high - low) / 2


def measure(spreads: Spreads, studies: int) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> coverage in every case, and median widths at a spread of 1 over those of ours."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for k, cells, tau in itertools.product((3, 5, 8), ((8, 8), (3, 8)), (0.0, 1.0, 3.0)):
        y, v, new = draw(k, cells, tau, spreads, studies)
        few = slice(max(1, int(SHARE * studies)))
        made = [(name, middle, half, slice(None)) for name, middle, half in candidates(y, v)]
        stream = np.random.default_rng(k)
        made.append(("new: Nagashima, t(k-1)", *nagashima(y[few], v[few], stream), few))
        used = {name[:3]: np.median(half) for name, _, half, _ in made if "used" in name}
        for name, middle, half, part in made:
            target = np.zeros(studies) if name.startswith("mean") else new
            coverage, widths = found.setdefault(name, ([], []))
            coverage.append(float((np.abs(target[part] - middle) <= half).mean()))
            if tau == 1.0:
                widths.append(float(np.median(half) / used[name[:3]]))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    options.add_argument("--studies", type=int, default=20_000)
    studies = options.parse_args().studies
    cases: dict[str, Spreads] = {
        "cells spread by 0.7 to 1.4": lambda k: np.linspace(0.7, 1.4, k),
        "one setting's cells spread five times as much": lambda k: np.array(
            [5.0] + [1.0] * (k - 1)
        ),
    }
    for title, spreads in cases.items():
        print(f"{title}\n{'candidate':36} {'coverage':>15}   width over the one used")
        for name, (coverage, widths) in measure(spreads, studies).items():
            span = f"{min(coverage):.3f} to {max(coverage):.3f}"
            print(f"{name:36} {span:>15}   {min(widths):.2f} to {max(widths):.2f}")
        print()


if __name__ == "__main__":
    main()
