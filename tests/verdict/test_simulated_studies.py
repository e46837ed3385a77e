"""The error budget's promises over whole studies, simulated in small, and the simulation itself."""

from __future__ import annotations

import numpy as np
import pytest

from saelab.verdict.error_budget.levels import ErrorBudget
from saelab.verdict.simulation import studies as study_simulation
from saelab.verdict.simulation.studies import ALPHA, ARMS, Design, Ledgers, simulate, study_rows


def test_simulated_levels_are_those_of_the_ledger() -> None:
    stream = np.random.default_rng(0)
    rule = ErrorBudget(alpha=0.05, planned=20)
    ledgers, known, given = Ledgers(rule=rule, studies=3), [[], [], []], 0
    for arms in (4, 1, 3, 4, 6, 4):
        levels = ledgers.give(arms)
        for study in range(3):
            expected = [rule.level(given + 1 + i, known[study]) for i in range(arms)]
            assert levels[study] == pytest.approx(np.minimum(expected, 0.05 / arms))
        first = stream.random((3, arms)) < 0.4
        ledgers.report(first)
        given += arms
        for study in range(3):
            known[study] += [given] * int(first[study].sum())
    assert max(map(len, known)) > 4


def test_every_promise_is_kept() -> None:
    rows = list(study_rows(200, 0, "skewed", 0.6))
    assert len(rows) == 19 and all(row.is_kept for row in rows)


def test_without_the_ledger_a_study_is_wrong_far_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten runs, each of which keeps its own level: what the ledger is for."""
    assert simulate(Design(seeds=8), 600, 1).any_false < 0.05

    def of_one_run(self: Ledgers, arms: int, look: int = 1) -> np.ndarray:
        return np.full((self.studies, arms), ALPHA / ARMS)

    monkeypatch.setattr(study_simulation.Ledgers, "give", of_one_run)
    assert simulate(Design(seeds=8), 600, 1).any_false > 0.2


def test_effects_for_the_worse_earn_nothing() -> None:
    """Arms that are made to be worse buy no higher levels."""
    many = simulate(Design(seeds=8, hurting=0.8), 400, 2)
    assert many.false_helps_rate < 0.03
