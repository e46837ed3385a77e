"""Words of the A/A twin and of the planted effect over simulated studies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from saelab.runs.schema import CellId
from saelab.study.plan import PlanConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.twin import (
    TRUE_OF_A_TWIN,
    counted_line,
    judge_planted,
    judge_twin,
    planted_line,
    twin_line,
)

PLAN = PlanConfig(study="test", target_l0=32, sesoi=0.005)
SD, EXPECTED = 0.00054, 0.0074


def rows_of(name: str, seed: int, **values: float) -> list[dict[str, Any]]:
    return [
        {"arm": name, "seed": seed, "metric": metric.replace("__", "."), "value": value}
        | {"slice": "", "definition": "core/1"}
        for metric, value in values.items()
    ]


def study(stream: np.random.Generator, n: int = 8) -> tuple[ArmResult, list, list]:
    """A baseline, rows of its twin and of the effect planted there, and the twin's cells."""
    baseline, rows, gates = ArmResult("baseline"), [], []
    for seed in range(n):
        cell = CellGate(id=CellId("baseline", seed, 32), expected=(), facts={})
        fvu = 0.185 + SD * stream.normal()
        baseline.add(cell, rows_of("baseline", seed, fvu=fvu, l0=32.0))
    for seed in (100, 101, 102):
        fvu = 0.185 + SD * stream.normal()
        gates.append(CellGate(id=CellId("control:twin", seed, 32), expected=(), facts={}))
        rows += rows_of("control:twin", seed, fvu=fvu, l0=32.0)
        worse = fvu + EXPECTED + 0.1 * SD * stream.normal()
        rows += rows_of("control:planted effect", seed, fvu=worse, l0=32.0)
        change = {"planted__expected_fvu_change": EXPECTED}
        rows += rows_of("control:planted effect", seed, **change)
    return baseline, rows, gates


@pytest.fixture(scope="module")
def judged() -> list:
    stream, results = np.random.default_rng(0), []
    for _ in range(400):
        baseline, rows, gates = study(stream)
        twin = judge_twin(rows, gates, baseline, PLAN)
        results.append((twin, judge_planted(rows, baseline, PLAN, gates)))
    return results


def test_a_twin_is_rarely_said_to_differ(judged: list) -> None:
    """With next to no smallest effect of interest, where any difference would be a word."""
    stream, strict = np.random.default_rng(1), PLAN.patched({"sesoi": 1e-9})
    words = []
    for _ in range(400):
        baseline, rows, gates = study(stream)
        twin = judge_twin(rows, gates, baseline, strict)
        assert twin is not None
        words.append(twin.word)
    assert sum(word not in TRUE_OF_A_TWIN for word in words) / 400 < 0.05 + 3 * 0.011
    assert all(twin.word == "equivalent" for twin, _ in judged)


def test_the_planted_effect_hurts_and_its_interval_holds_it(judged: list) -> None:
    assert all(planted.comparison.word == "hurts" for _, planted in judged)
    held = np.mean([planted.holds for _, planted in judged])
    assert held > 0.95 - 3 * 0.011


def test_both_share_no_seed_with_the_baseline(judged: list) -> None:
    twin, planted = judged[0]
    assert twin.n_shared == planted.comparison.n_shared == 0
    assert (twin.n, twin.n_baseline, twin.level) == (3, 8, PLAN.alpha)


def test_words_are_counted_over_runs(judged: list) -> None:
    twins, planted = zip(*judged[:3], strict=True)
    held = sum(one.holds for one in planted)
    line = counted_line([*twins, None], planted)
    start = (
        "A/A twin: 3 runs with 3 different twins: 3 equivalent; planted effect: 3 of 3 'hurts', "
    )
    assert line.startswith(start)
    assert line.endswith(f"{held} of 3 intervals hold the expected change")
    again = counted_line([*twins, *twins], [*planted, *planted])
    assert again == line.replace("3 runs", "6 runs")
    assert counted_line([None], [None]) == ""


def test_a_false_word_and_a_missed_effect_are_said_loudly() -> None:
    baseline, rows, gates = study(np.random.default_rng(2))
    worse = [row | {"value": row["value"] + 0.02 * (row["metric"] == "fvu")} for row in rows]
    twin = judge_twin(worse, gates, baseline, PLAN)
    assert twin is not None and "hurts, which is FALSE" in twin_line(twin)
    planted = judge_planted(worse, baseline, PLAN, gates)
    assert planted is not None and "which the interval does not hold" in planted_line(planted)
    missed = judge_planted(rows, baseline, PLAN.patched({"sesoi": 0.05}), gates)
    assert missed is not None and "so an effect of this size is missed" in planted_line(missed)


def test_a_twin_off_the_declared_l0_is_refused_or_moved_like_an_arm() -> None:
    baseline, rows, gates = study(np.random.default_rng(3))
    off = [row | {"value": 40.0} if row["metric"] == "l0" else row for row in rows]
    twin = judge_twin(off, gates, baseline, PLAN)
    assert twin is not None and twin.word == "refused" and "from the target" in twin.reason


def test_a_run_without_controls_has_neither() -> None:
    baseline, _, _ = study(np.random.default_rng(4))
    assert judge_twin([], [], baseline, PLAN) is None
    assert judge_planted([], baseline, PLAN) is None
