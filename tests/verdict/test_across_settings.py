"""Arms over settings: intervals, heterogeneity and words, against independent computations."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import chi2, ttest_1samp

from saelab.storage.atomic import json_text
from saelab.verdict.across_settings import (
    AcrossSettings,
    heterogeneity,
    intervals,
    judge_across,
    read_across,
)
from saelab.verdict.across_text import across_text
from saelab.verdict.judge import Comparison, Rules, Word
from saelab.verdict.simulation.settings import settings_rows


def comparison(diff: float | None, se: float | None = 0.0005, **more: object) -> Comparison:
    word: Word = "refused" if diff is None else "hurts"
    fields = {"n": 8, "n_baseline": 8, "level": 0.05, "sesoi": 0.005, "exploratory": True}
    fields |= {"mean_diff": diff, "se": se if diff is not None else None, "word": word}
    return Comparison(**({"arm": "A", "metric": "fvu"} | fields | more))  # type: ignore[arg-type]


def judged(*diffs: float | None, direction: str = "lower", **more: object) -> AcrossSettings:
    groups = {f"s{i}": [comparison(diff, **more)] for i, diff in enumerate(diffs)}
    (found,) = judge_across(groups, direction)  # type: ignore[arg-type]
    return found


def by_root(y: np.ndarray, v: np.ndarray) -> float:
    """Paule and Mandel's tau by a root finder."""

    def excess(tau2: float) -> float:
        w = 1 / (v + tau2)
        return float((w * (y - (w @ y) / w.sum()) ** 2).sum()) - (len(y) - 1)

    if excess(0.0) <= 0:
        return 0.0
    return math.sqrt(brentq(excess, 0.0, 1e3 * float(np.ptp(y)) ** 2, xtol=1e-18))  # type: ignore[arg-type]


def test_heterogeneity_is_that_of_an_independent_computation() -> None:
    stream, spread = np.random.default_rng(0), 0
    for _ in range(100):
        k = int(stream.integers(3, 9))
        se = stream.uniform(0.5, 2, k) * 1e-3
        y = stream.normal(size=k) * np.hypot(se, stream.choice([0.0, 1e-3, 4e-3]))
        found = heterogeneity(list(y), list(se))
        w = se**-2.0
        q = float((w * (y - (w @ y) / w.sum()) ** 2).sum())
        assert found.tau == pytest.approx(by_root(y, se**2), rel=1e-3, abs=1e-9)
        assert found.i2 == pytest.approx(max(0.0, 1 - (k - 1) / q))
        assert found.p_same == pytest.approx(chi2.sf(q, k - 1))
        spread += found.tau > 0
    assert 30 < spread < 100  # both kinds of studies are among them


def test_mean_interval_is_the_one_sample_t_interval_and_prediction_is_wider() -> None:
    y = np.array([-0.010, -0.014, -0.007, -0.012])
    found = intervals(y, 0.01)
    expected = ttest_1samp(y, 0.0).confidence_interval(0.99)
    assert found.mean - found.half == pytest.approx(expected.low)
    assert found.mean + found.half == pytest.approx(expected.high)
    assert float(found.new_half / found.half) == pytest.approx(math.sqrt(len(y) + 1))


def test_an_error_that_all_settings_share_widens_both_intervals() -> None:
    y = np.array([-0.010, -0.011, -0.010])
    alone, shared = intervals(y, 0.05), intervals(y, 0.05, shared=0.01)
    assert float(shared.half) > 1.9 * 0.01 > float(alone.half)
    assert float(shared.new_half) > float(alone.new_half)
    assert judged(*y, se_l0=0.01).mean_word == "cannot tell yet"
    assert judged(*y).mean_word == "helps"


@pytest.mark.parametrize(
    ("diffs", "mean_word", "word"),
    [
        ((-0.010, -0.011, -0.0105), "helps", "helps"),
        ((0.010, 0.011, 0.0105), "hurts", "hurts"),
        ((-0.010, -0.016, -0.013), "helps", "cannot tell yet"),
        ((-0.020, 0.020, 0.001), "cannot tell yet", "cannot tell yet"),
        ((0.0002, -0.0001, 0.0), "equivalent", "equivalent"),
        ((0.001, -0.0015, 0.0012), "equivalent", "cannot tell yet"),
    ],
)
def test_words(diffs: tuple[float, ...], mean_word: str, word: str) -> None:
    found = judged(*diffs)
    assert (found.mean_word, found.word) == (mean_word, word)
    higher = judged(*(-d for d in diffs), direction="higher")
    assert (higher.mean_word, higher.word) == (mean_word, word)


def test_fewer_than_three_settings_with_a_number_give_no_word() -> None:
    reason = "the L0 of 'A' is off"
    groups = {
        "base": [comparison(-0.01)],
        "wide": [comparison(-0.01)],
        "deep": [comparison(None, reason=reason)],
    }
    (found,) = judge_across(groups, "lower")
    assert (found.word, found.mean_word, found.mean) == ("refused", "refused", None)
    assert found.n == 2 and "2 settings of 3" in found.reason
    assert f"deep is missing ({reason})" in found.reason
    assert found.means()["verdict.fvu"] == "refused"
    assert found.means()["verdict.fvu.wide"] == "hurts"  # the words of settings stay
    assert found.means()["diff.fvu"] is None


def test_a_missing_setting_is_named_and_the_others_are_judged() -> None:
    groups = {f"s{i}": [comparison(-0.010 - i / 2000)] for i in range(3)}
    groups |= {"lost": [comparison(None, reason="too few cells")], "empty": []}
    (found,) = judge_across(groups, "lower")
    assert (found.word, found.n, len(found.settings)) == ("helps", 3, 5)
    assert [one.setting for one in found.missing] == ["lost", "empty"]
    assert "lost is missing (too few cells)" in found.reason and "empty is missing" in found.reason
    assert "3/5" in across_text([found])


@pytest.mark.parametrize(("balance", "sign"), [(1, -1), (-1, 1)])
def test_survivors_do_not_win_over_settings(balance: int, sign: int) -> None:
    """In one of the settings a larger share of one side's cells failed."""
    groups = {f"s{i}": [comparison(sign * (0.010 + i / 2000))] for i in range(3)}
    assert judge_across(groups, "lower")[0].word == ("helps" if sign < 0 else "hurts")
    groups["s1"] = [comparison(sign * 0.0105, balance=balance)]
    (found,) = judge_across(groups, "lower")
    assert (found.word, found.mean_word) == ("cannot tell yet", "cannot tell yet")
    assert "failed in some setting" in found.reason and found.needed_settings is None
    groups = {f"s{i}": [comparison(-sign * (0.010 + i / 2000), balance=balance)] for i in range(3)}
    assert judge_across(groups, "lower")[0].word == ("hurts" if sign < 0 else "helps")


def test_needed_settings_would_decide_and_fewer_would_not() -> None:
    diffs = (-0.010, -0.016, -0.013)
    found = judged(*diffs)
    assert found.word == "cannot tell yet" and found.needed_settings
    assert f"{found.needed_settings} settings could decide" in found.reason

    def word(k: int) -> str:
        """With k settings of this mean and standard deviation."""
        y = np.linspace(-1, 1, k)
        y = np.mean(diffs) + np.std(diffs, ddof=1) * y / y.std(ddof=1)
        return judged(*map(float, y)).word

    assert word(found.needed_settings) == "helps"
    assert word(found.needed_settings - 1) == "cannot tell yet"


def test_effects_without_any_spread() -> None:
    """Three equal effects are no proof: labels exchanged give as much in one of four cases."""
    assert judged(-0.02, -0.02, -0.02, se=0.0).word == "cannot tell yet"
    assert judged(*[-0.02] * 6, se=0.0).word == "helps"
    nothing = judged(0.0, 0.0, 0.0, se=0.0)
    assert (nothing.word, nothing.tau, nothing.low, nothing.high) == ("equivalent", 0.0, 0.0, 0.0)


def test_arms_take_the_level_of_their_settings() -> None:
    """Half the level goes to failures where there are any; the strictest setting decides."""
    groups = {f"s{i}": [comparison(-0.01 - i / 2000, level=0.05 / 6)] for i in range(3)}
    whole = judge_across(groups, "lower")[0]
    assert whole.level == Rules(primary="fvu", direction="lower", sesoi=0.005).level(6)
    groups["s0"] = [comparison(-0.01, level=0.05 / 12)]
    assert judge_across(groups, "lower")[0].level == pytest.approx(0.05 / 12)
    assert judge_across(groups, "lower", {"A": 0.01})[0].level == 0.01  # paid from the budget


def test_every_arm_is_judged_and_stored_numbers_are_read_again() -> None:
    groups = {
        f"s{i}": [comparison(-0.01 - i / 2000), comparison(0.01 + i / 2000, arm="B")]
        for i in range(3)
    }
    found = judge_across(groups, "lower")
    assert [a.arm for a in found] == ["A", "B"] and [a.word for a in found] == ["helps", "hurts"]
    stored = [asdict(a) | {"of another version": 1} for a in found]
    assert read_across(stored) == found
    assert "NaN" not in json_text({"across": [asdict(a) for a in found]})
    text = across_text(found)
    assert "for a new setting" in text and "helps" in text and "B" in text


def test_coverage_over_settings_and_for_a_new_one() -> None:
    rows = list(settings_rows(studies=2000, seed=1))
    assert len(rows) == 351
    assert not [row.line() for row in rows if not row.is_kept]
