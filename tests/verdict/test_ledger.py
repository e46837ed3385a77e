"""The ledger of comparisons: what is one comparison, what another look, and what each costs."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from saelab.errors import DamageError
from saelab.study.plan import PlanConfig
from saelab.study.registry import attempt
from saelab.verdict.error_budget.ledger import (
    Allotted,
    Hypothesis,
    allot,
    budget,
    lost_comparisons,
    read_ledger,
    record_results,
)
from saelab.verdict.judge import Comparison, Word

PLAN = PlanConfig(study="test", comparisons=20)


def asked(name: str, cells: str = "12", settings: str = "") -> Hypothesis:
    """A comparison whose settings are its name's, unless others are given."""
    made = tuple(f"{settings or name}{seed}" for seed in cells)
    sides = (settings or name, "base")
    return Hypothesis(arm=name, against="baseline", settings=sides, cells=(made, ("b1", "b2")))


def judged(name: str, word: Word, p: float = 1e-6) -> Comparison:
    return Comparison(
        arm=name, metric="fvu", level=0.01, p=p, sesoi=0.005, word=word, exploratory=True
    )


def give(root: Path, *names: Hypothesis, run: str = "run_1", word: Word = "equivalent") -> dict:
    """Levels of a run's comparisons, all of which then get the same word."""
    levels = allot(root, PLAN, names, run=run)
    record_results(root, run, levels, [judged(each.arm, word) for each in names])
    return levels


FIRST = 0.05 * 0.8 / 20


def test_arms_of_one_run_get_equal_levels_and_numbers_of_their_own(tmp_path: Path) -> None:
    levels = give(tmp_path, asked("a"), asked("b"))
    assert [levels[name].number for name in "ab"] == [1, 2]
    assert all(level.level == pytest.approx(FIRST) and level.look == 1 for level in levels.values())


def test_equal_cells_are_one_comparison_under_every_name_and_in_every_run(tmp_path: Path) -> None:
    first = give(tmp_path, asked("a"))["a"]
    for run, name in (("run_1", "a"), ("run_2", "a"), ("run_3", "renamed")):
        again = give(tmp_path, asked(name, settings="a"), run=run)[name]
        assert again == first
    shuffled = give(tmp_path, asked("a", cells="21"), run="run_4")["a"]
    assert shuffled == first
    both = give(tmp_path, asked("b"), asked("twin of b", settings="b"), run="run_5")
    assert both["b"] == both["twin of b"] == Allotted(number=2, level=first.level, look=1)


def test_other_cells_are_another_look_that_pays(tmp_path: Path) -> None:
    give(tmp_path, asked("a"))
    more = give(tmp_path, asked("new name", cells="123", settings="a"), run="run_2")["new name"]
    assert (more.number, more.look) == (2, 2) and more.level == pytest.approx(FIRST / 2)
    third = give(tmp_path, asked("a", cells="45"), run="run_3")["a"]
    assert (third.number, third.look) == (3, 3) and third.level == pytest.approx(FIRST / 4)
    assert give(tmp_path, asked("a"))["a"].number == 1


def test_changed_metric_and_changed_target_are_other_hypotheses(tmp_path: Path) -> None:
    one = asked("a")
    plans = [PLAN, PLAN.patched({"primary": "mse"}), PLAN.patched({"target_l0": 16})]
    assert len({one.key(plan) for plan in plans}) == 3
    assert one.key(PLAN) == one.key(PLAN.patched({"seeds": 3, "sesoi": 0.1}))


def test_only_the_second_discovery_earns_and_each_hypothesis_once(tmp_path: Path) -> None:
    give(tmp_path, asked("a"), word="helps")
    assert give(tmp_path, asked("b"), word="hurts")["b"].level == pytest.approx(FIRST)
    assert give(tmp_path, asked("c"), word="hurts")["c"].level == pytest.approx(FIRST)
    give(tmp_path, asked("a", cells="123"), word="helps")  # the same hypothesis again
    assert give(tmp_path, asked("d"))["d"].level == pytest.approx(FIRST)
    give(tmp_path, asked("e"), word="helps")
    assert give(tmp_path, asked("f"))["f"].level == pytest.approx(2 * FIRST)
    left = budget(tmp_path, PLAN)
    assert left is not None and left.discoveries == 2 and left.comparisons == 7


def test_a_run_whose_results_are_not_in_yet_earns_nothing(tmp_path: Path) -> None:
    """Runs at the same time share a baseline, and neither knows the other's words."""
    give(tmp_path, asked("a"), word="helps")
    first = allot(tmp_path, PLAN, [asked("b")], run="run_2")
    second = allot(tmp_path, PLAN, [asked("c")], run="run_3")
    record_results(tmp_path, "run_2", first, [judged("b", "helps")])
    assert first["b"].level == second["c"].level == pytest.approx(FIRST)
    assert allot(tmp_path, PLAN, [asked("d")], run="run_4")["d"].level == pytest.approx(2 * FIRST)


def test_a_run_never_gets_more_than_its_family_allows(tmp_path: Path) -> None:
    plan = PLAN.patched({"comparisons": 1})
    many = allot(tmp_path, plan, [asked(name) for name in "abcd"], run="run_1")
    assert many["a"].level == pytest.approx(0.05 / 4)
    assert sum(level.level for level in many.values()) <= 0.05
    wide = allot(tmp_path / "wide", plan.patched({"family": 10}), [asked("a")], run="run_1")
    assert wide["a"].level == pytest.approx(0.005)


def test_the_confirming_run_is_family_wise_and_its_repeats_pay(tmp_path: Path) -> None:
    give(tmp_path, asked("a"), word="helps")

    def confirm(*names: Hypothesis) -> list[float]:
        levels = allot(tmp_path, PLAN, names, run="run_10", confirming=True)
        record_results(tmp_path, "run_10", levels, [judged(each.arm, "helps") for each in names])
        return [level.level for level in levels.values()]

    first = confirm(asked("a"), asked("b"))
    assert first == pytest.approx([0.02, 0.02])
    assert confirm(asked("a"), asked("b")) == first  # equal cells
    assert confirm(asked("a", cells="34"), asked("b")) == pytest.approx([0.0025, 0.02])
    assert confirm(asked("other arm")) == pytest.approx([0.0025])
    left = budget(tmp_path, PLAN)
    assert left is not None and left.comparisons == 1 and left.discoveries == 1


def test_a_ledger_that_was_deleted_is_reported(tmp_path: Path) -> None:
    with attempt(tmp_path, "run_1"):
        give(tmp_path, asked("a"))
    assert lost_comparisons(tmp_path) == ()
    (tmp_path / ".saelab" / "comparisons.jsonl").unlink()
    with attempt(tmp_path, "run_2"):
        give(tmp_path, asked("b"), run="run_2")
    (text,) = lost_comparisons(tmp_path)
    assert "comparisons.jsonl was missing although run_1 had been run" in text
    ledger = read_ledger(tmp_path)
    assert ledger is not None and text in ledger.lines()


def test_planned_comparisons_and_alpha_stay_those_of_the_first_run(tmp_path: Path) -> None:
    allot(tmp_path, PLAN.patched({"comparisons": None}), [asked("a")], run="run_1", planned=40)
    later = allot(tmp_path, PLAN.patched({"alpha": 0.2}), [asked("b")], run="run_2", planned=1)
    assert later["b"].level == pytest.approx(0.05 * 0.8 / 40)


def add_one(root: Path, name: str) -> None:
    give(root, asked(name))


def test_launches_at_the_same_time_get_numbers_of_their_own(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=add_one, args=(tmp_path, f"arm {i}")) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ledger = read_ledger(tmp_path)
    assert ledger is not None and sorted(ledger.given) == list(range(1, 9))
    assert {x["word"] for x in ledger.given.values()} == {"equivalent"}


def test_a_torn_last_line_is_none_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".saelab" / "comparisons.jsonl"
    assert read_ledger(tmp_path) is None and budget(tmp_path, PLAN) is None
    give(tmp_path, asked("a"))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"number": 2, "hyp')
    assert give(tmp_path, asked("b"))["b"].number == 2
    for broken in ({"result": 9, "word": "helps", "p": 0.1}, {"number": 7}, {"number": 1}, []):
        file.write_bytes(whole + json.dumps(broken).encode() + b"\n")
        with pytest.raises(DamageError, match=r"comparisons.jsonl:4"):
            allot(tmp_path, PLAN, [asked("c")], run="run_1")
