"""The validation table: its promises in small, its summary, and studies that are judged together,
which have the words that they have one by one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest

from saelab.progress import Progress
from saelab.progress.bar import redirect_bars
from saelab.stats import Array
from saelab.verdict.arms import ArmResult
from saelab.verdict.effect import Effect, estimate
from saelab.verdict.final_info import judge_run
from saelab.verdict.judge import Cells, Comparison, Rules, judge
from saelab.verdict.l0_adjustment import Matched
from saelab.verdict.simulation import comparisons, failing, frontiers, looks, promises
from saelab.verdict.simulation.cells import (
    CORRELATIONS,
    KINDS,
    SESOI,
    TARGET,
    Design,
    Kind,
    draw_two,
)
from saelab.verdict.simulation.frontiers import LEVELS, Frontier, Measured, judge_measured
from saelab.verdict.simulation.promises import all_promises
from saelab.verdict.simulation.rows import Row, summarize, summary_lines

STUDIES = 300


# ---- the table ---------------------------------------------------------------------------------


def test_promises_hold_under_simulation() -> None:
    rows = list(all_promises(studies=STUDIES, seed=0))
    broken = [row.line() for row in rows if not row.is_kept]
    assert not broken, "\n".join(broken)
    by_promise = {p.worst.promise: p.rows for p in summarize(rows)}
    assert len(by_promise) == 34 and sum(by_promise.values()) == len(rows)
    for kind in KINDS:
        for promise in by_promise:
            cells = [
                row.cells
                for row in rows
                if (row.promise, row.cells.split(",")[0]) == (promise, kind)
            ]
            assert cells, (promise, kind)
            if promise not in WITHIN_ONE_ARM:
                assert all(any(f"r = {r:g}" in text for text in cells) for r in CORRELATIONS)


#: Promises about one arm, or one effect over documents, in which no two cells share a seed.
WITHIN_ONE_ARM = (
    "agreement of an arm's seeds: interval covers",
    "effect over texts: 95% interval covers",
)


def of_looks() -> list[functools.partial[Iterator[Row]]]:
    return [functools.partial(looks.look_rows, kind=kind) for kind in KINDS]


def test_rows_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "row_groups", of_looks)
    alone, together = (list(all_promises(100, processes=n)) for n in (1, 2))
    assert alone == together and len(alone) == 3 * 4 * 4


@pytest.mark.parametrize("processes", [1, 2])
def test_the_simulation_shows_its_progress(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "row_groups", of_looks)
    bars: list[Progress] = []

    class Kept(Progress):
        def __init__(self, title: str, total: float, unit: str = "") -> None:
            super().__init__(title, total, unit)
            bars.append(self)

    with redirect_bars(Kept):
        list(all_promises(100, processes=processes))
    (bar,) = bars
    assert (bar.done, bar.total) == (3, 3)


def row(observed: float, **more: float) -> Row:
    fields = {"low": 0.0, "high": 0.05, "studies": 300} | more
    return Row(promise="some", cells=f"{observed}", observed=observed, **fields)  # type: ignore[arg-type]


def test_a_row_beyond_its_bounds_is_simulated_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {0: (0.04, 0.2, 0.3), 1: (0.01, 0.03, 0.29)}

    def rows(studies: int, seed: int) -> Iterator[Row]:
        yield from map(row, shares[seed])

    monkeypatch.setattr(promises, "row_groups", lambda: [rows])
    first, by_chance, broken = all_promises(300, 0, 1)
    assert (first.observed, first.answer) == (0.04, "kept")
    assert (by_chance.observed, by_chance.answer) == (0.03, "kept, repeated")
    assert (broken.observed, broken.answer) == (0.29, "BROKEN, repeated")
    assert summary_lines([first, by_chance, broken])[-1].startswith(
        "3 rows of 1 promise: 1 broken, 2 simulated again"
    )


def test_the_summary_shows_the_worst_row_of_each_promise() -> None:
    (covered,) = summarize([row(0.97, low=0.95, high=1.0), row(1.0, low=0.95, high=1.0)])
    assert (covered.rows, covered.worst.observed, covered.broken) == (2, 0.97, 0)
    (two_sided,) = summarize([row(0.8, low=0.78, high=0.82), row(0.9, low=0.78, high=0.82)])
    assert (two_sided.worst.observed, two_sided.broken) == (0.9, 1)
    assert "1 BROKEN" in two_sided.line()
    (exact,) = summarize([row(1.0, low=1.0, high=1.0), row(0.999, low=1.0, high=1.0)])
    assert (exact.worst.observed, exact.broken) == (0.999, 1)
    (few,) = summarize([row(0.06, studies=100), row(0.056, studies=10**6)])
    assert few.worst.observed == 0.056 and few.broken == 1  # in standard errors of the simulation


def test_a_difference_of_shares_has_an_error_of_its_own() -> None:
    one = row(0.03, high=0.01)
    assert not one.is_kept
    assert dataclasses.replace(one, variance=0.05).is_kept


def test_a_broken_promise_is_seen() -> None:
    effect = comparisons.draw_effects(Design(8, 8), "normal", 0.0, 1.0, 500, 0)
    one = row(float((effect.p < 0.05).mean()), studies=500)
    assert not one.is_kept and "BROKEN" in one.line()


def test_a_test_that_changes_with_lost_cells_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first edition took a more powerful test when a pair was lost."""

    def changing(arm: Array, baseline: Array, shared: int, extra: float = 0.0) -> Effect:
        effect = estimate(arm, baseline, shared, extra)
        lost = arm.shape[-1] < baseline.shape[-1]
        return dataclasses.replace(effect, df=np.full_like(effect.df, 1e6)) if lost else effect

    monkeypatch.setattr(comparisons, "estimate", changing)
    broken = {r.promise for r in comparisons.lost_rows(2000, 0) if not r.is_kept}
    assert "the arm's best cell is lost: gain in helps" in broken


def test_a_larger_family_that_decides_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "level_of", lambda design: 0.001 * design.arms)
    assert not any(r.is_kept for r in comparisons.family_rows(50, 0))


# ---- many studies at once are judged as one by one -------------------------------------------


RULES = Rules(primary="fvu", direction="lower", sesoi=0.0)


def cells(values: Array, failed: Array | None = None) -> Cells:
    lost = set() if failed is None else set(np.flatnonzero(failed).tolist())
    by_seed = {seed: None if seed in lost else float(v) for seed, v in enumerate(values)}
    return Cells(matched=Matched(values=by_seed), failed=frozenset(lost))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "n, shares", [(8, (0.3, 0.3)), (12, (0.1, 0.2)), (8, (0.0, 0.75)), (3, (0.4, 0.4))]
)
def test_failing_cells(kind: Kind, n: int, shares: tuple[float, float]) -> None:
    arm, base = failing.draw_failing(n, shares, kind, 0.6, STUDIES, 0)
    for sesoi in (0.0, 0.0004):
        rules = dataclasses.replace(RULES, sesoi=sesoi)
        expected = [
            judge(rules, cells(*b), {"arm": cells(*a)})[0].word
            for a, b in zip(
                zip(arm.values, arm.failed, strict=True),
                zip(base.values, base.failed, strict=True),
                strict=True,
            )
        ]
        assert failing.judge_together(arm, base, sesoi, 0.05).tolist() == expected
        assert len(set(expected)) > 1


def one_by_one(arm: Measured, base: Measured) -> list[Comparison]:
    """Judges each study from its cells."""
    judged = []
    for i in range(len(arm.fvu)):
        arms = {"baseline": arm_result("baseline", base, i), "arm": arm_result("arm", arm, i)}
        judged += judge_run(arms, frontiers.PLAN, exploratory=True)[0]
    return judged


def arm_result(name: str, side: Measured, study: int) -> ArmResult:
    arm = ArmResult(name)
    flat = Frontier(0.0, slope=0.0, sd=1.0)
    for seed, (fvu, l0) in enumerate(zip(side.fvu[study], side.l0[study], strict=True)):
        arm.add(*flat.cell(seed, TARGET, float(l0), float(fvu) - flat.at(TARGET)))
    if side.at_levels is not None:
        for seed, row in enumerate(side.at_levels[study]):
            for (level, l0), fvu in zip(LEVELS.items(), row, strict=True):
                arm.add_level(*flat.cell(seed, level, l0, float(fvu) - flat.at(TARGET)))
    return arm


@pytest.mark.parametrize("kind", KINDS)
def test_cells_off_the_target(kind: Kind) -> None:
    levels, none = Frontier(0.0, levels=True), Frontier(0.04, spread=0.015)
    cases = [(n, base, arm) for n, base, arm, _ in frontiers.l0_cases()]
    better = dataclasses.replace(frontiers.WIDE, effect=-0.015)
    cases += [
        (8, levels, frontiers.WIDE),
        (8, levels, better),
        (8, levels, none),
        (3, none, levels),
    ]
    seen = set()
    for n, base, arm in cases:
        sides = frontiers.draw_measured(arm, base, n, (kind, 0.6), STUDIES // 3, 0)
        words = judge_measured(*sides).tolist()
        assert words == [c.word for c in one_by_one(*sides)], (n, base, arm)
        seen |= set(words)
    assert {"refused", "hurts", "helps", "cannot tell yet"} <= seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sd", [0.003, 0.008])
def test_repeated_looks(kind: Kind, sd: float) -> None:
    stream = np.random.default_rng(0)
    arm, base = (sd * side for side in draw_two(looks.MOST, kind, 0.3, STUDIES, stream))
    expected = [look_one_by_one(a, b) for a, b in zip(arm, base, strict=True)]
    assert looks.look_again(arm, base).tolist() == expected
    assert 0 < sum(expected) < STUDIES


def look_one_by_one(arm: Array, base: Array) -> bool:
    n = looks.FIRST
    for look in range(1, looks.LOOKS + 1):
        rules = dataclasses.replace(RULES, sesoi=SESOI, looks=look)
        (c,) = judge(rules, cells(base[:n]), {"arm": cells(arm[:n])})
        if c.p is not None and c.p < c.level:
            return True
        if c.word != "cannot tell yet" or not c.needed_seeds or n == looks.MOST:
            return False
        n = min(looks.MOST, c.needed_seeds)
    return False


@pytest.mark.parametrize("n", [3, 8])
def test_seeds_that_are_asked_for(n: int) -> None:
    stream = np.random.default_rng(1)
    arm, base = (0.006 * side for side in draw_two(n, "normal", 0.3, STUDIES, stream))
    arm = arm * stream.choice([0.2, 1.0, 20.0], size=(STUDIES, 1))  # some need more than MOST_PAIRS
    level = dataclasses.replace(RULES, looks=3).level(1)
    asked = looks.seeds_needed(estimate(arm, base, n), SESOI, level)
    rules = dataclasses.replace(RULES, sesoi=SESOI, looks=3)
    judged = [judge(rules, cells(b), {"arm": cells(a)})[0] for a, b in zip(arm, base, strict=True)]
    open_ones = [i for i, c in enumerate(judged) if c.word == "cannot tell yet"]
    expected = [min(judged[i].needed_seeds or 0, looks.MOST + 1) for i in open_ones]
    assert asked[open_ones].tolist() == expected
    assert len(set(expected)) > 5 and len(expected) > STUDIES / 2
