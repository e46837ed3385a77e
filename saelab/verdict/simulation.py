"""Simulation that checks the rules of the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from saelab import stats
from saelab.seeding import numpy_stream
from saelab.verdict.judge import Kind, choose_words

#: Shares of words that a simulation counts; a word is its name with spaces.
SHARES = ("helps", "hurts", "no_evidence", "cannot_tell")


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Results of the rules on simulated cells: shares over all simulated runs and arms.

    Args:
        kind, n, arms, effect, sesoi: settings of the cells, see `simulate`.
        test: chosen for them.
        simulations: number of simulated runs.
        any_told: share of runs in which at least one arm 'helps' or 'hurts'.
        helps, hurts, no_evidence, cannot_tell: shares of the words over runs and arms.
        coverage: share of t intervals that hold the true effect.
    """

    kind: Kind
    n: int
    arms: int
    effect: float
    sesoi: float
    test: str
    simulations: int
    any_told: float
    helps: float
    hurts: float
    no_evidence: float
    cannot_tell: float
    coverage: float


def simulate(
    kind: Kind,
    n: int,
    arms: int = 1,
    effect: float = 0.0,
    sesoi: float = 0.0,
    simulations: int = 2000,
    seed: int = 0,
    alpha: float = 0.05,
) -> Simulation:
    """Applies the rules of `judge` to simulated runs.

    Args:
        kind: distribution of the cells: 'normal', 'skewed' (exponential) or 'discrete' (20 coin
            throws), drawn alike for arm and baseline; 'asymmetric' draws skewed *differences*,
            which no exchange of arm and baseline can give.
        n: pairs.
        arms: arms of the run, each with its own draws against a shared baseline.
        effect: true effect of every arm, in standard deviations of the differences.
        sesoi: smallest effect of interest, in the same unit.
        simulations: simulated runs.
        seed: of the stream 'simulation'.
        alpha: level.
    """
    stream = numpy_stream(seed, "simulation", kind, n, arms)
    d = _simulated_differences(stream, kind, (simulations, arms, n)) + effect
    p_holm = stats.holm(stats.chosen_p(d, arms, alpha))
    word = choose_words(d.mean(axis=-1), p_holm, stats.tost_p(d, sesoi), alpha)
    low, high = stats.t_interval(d, alpha)
    decided = (word == "helps") | (word == "hurts")
    shares = {w: float(np.mean(word == w.replace("_", " "))) for w in SHARES}
    return Simulation(
        kind=kind,
        n=n,
        arms=arms,
        effect=effect,
        sesoi=sesoi,
        test=stats.choose_test(n, arms, alpha),
        simulations=simulations,
        any_told=float(decided.any(axis=-1).mean()),
        **shares,
        coverage=float(np.mean((low <= effect) & (effect <= high))),
    )


def _simulated_differences(
    stream: np.random.Generator, kind: Kind, shape: tuple[int, int, int]
) -> stats.Array:
    """Differences [simulations, arms, n] of mean 0 and standard deviation 1."""
    if kind == "asymmetric":
        return stream.exponential(size=shape) - 1
    simulations, arms, n = shape
    cells = (simulations, arms + 1, n)
    if kind == "normal":
        values, sd = stream.normal(size=cells), 1.0
    elif kind == "skewed":
        values, sd = stream.exponential(size=cells), 1.0
    else:
        values, sd = stream.binomial(20, 0.8, size=cells) / 20, math.sqrt(0.2 * 0.8 / 20)
    return (values[:, 1:] - values[:, :1]) / (sd * math.sqrt(2))


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """Promise of the rules, and the share that simulation gives.

    Args:
        promise: in words.
        run: the simulated runs.
        observed: the share that the promise is about.
        low, high: promised bounds; None, None for a row that is shown without a promise.
        kept: whether observed lies inside, with 3 standard errors of simulation allowed.
    """

    promise: str
    run: Simulation
    observed: float
    low: float | None
    high: float | None
    kept: bool | None

    def line(self) -> str:
        run = self.run
        bounds = "" if self.low is None else f"{self.low:.3f}-{self.high:.3f}"
        kept = {True: "kept", False: "BROKEN", None: "no promise"}[self.kept]
        return _format_row(
            self.promise, run.kind, run.n, run.arms, run.test, f"{self.observed:.3f}", bounds, kept
        )


def _format_row(*cells: object) -> str:
    widths = (34, 10, 5, 4, 9, 8, 11)
    text = [f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=False)]
    return " ".join([*text, str(cells[-1])])


#: Names the columns of `ValidationRow.line`.
HEADING = _format_row("promise", "cells", "pairs", "arms", "test", "observed", "promised", "kept?")


def validation_table(simulations: int = 2000, seed: int = 0) -> list[ValidationRow]:
    """Checks the promises of the verdict by simulation, at alpha .05.

    Returns: rows on false alarms, coverage, power at the smallest detectable effect and false
        equivalence; two last rows show, without a promise, false alarms under skewed differences.
    """
    alpha = 0.05
    rows: list[ValidationRow] = []

    def row(
        promise: str, run: Simulation, observed: float, bounds: tuple[float, float] | None
    ) -> None:
        low, high = bounds or (None, None)
        rows.append(
            ValidationRow(
                promise=promise,
                run=run,
                observed=observed,
                low=low,
                high=high,
                kept=_is_kept(observed, run, bounds),
            )
        )

    kinds: tuple[Kind, ...] = ("normal", "skewed", "discrete")
    for kind in kinds:
        for n, arms in ((3, 1), (5, 5), (8, 1), (8, 5)):
            run = simulate(kind, n, arms, simulations=simulations, seed=seed)
            row("no effect: helps or hurts", run, run.any_told, (0.0, alpha))
    for kind in kinds:
        for n in (3, 5, 8):
            run = simulate(kind, n, simulations=simulations, seed=seed)
            row("95% interval covers", run, run.coverage, (0.93, 0.97))
    for n, stated in ((3, (0.79, 0.81)), (5, (0.79, 0.81)), (8, (0.76, 0.80))):
        effect = stats.detectable_factor(n)
        run = simulate("normal", n, effect=effect, simulations=simulations, seed=seed)
        row("smallest detectable effect: helps", run, run.helps, stated)
    for n in (3, 8):
        run = simulate("normal", n, effect=1.0, sesoi=1.0, simulations=simulations, seed=seed)
        row("effect of interest: no evidence", run, run.no_evidence, (0.0, alpha))
    for n, arms in ((5, 1), (8, 5)):
        run = simulate("asymmetric", n, arms, simulations=simulations, seed=seed)
        row("skewed differences: helps or hurts", run, run.any_told, None)
    return rows


def _is_kept(observed: float, run: Simulation, bounds: tuple[float, float] | None) -> bool | None:
    if bounds is None:
        return None
    errors = [3 * math.sqrt(p * (1 - p) / run.simulations) for p in bounds]
    return bounds[0] - errors[0] <= observed <= bounds[1] + errors[1]
