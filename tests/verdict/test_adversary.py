"""A driver that submits nothing of value keeps nothing; planted effects are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from saelab.seeding import numpy_stream
from saelab.study.plan import BASELINE, PlanConfig
from saelab.verdict.error_budget.ledger import read_ledger
from saelab.verdict.simulation.adversary import TRICKS, Driver, Study, Submission, attack
from saelab.verdict.simulation.cells import SESOI, TARGET
from saelab.verdict.simulation.frontiers import Frontier

PLAN = PlanConfig(study="attacked", target_l0=TARGET, sesoi=SESOI, comparisons=20)


def test_quick_attack(tmp_path: Path) -> None:
    counts = attack(tmp_path, worthless=90, planted=20)
    judged, naive = counts["decision"], counts["mean is better"]
    assert (judged.worthless, judged.planted) == (90, 20)
    assert judged.of_submissions <= 0.05 and judged.of_keeps <= 0.05 and judged.power >= 0.8
    assert naive.of_submissions > 0.3 and naive.of_keeps > 0.5
    assert counts["one cell is better"].of_submissions > 0.3


def test_every_trick_is_used() -> None:
    driver = Driver(PLAN, numpy_stream(0, "test-adversary"))
    seen = set()
    study = {}
    for _ in range(60):
        submission = driver.choose()
        seen.add(submission.trick)
        study.setdefault(submission.settings, []).append(submission)
        driver.past.append((submission, _undecided(submission)))
    assert seen == set(TRICKS)
    assert any(len({s.seed_set for s in each}) > 1 for each in study.values())
    assert any(len({s.seeds for s in each}) > 1 for each in study.values())


def _undecided(submission: Submission):
    from saelab.verdict.decision import decide
    from saelab.verdict.judge import Comparison

    c = Comparison(
        arm="arm", metric="fvu", level=0.05, sesoi=SESOI, word="cannot tell yet", exploratory=True
    )
    return decide(c, PLAN)


def test_repeats_cost_nothing_and_change_nothing(tmp_path: Path) -> None:
    """A repeat under another name has the same cells and level; other seeds are another look."""
    study = Study(tmp_path, PLAN, seed=1)
    first = Submission("no-op", "settings", Frontier(0.0, levels=True), PLAN.seeds)
    arms = study.arms(first)
    decision = study.submit(first, "run_1", arms)
    again = study.submit(first, "run_2", study.arms(first))
    assert again.comparison == decision.comparison and again.budget_left == decision.budget_left
    other = replace(first, seed_set=3)
    assert study.arms(other)[BASELINE].values.keys().isdisjoint(arms[BASELINE].values)
    looked = study.submit(other, "run_3", study.arms(other))
    assert looked.comparison.level == decision.comparison.level / 2
    more = replace(first, seeds=PLAN.seeds + 4)
    shared = study.arms(more)["arm"].values
    assert {seed: shared[seed] for seed in arms["arm"].values} == arms["arm"].values
    study.submit(more, "run_4", study.arms(more))
    ledger = read_ledger(tmp_path)
    assert ledger is not None and [x["look"] for x in ledger.given.values()] == [1, 2, 3]
