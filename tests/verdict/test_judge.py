"""The verdict: words, pairing, refusals, failed cells, and its promises under simulation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab import stats
from saelab.errors import SettingError
from saelab.seeding import numpy_stream
from saelab.verdict import simulation
from saelab.verdict.judge import Comparison, Rules, compare_secondary, judge

SEEDS = range(100, 108)
BASE = {seed: 0.1 + 0.003 * i for i, seed in enumerate(SEEDS)}
NOISE = dict(zip(SEEDS, numpy_stream(0, "test-verdict").normal(0, 0.001, len(SEEDS)), strict=True))


def shifted(by: float, noise: float = 1.0, seeds: range = SEEDS) -> dict[int, float | None]:
    """The baseline moved by `by`, with a spread of about .001 * noise."""
    return {seed: BASE[seed] + by + noise * NOISE[seed] for seed in seeds}


#: What `judge` is given of the cells besides their values.
CELLS = ("l0", "failed", "definitions")


def run(arms: dict, base: dict | None = None, **settings) -> dict[str, Comparison]:
    measured = {
        "l0": {arm: dict.fromkeys(values, 32.0) for arm, values in arms.items()},
    }
    measured |= {name: settings.pop(name) for name in CELLS if name in settings}
    given = {"primary": "fvu", "direction": "lower", "sesoi": 0.005, "target_l0": 32.0} | settings
    return {c.arm: c for c in judge(Rules(**given), base or BASE, arms, **measured)}


def test_the_four_words() -> None:
    found = run(
        {
            "good": shifted(-0.01),
            "bad": shifted(+0.01),
            "same": shifted(0.0001),
            "noisy": shifted(0.0, noise=20.0),
        }
    )
    words = {arm: c.word for arm, c in found.items()}
    assert words == {
        "good": "helps", "bad": "hurts", "same": "no evidence", "noisy": "cannot tell"
    }  # fmt: skip
    assert all(c.exploratory and c.metric == "fvu" and c.n == 8 for c in found.values())


def test_numbers_of_a_comparison() -> None:
    c = run({"good": shifted(-0.01)})["good"]
    d = [shifted(-0.01)[s] - BASE[s] for s in SEEDS]  # type: ignore[operator]
    summary = stats.paired_summary(d)
    assert summary.sd is not None
    assert (c.mean_diff, c.low, c.high) == pytest.approx((summary.mean, summary.low, summary.high))
    assert c.test == "sign-flip" and c.p == c.p_holm == 2 / 256
    assert c.detectable == pytest.approx(stats.detectable_factor(8) * summary.sd)
    assert c.bca_low is None and c.needed_seeds is None
    assert f"{c.mean_diff:+.4g}" in c.reason and "8 pairs" in c.reason
    assert c.means() == {
        "verdict.fvu": "helps", "diff.fvu": c.mean_diff, "diff.fvu.low": c.low,
        "diff.fvu.high": c.high,
    }  # fmt: skip


def test_direction_turns_the_word() -> None:
    assert run({"arm": shifted(0.01)}, direction="higher")["arm"].word == "helps"
    assert run({"arm": shifted(-0.01)}, direction="higher")["arm"].word == "hurts"


def test_bca_stands_beside_from_ten_pairs() -> None:
    base = {seed: 0.1 for seed in range(10)}
    arm = {seed: 0.1 + 0.01 * math.sin(seed) for seed in base}
    c = run({"arm": arm}, base)["arm"]
    assert c.bca_low is not None and c.bca_high is not None and c.low is not None
    assert c.bca_low < c.bca_high


@pytest.mark.parametrize("seeds", [2, 3, 8, 12])
def test_twin_of_the_baseline(seeds: int) -> None:
    base = {seed: 0.1 + 0.01 * seed for seed in range(seeds)}
    twin = run({"twin": dict(base)}, base)["twin"]
    assert (twin.mean_diff, twin.low, twin.high, twin.p) == (0.0, 0.0, 0.0, 1.0)
    assert twin.word == "no evidence"
    undeclared = run({"twin": dict(base)}, base, sesoi=0.0)["twin"]
    assert undeclared.word == "cannot tell" and undeclared.needed_seeds is None
    assert "declared" in undeclared.reason


def test_equal_differences_are_no_proof_at_three_seeds() -> None:
    base = {seed: 0.5 for seed in range(8)}
    three = run({"arm": {seed: 0.25 for seed in range(3)}}, base)["arm"]
    assert (three.p, three.word, three.needed_seeds) == (0.25, "cannot tell", 6)
    eight = run({"arm": {seed: 0.25 for seed in range(8)}}, base)["arm"]
    assert eight.word == "helps"


def test_holm_counts_refused_arms_and_the_planned_family() -> None:
    arms = {"arm": shifted(-0.01), "gone": dict.fromkeys(SEEDS)}
    assert run(arms)["arm"].p_holm == 2 * 2 / 256
    c = run(arms, family=6)["arm"]
    assert c.p_holm == 6 * 2 / 256 and c.test == "sign-flip" and c.word == "helps"
    assert run(arms, family=7)["arm"].test == "t"


def test_pairs_are_made_by_seed_and_invalid_cells_take_their_pair_out() -> None:
    arm = shifted(-0.01)
    arm[SEEDS[2]] = None
    base = dict(BASE) | {SEEDS[5]: None}
    c = run({"arm": dict(reversed(arm.items()))}, base)["arm"]
    kept = [s for i, s in enumerate(SEEDS) if i not in (2, 5)]
    assert c.n == 6
    assert c.mean_diff == pytest.approx(np.mean([NOISE[s] - 0.01 for s in kept]))
    assert "2 pairs excluded" in c.reason


def test_fewer_seeds_of_a_side_arm_are_not_exclusions() -> None:
    c = run({"arm": shifted(-0.01, seeds=SEEDS[:3])})["arm"]
    assert c.n == 3 and c.test == "t" and "excluded" not in c.reason


@pytest.mark.parametrize("there", [0, 1])
def test_fewer_than_two_pairs_are_refused(there: int) -> None:
    arm = {s: (0.1 if i < there else None) for i, s in enumerate(SEEDS)}
    c = run({"arm": arm})["arm"]
    assert c.word == "refused" and c.n == there and c.mean_diff is None and c.p is None
    assert f"{8 - there} excluded" in c.reason


@pytest.mark.parametrize(("l0", "word"), [(33.6, "helps"), (33.7, "refused"), (30.3, "refused")])
def test_l0_tolerance(l0: float, word: str) -> None:
    cells = {"arm": dict.fromkeys(SEEDS, 32.0) | {SEEDS[1]: l0}}
    c = run({"arm": shifted(-0.01)}, l0=cells)["arm"]
    assert c.word == word
    if word == "refused":
        assert f"{l0:g}" in c.reason and "target 32" in c.reason and str(SEEDS[1]) in c.reason


def test_l0_of_the_baseline_and_missing_l0() -> None:
    arms = {"arm": shifted(-0.01)}
    good = dict.fromkeys(SEEDS, 32.0)
    off = run(arms, l0={"arm": good, "baseline": good | {SEEDS[0]: 40.0}})["arm"]
    assert off.word == "refused" and "baseline's L0" in off.reason
    assert run(arms, l0={})["arm"].word == "refused"
    assert run(arms, l0={}, target_l0=None)["arm"].word == "helps"


def test_l0_of_excluded_pairs_does_not_matter() -> None:
    arm = shifted(-0.01) | {SEEDS[0]: None}
    cells = {"arm": dict.fromkeys(SEEDS, 32.0) | {SEEDS[0]: 900.0}}
    assert run({"arm": arm}, l0=cells)["arm"].word == "helps"


def test_different_definitions_are_refused() -> None:
    ids = {"baseline": "core/1", "same": "core/1", "other": "core/2"}
    found = run({arm: shifted(-0.01) for arm in ("same", "other", "unknown")}, definitions=ids)
    assert found["same"].word == "helps"
    assert found["other"].word == found["unknown"].word == "refused"
    assert "core/2" in found["other"].reason and "core/1" in found["other"].reason


def test_failed_cell_without_a_number_is_a_loss() -> None:
    arm = shifted(-0.01)
    arm[SEEDS[3]] = None
    dropped = run({"arm": arm})["arm"]
    failed = run({"arm": arm}, failed={"arm": {SEEDS[3]}})["arm"]
    assert dropped.word == "helps" and dropped.n == 7
    assert failed.word == "cannot tell" and failed.n == 8 and failed.needed_seeds is None
    assert failed.mean_diff > dropped.mean_diff  # type: ignore[operator]
    worst = max(abs(NOISE[s] - 0.01) for s in SEEDS if s != SEEDS[3])
    kept = [NOISE[s] - 0.01 for s in SEEDS if s != SEEDS[3]]
    assert failed.mean_diff == pytest.approx((sum(kept) + worst) / 8)
    assert "1 of 8 cells failed" in failed.reason


def test_failed_cell_keeps_its_own_number_when_that_is_against_the_arm() -> None:
    arm = shifted(-0.01) | {SEEDS[3]: 1.2}
    c = run({"arm": arm}, failed={"arm": {SEEDS[3]}})["arm"]
    d = [arm[s] - BASE[s] for s in SEEDS]  # type: ignore[operator]
    assert c.mean_diff == pytest.approx(np.mean(d)) and c.word == "cannot tell"


def test_a_loss_is_no_smaller_than_the_effect_of_interest_and_no_evidence_of_equality() -> None:
    twin = dict(BASE) | {SEEDS[0]: None}
    c = run({"twin": twin}, failed={"twin": {SEEDS[0]}})["twin"]
    assert c.mean_diff == pytest.approx(0.005 / 8) and c.word == "cannot tell"
    assert run({"twin": twin})["twin"].word == "no evidence"  # invalid instead: the pair is out


def test_a_favourable_number_of_a_failed_cell_is_no_credit() -> None:
    # a cell that lost its sparsity reconstructs well, at another L0
    arm = shifted(-0.01) | {SEEDS[3]: 0.0}
    cells = {"arm": dict.fromkeys(SEEDS, 32.0) | {SEEDS[3]: 700.0}}
    c = run({"arm": arm}, failed={"arm": {SEEDS[3]}}, l0=cells)["arm"]
    without = run({"arm": arm | {SEEDS[3]: None}}, failed={"arm": {SEEDS[3]}})["arm"]
    assert (c.word, c.mean_diff) == ("cannot tell", without.mean_diff)


def test_arm_with_a_failed_cell_never_helps_even_when_significant() -> None:
    base = {seed: 0.5 for seed in range(16)}
    arm = {seed: 0.25 + 0.01 * (seed % 3) for seed in base}
    c = run({"arm": arm | {15: None}}, base, failed={"arm": {15}})["arm"]
    assert c.p_holm is not None and c.p_holm <= 0.05 and c.mean_diff < 0  # type: ignore[operator]
    assert c.word == "cannot tell" and "can't get the word helps" in c.reason


def test_arm_that_always_dies() -> None:
    dead = dict.fromkeys(SEEDS)
    c = run({"arm": dead}, failed={"arm": set(SEEDS)})["arm"]
    assert (c.word, c.p, c.mean_diff, c.low, c.detectable) == ("hurts", 2 / 256, None, None, None)
    three = run({"arm": {}}, failed={"arm": set(SEEDS[:3])})["arm"]
    assert (three.word, three.n, three.p) == ("cannot tell", 3, 0.25)


def test_failed_cell_against_an_invalid_baseline_cell_is_excluded() -> None:
    base = dict(BASE) | {SEEDS[0]: None}
    c = run({"arm": shifted(-0.01)}, base, failed={"arm": {SEEDS[0]}})["arm"]
    assert c.n == 7 and c.word == "helps"


def test_needed_seeds_keep_what_they_promise() -> None:
    sd = stats.paired_summary([20 * NOISE[s] for s in SEEDS]).sd
    assert sd is not None
    c = run({"arm": shifted(0.0, noise=20.0)})["arm"]
    assert c.needed_seeds is not None and c.needed_seeds > c.n
    assert stats.t_power(c.needed_seeds, 0.005 / sd, 0.05) >= 0.8
    assert stats.tost_power(c.needed_seeds, 0.005 / sd, 0.05) >= 0.8
    assert str(c.needed_seeds) in c.reason
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
    swapped = run({"arm": base}, arm, sesoi=0.25)["arm"]
    exchange = {"helps": "hurts", "hurts": "helps"}
    assert swapped.word == exchange.get(one.word, one.word)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"direction": "up"}, "direction = 'up'"),
        ({"sesoi": -1.0}, "sesoi = -1.0"),
        ({"sesoi": math.nan}, "sesoi = nan"),
        ({"target_l0": 0.0}, "target_l0 = 0.0"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"alpha": 0.7}, "alpha = 0.7"),
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
    arm, one, gone = compare_secondary("l2_ratio", BASE, arms)
    assert (arm.arm, arm.metric, arm.n) == ("arm", "l2_ratio", 8)
    assert arm.low < arm.mean_diff < arm.high  # type: ignore[operator]
    assert (one.n, one.low, one.reason) == (1, None, "one pair has no interval")
    assert (gone.n, gone.mean_diff) == (0, None) and gone.reason
    assert "word" not in {field.name for field in dataclasses.fields(arm)}


def test_promises_hold_under_simulation() -> None:
    rows = simulation.validation_table(simulations=2000, seed=0)
    broken = [row.line() for row in rows if row.kept is False]
    assert not broken, "\n".join(broken)
    promised = {(row.promise.split(":")[0], row.run.kind) for row in rows if row.kept}
    assert {("no effect", kind) for kind in ("normal", "skewed", "discrete")} <= promised
    assert {
        ("95% interval covers", "normal"), ("smallest detectable effect", "normal"),
        ("effect of interest", "normal"),
    } <= promised  # fmt: skip


def test_a_broken_promise_is_seen() -> None:
    run = simulation.simulate("normal", 8, effect=0.5, simulations=500)
    assert simulation._is_kept(run.any_told, run, (0.0, 0.05)) is False
    # sign flips assume that arm and baseline can be exchanged; without that they are too eager
    assert simulation.simulate("asymmetric", 8, 5).any_told > 0.07


@pytest.mark.parametrize("kind", ["normal", "discrete"])
def test_simulation_applies_the_rules_of_judge(kind: judge.Kind) -> None:
    simulated = simulation.simulate(kind, 6, arms=3, effect=0.8, sesoi=0.9, simulations=60, seed=5)
    stream = numpy_stream(5, "simulation", kind, 6, 3)
    d = simulation._simulated_differences(stream, kind, (60, 3, 6)) + 0.8
    base = {seed: 0.0 for seed in range(6)}
    counts: dict[str, int] = dict.fromkeys(("helps", "hurts", "no evidence", "cannot tell"), 0)
    for family in d:
        arms = {f"arm{i}": dict(enumerate(map(float, row))) for i, row in enumerate(family)}
        for c in run(arms, base, direction="higher", sesoi=0.9).values():
            counts[c.word] += 1
    shares = [n / 180 for n in counts.values()]
    assert shares == pytest.approx(
        [simulated.helps, simulated.hurts, simulated.no_evidence, simulated.cannot_tell]
    )
    assert counts["helps"] and counts["cannot tell"]
