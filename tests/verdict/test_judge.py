"""The verdict: words, cells of both sides, refusals, failed cells, and its promises."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from saelab import stats
from saelab.errors import SettingError
from saelab.seeding import numpy_stream
from saelab.verdict.judge import Cells, Comparison, Rules, compare_secondary, judge
from saelab.verdict.l0_adjustment import Matched

SEEDS = range(100, 108)
BASE = {seed: 0.1 + 0.003 * i for i, seed in enumerate(SEEDS)}
NOISE = dict(zip(SEEDS, numpy_stream(0, "test-verdict").normal(0, 0.001, len(SEEDS)), strict=True))


def shifted(by: float, noise: float = 1.0, seeds: range = SEEDS) -> dict[int, float | None]:
    """The baseline moved by `by`, with a spread of about .001 * noise."""
    return {seed: BASE[seed] + by + noise * NOISE[seed] for seed in seeds}


def cells(values: Any, failed: Any = (), **more: Any) -> Cells:
    matched = values if isinstance(values, Matched) else Matched(values=dict(values))
    return Cells(matched=matched, failed=frozenset(failed), **more)


def run(arms: dict, base: Any = None, **settings: Any) -> dict[str, Comparison]:
    rules = Rules(**{"primary": "fvu", "direction": "lower", "sesoi": 0.005} | settings)
    known = {
        name: c if isinstance(c, Cells) else cells(c)
        for name, c in ({"baseline": base or BASE} | arms).items()
    }
    return {c.arm: c for c in judge(rules, known["baseline"], {arm: known[arm] for arm in arms})}


def test_the_words() -> None:
    found = run(
        {
            "good": shifted(-0.01),
            "bad": shifted(+0.01),
            "same": shifted(0.0001),
            "small": shifted(-0.002, noise=0.1),
            "noisy": shifted(0.0, noise=20.0),
        }
    )
    assert {arm: c.word for arm, c in found.items()} == {
        "good": "helps", "bad": "hurts", "same": "equivalent", "small": "equivalent",
        "noisy": "cannot tell yet",
    }  # fmt: skip
    assert "a smaller one for the better is there" in found["small"].reason
    assert "smaller one" not in found["same"].reason
    assert all(c.exploratory and c.metric == "fvu" and c.n == 8 for c in found.values())


def test_a_direction_without_relevance_is_left_open() -> None:
    """The interval excludes 0 and reaches beyond sesoi, but its estimate is smaller than that."""
    c = run({"arm": shifted(-0.0045, noise=1.5)}, family=4)["arm"]
    assert c.high is not None and c.low is not None
    assert c.low < -0.005 < c.mean_diff < c.high < 0 and c.word == "cannot tell yet"  # type: ignore[operator]


def test_numbers_of_a_comparison() -> None:
    c = run({"good": shifted(-0.01)})["good"]
    d = [shifted(-0.01)[s] - BASE[s] for s in SEEDS]  # type: ignore[operator]
    summary = stats.paired_summary(d)
    assert summary.sd is not None
    assert (c.mean_diff, c.low, c.high) == pytest.approx((summary.mean, summary.low, summary.high))
    assert c.p == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue) and c.level == 0.05
    assert c.spread == pytest.approx(summary.sd) and (c.n, c.n_baseline, c.n_shared) == (8, 8, 8)
    arm = list(shifted(-0.01).values())
    assert c.correlation == pytest.approx(np.corrcoef(arm, list(BASE.values()))[0, 1])
    assert c.detectable == pytest.approx(
        stats.detectable_ratio(7, 0.05) * summary.sd / math.sqrt(8)
    )
    assert f"{c.mean_diff:+.4g}" in c.reason and "8 seeds in common" in c.reason
    assert c.means() == {
        "verdict.fvu": "helps", "diff.fvu": c.mean_diff, "diff.fvu.low": c.low,
        "diff.fvu.high": c.high, "level": 0.05,
    }  # fmt: skip


def test_direction_turns_the_word() -> None:
    assert run({"arm": shifted(0.01)}, direction="higher")["arm"].word == "helps"
    assert run({"arm": shifted(-0.01)}, direction="higher")["arm"].word == "hurts"


@pytest.mark.parametrize("seeds", [2, 3, 8, 12])
def test_twin_of_the_baseline(seeds: int) -> None:
    base = {seed: 0.1 + 0.01 * seed for seed in range(seeds)}
    twin = run({"twin": dict(base)}, base)["twin"]
    assert (twin.mean_diff, twin.low, twin.high, twin.p) == (0.0, 0.0, 0.0, 1.0)
    assert twin.word == "equivalent"
    undeclared = run({"twin": dict(base)}, base, sesoi=0.0)["twin"]
    assert undeclared.word == "cannot tell yet" and undeclared.needed_seeds is None
    assert "declared" in undeclared.reason


def test_equal_differences_are_no_proof_at_three_seeds() -> None:
    three = {seed: 0.5 for seed in range(3)}
    c = run({"arm": dict.fromkeys(three, 0.25)}, three)["arm"]
    assert (c.p, c.word, c.needed_seeds) == (0.25, "cannot tell yet", 6)
    eight = {seed: 0.5 for seed in range(8)}
    assert run({"arm": dict.fromkeys(eight, 0.25)}, eight)["arm"].word == "helps"


def test_more_comparisons_never_make_a_smaller_interval() -> None:
    widths = []
    for family in (1, 2, 6, 12, 50):
        c = run({"arm": shifted(-0.01)}, family=family)["arm"]
        assert c.level == pytest.approx(0.05 / family) and c.low is not None and c.high is not None
        widths.append(c.high - c.low)
    assert widths == sorted(widths)
    assert run({"arm": shifted(-0.01), "gone": dict.fromkeys(SEEDS)})["arm"].level == 0.025


def test_each_look_has_its_own_level_and_all_of_them_stay_within_alpha() -> None:
    levels = [run({"arm": shifted(0.0)}, looks=look)["arm"].level for look in range(1, 30)]
    assert levels[0] == 0.025 and sum(levels) <= 0.05


def test_all_seeds_of_both_sides_count_and_invalid_cells_do_not() -> None:
    arm = shifted(-0.01) | {SEEDS[2]: None}
    base = dict(BASE) | {SEEDS[5]: None}
    c = run({"arm": dict(reversed(arm.items()))}, base)["arm"]
    assert (c.n, c.n_baseline, c.n_shared) == (7, 7, 6)
    ours = np.mean([v for v in arm.values() if v is not None])
    theirs = np.mean([v for v in base.values() if v is not None])
    assert c.mean_diff == pytest.approx(ours - theirs)
    assert "2 cells excluded" in c.reason


def test_losing_a_good_pair_does_not_help() -> None:
    d = np.array([1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, -0.05]) * -0.006
    base = dict.fromkeys(range(8), 0.0)
    whole = run({"arm": dict(enumerate(d.tolist()))}, base, family=6)["arm"]
    lost = run({"arm": dict(enumerate(d.tolist())) | {0: None}}, base, family=6)["arm"]
    assert lost.p is not None and whole.p is not None and lost.p >= whole.p
    assert (whole.word, lost.word) == ("cannot tell yet", "cannot tell yet") or (
        whole.word == "helps"
    )


@pytest.mark.parametrize("there", [0, 1])
def test_fewer_than_two_cells_are_refused(there: int) -> None:
    arm = {s: (0.1 if i < there else None) for i, s in enumerate(SEEDS)}
    c = run({"arm": arm})["arm"]
    assert c.word == "refused" and c.n == there and c.mean_diff is None and c.p is None
    assert f"{8 - there} excluded" in c.reason


def test_cells_that_cannot_be_matched_are_refused_on_either_side() -> None:
    off = cells(Matched(values=shifted(-0.01), refusal="the L0 is off"))
    assert run({"arm": off})["arm"].word == "refused"
    c = run({"arm": shifted(-0.01)}, off)["arm"]
    assert (c.word, c.reason) == ("refused", "the L0 is off")


def test_what_is_not_known_of_the_frontier_widens_the_interval() -> None:
    sure = run({"arm": shifted(-0.01)})["arm"]
    unsure = Matched(
        values=shifted(-0.01), distance=0.03, slope_variance=0.09**2, origin="baseline"
    )
    c = run({"arm": cells(unsure)})["arm"]
    assert c.mean_diff == sure.mean_diff and c.low < sure.low and c.high > sure.high  # type: ignore[operator]
    far = dataclasses.replace(unsure, distance=0.5)
    assert run({"arm": cells(far)})["arm"].word == "cannot tell yet"
    assert run({"arm": cells(far)})["arm"].needed_seeds is None  # more seeds do not tell the slope


def test_different_definitions_are_refused() -> None:
    base = cells(BASE, definition="core/1")
    arms = {
        name: cells(shifted(-0.01), definition=id)
        for name, id in (("same", "core/1"), ("other", "core/2"), ("unknown", None))
    }
    found = run(arms, base)
    assert found["same"].word == "helps"
    assert found["other"].word == found["unknown"].word == "refused"
    assert "core/2" in found["other"].reason and "core/1" in found["other"].reason


# ---- failures --------------------------------------------------------------------------------


def test_a_failed_cell_leaves_the_metric_and_counts_as_a_failure() -> None:
    arm = shifted(-0.01) | {SEEDS[3]: 1.2}
    c = run({"arm": cells(arm, {SEEDS[3]})})["arm"]
    rest = [shifted(-0.01)[s] for s in SEEDS if s != SEEDS[3]]
    assert c.mean_diff == pytest.approx(np.mean(rest) - np.mean(list(BASE.values())))  # type: ignore[arg-type]
    assert (c.word, c.n, c.needed_seeds, c.level) == ("cannot tell yet", 7, None, 0.025)
    assert (
        "1 of 8 cells of the arm failed and 0 of 8" in c.reason
        and "more cells of the arm" in c.reason
    )
    assert c.p_failures is not None and c.p_failures > 0.3


def test_failures_of_both_sides_are_treated_alike() -> None:
    half = set(list(SEEDS)[:6])
    worse = run({"arm": cells(dict(BASE), half)})["arm"]
    sturdy = run({"arm": BASE}, cells(dict(BASE), half))["arm"]
    assert (worse.word, sturdy.word) == ("hurts", "helps")
    assert worse.p_failures == sturdy.p_failures
    one = run({"arm": shifted(0.01)}, cells(dict(BASE), {SEEDS[0]}))["arm"]
    assert one.word == "cannot tell yet"  # its survivors can't make the sturdier arm lose
    both = run({"arm": cells(shifted(-0.01), {SEEDS[1]})}, cells(dict(BASE), {SEEDS[0]}))["arm"]
    assert both.word == "helps" and (both.n, both.n_baseline, both.n_shared) == (7, 7, 6)


def test_an_arm_that_always_dies_hurts_without_a_number() -> None:
    c = run({"arm": cells(dict.fromkeys(SEEDS), set(SEEDS))})["arm"]
    assert (c.word, c.p, c.mean_diff, c.low, c.detectable) == ("hurts", None, None, None, None)
    assert "8 of 8 cells of the arm failed" in c.reason
    three = run({"arm": cells({}, SEEDS[:3])}, {s: BASE[s] for s in SEEDS[:3]})["arm"]
    assert three.word == "refused"  # three against none is no proof at this level


@pytest.mark.parametrize("k", range(9))
def test_the_test_of_failures_is_exact(k: int) -> None:
    arm = cells(dict(BASE), set(list(SEEDS)[:k]))
    c = run({"arm": arm}, cells(dict(BASE), {SEEDS[0]}))["arm"]
    expected = scipy_stats.boschloo_exact([[k, 1], [8 - k, 7]], n=32).pvalue
    assert c.p_failures == pytest.approx(min(1, expected))


# ---- seeds, invariances, bad input -------------------------------------------------------------


def test_needed_seeds_keep_what_they_promise() -> None:
    sd = stats.paired_summary([20 * NOISE[s] for s in SEEDS]).sd
    assert sd is not None
    c = run({"arm": shifted(0.0, noise=20.0)})["arm"]
    assert c.needed_seeds is not None and c.needed_seeds > c.n
    assert stats.t_power(c.needed_seeds, 0.005 / sd, 0.05) >= 0.8
    assert stats.tost_power(c.needed_seeds, 0.005 / sd, 0.025) >= 0.8
    assert str(c.needed_seeds) in c.reason and c.means()["needed_seeds"] == c.needed_seeds
    more = run({"arm": shifted(0.0, noise=20.0), "b": shifted(0.0), "c": shifted(0.0)})["arm"]
    assert more.needed_seeds is not None and more.needed_seeds > c.needed_seeds


@given(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=2, max_size=8),
    st.sampled_from([0.5, 4.0, 1024.0]),
)
def test_scale_order_and_exchange(d: list[float], c: float) -> None:
    base = {seed: 0.0 for seed in range(len(d))}
    arm = dict(enumerate(d))
    one = run({"arm": arm}, base, sesoi=0.25)["arm"]
    scaled = run({"arm": {s: c * v for s, v in arm.items()}}, base, sesoi=0.25 * c)["arm"]
    assert (scaled.word, scaled.p) == (one.word, one.p)
    turned = run({"arm": dict(reversed(arm.items()))}, base, sesoi=0.25)["arm"]
    assert (turned.word, turned.mean_diff) == (one.word, one.mean_diff)
    swapped = run({"arm": base}, cells(arm), sesoi=0.25)["arm"]
    exchange = {"helps": "hurts", "hurts": "helps"}
    assert swapped.word == exchange.get(one.word, one.word)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"direction": "up"}, "direction = 'up'"),
        ({"sesoi": -1.0}, "sesoi = -1.0"),
        ({"sesoi": math.nan}, "sesoi = nan"),
        ({"alpha": 0.7}, "alpha = 0.7"),
        ({"looks": 0}, "looks = 0"),
        ({"base": {1: math.nan}}, "baseline, seed 1 = nan"),
    ],
)
def test_bad_settings_name_setting_and_value(changes: dict, names: str) -> None:
    with pytest.raises(SettingError, match=names):
        run({"arm": shifted(0.0)}, **changes)


def test_the_baseline_is_no_arm() -> None:
    with pytest.raises(SettingError, match="baseline"):
        run({"baseline": shifted(0.0)})


def test_no_arms_no_comparisons() -> None:
    assert run({}) == {}


def test_secondary_metrics_have_an_interval_and_no_word() -> None:
    arms = {"arm": shifted(0.01), "one": {SEEDS[0]: 0.3}, "gone": {SEEDS[0]: None}}
    known = {name: cells(values) for name, values in arms.items()}
    arm, one, gone = compare_secondary("l2_ratio", cells(BASE), known)
    assert (arm.arm, arm.metric, arm.n) == ("arm", "l2_ratio", 8)
    assert arm.low < arm.mean_diff < arm.high  # type: ignore[operator]
    assert (one.n, one.low, one.reason) == (1, None, "one cell has no interval")
    assert (gone.n, gone.mean_diff) == (0, None) and gone.reason
    assert "word" not in {field.name for field in dataclasses.fields(arm)}
