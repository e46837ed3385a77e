"""Simulated decisions: which arms are kept that have no effect, or one of exactly the smallest size
of interest, in one run and under attack (`adversary`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saelab.runtime.counting import count
from saelab.study.plan import PlanConfig
from saelab.verdict.decision import decide
from saelab.verdict.effect import Effect
from saelab.verdict.judge import Comparison, choose_words
from saelab.verdict.simulation.adversary import attack
from saelab.verdict.simulation.cells import CORRELATIONS, SD, SESOI, Design, Kind
from saelab.verdict.simulation.comparisons import draw_effects, level_of
from saelab.verdict.simulation.rows import Row, share_row

#: An attack has one worthless submission for so many studies of a row, but not fewer than so many;
#: and one planted effect for so many worthless submissions.
STUDIES_EACH, FEWEST, EACH_PLANTED = 40, 20, 10


def decision_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """Simulates which arms of one run are kept."""
    for r in CORRELATIONS:
        for design in (Design(8, 8), Design(8, 8, 6), Design(3, 8, 6)):
            cells = f"{kind}, {design}, r = {r:g}"
            level, sesoi = level_of(design), SESOI / SD
            effect = draw_effects(design, kind, r, 0.0, studies, seed)
            false = decide_together(effect, level, 0.0).any(axis=-1)
            yield share_row("no effect: kept", cells, false, (0.0, 0.05))
            one = Design(design.arm, design.baseline)
            true = decide_together(draw_effects(one, kind, r, sesoi, studies, seed), level, sesoi)[
                :, 0
            ]
            yield share_row("effect of exactly sesoi: kept", cells, true, (0.95, 1.0))


def decide_together(effect: Effect, level: float, sesoi: float) -> np.ndarray:
    """Decides about many arms; true where `decide` says keep. Higher is better."""
    plan = PlanConfig(study="simulated", primary="explained_variance", direction="higher")
    low, high = effect.interval(level)
    words = choose_words(effect.mean, low, high, sesoi)
    numbers = zip(words.ravel(), effect.mean.ravel(), low.ravel(), high.ravel(), strict=True)
    keeps = [
        decide(
            Comparison(
                arm="arm",
                metric=plan.primary,
                mean_diff=float(mean),
                low=float(a),
                high=float(b),
                level=level,
                sesoi=sesoi,
                word=word,
                exploratory=True,
            ),
            plan,
        ).action
        == "keep"
        for word, mean, a, b in numbers
    ]
    return np.array(keeps).reshape(words.shape)


def attack_rows(studies: int, seed: int, kind: Kind) -> Iterator[Row]:
    """A driver that submits arms without an effect, by every trick, and a few that have one."""
    worthless = max(FEWEST, studies // STUDIES_EACH)
    for r in CORRELATIONS:
        with tempfile.TemporaryDirectory() as folder:
            counts = attack(
                Path(folder),
                worthless=worthless,
                planted=worthless // EACH_PLANTED,
                seed=seed,
                kind=kind,
                correlation=r,
            )["decision"]
        cells = f"{kind}, {count(worthless, 'worthless submission')}, r = {r:g}"
        yield Row(
            promise="adversary: worthless submissions that are kept",
            cells=cells,
            studies=counts.worthless,
            observed=counts.of_submissions,
            low=0.0,
            high=0.05,
        )
        yield Row(
            promise="adversary: effects of exactly sesoi that are kept",
            cells=f"{kind}, {count(counts.planted, 'planted effect')}, r = {r:g}",
            studies=counts.planted,
            observed=counts.power,
            low=0.8,
            high=1.0,
        )
