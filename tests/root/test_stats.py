"""Statistics of paired differences, against hand-derived values and scipy."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats as reference

from saelab import stats
from saelab.errors import SettingError
from saelab.seeding import numpy_stream

numbers = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))
rows = st.lists(numbers, min_size=2, max_size=9)


def normal(n: int, *keys: int) -> np.ndarray:
    return numpy_stream(0, "test", n, *keys).normal(0.3, 1.0, n)


def test_summary_by_hand() -> None:
    # d = 1, 2, 3: mean 2, sd 1, half width t(2, .975) / sqrt(3) = 4.302653 / 1.732051
    summary = stats.paired_summary([1.0, 2.0, 3.0])
    assert (summary.n, summary.mean, summary.sd) == (3, 2.0, 1.0)
    assert summary.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert summary.high == pytest.approx(2 + 2.484138, abs=1e-6)


def test_one_pair_has_a_mean_and_nothing_else() -> None:
    assert stats.paired_summary([0.5]) == stats.Paired(n=1, mean=0.5, sd=None, low=None, high=None)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf, 0.0], [[1.0], [2.0]]])
def test_bad_rows_are_refused(bad: list) -> None:
    with pytest.raises(SettingError, match="finite"):
        stats.paired_summary(bad)


def test_tests_need_two_pairs() -> None:
    with pytest.raises(SettingError, match="two pairs"):
        stats.paired_t_p([1.0])


@given(rows)
def test_sign_flip_p_counts_all_patterns(d: list[float]) -> None:
    limit = abs(sum(d)) - 1e-9 * sum(map(abs, d))
    patterns = list(itertools.product((1, -1), repeat=len(d)))
    hits = sum(abs(sum(e * x for e, x in zip(p, d, strict=True))) >= limit for p in patterns)
    assert stats.sign_flip_p(d) == pytest.approx(hits / len(patterns), abs=1e-12)


def test_sign_flip_p_by_hand() -> None:
    assert stats.sign_flip_p([1.0, 1.0, 1.0, 1.0, 1.0]) == 2 / 32  # five pairs never reach .05
    assert stats.sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert stats.sign_flip_p([3.0, 2.0, -1.0]) == 4 / 8  # sums of 6 and 4, each with its negative
    assert stats.sign_flip_p([0.1, -0.1]) == 1.0
    assert stats.sign_flip_p(np.arange(1.0, 21.0)) == 2.0**-19


def test_drawn_sign_flips_agree_with_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    d = normal(16, 3)
    exact = float(stats.sign_flip_p(d))
    monkeypatch.setattr(stats, "EXACT_UP_TO", 10)
    drawn = float(stats.sign_flip_p(d))
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / stats.DRAWS))


def test_drawn_sign_flips_are_repeatable_and_never_zero() -> None:
    d = np.ones(30)
    assert stats.sign_flip_p(d) == stats.sign_flip_p(d) == 1 / (1 + stats.DRAWS)


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_t_test_and_interval_agree_with_scipy(n: int) -> None:
    d = normal(n)
    result = reference.ttest_1samp(d, 0.0)
    assert stats.paired_t_p(d) == pytest.approx(result[1], rel=1e-9)
    interval = result.confidence_interval(0.9)
    assert stats.t_interval(d, 0.1) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_differences_without_spread() -> None:
    assert stats.paired_t_p([0.0, 0.0, 0.0]) == 1.0
    assert stats.paired_t_p([0.2, 0.2, 0.2]) == 0.25  # as sign flips: 2 / 8
    # .1 * 3 - .3 and the like leave a spread of rounding only
    assert stats.paired_summary([0.1 + 0.2, 0.3, 0.3]).sd == 0.0


@given(rows, st.integers(1, 12))
def test_all_functions_work_on_stacked_rows(d: list[float], m: int) -> None:
    stack = np.array([d, d[::-1], [-x for x in d]])
    for of in (stats.sign_flip_p, stats.paired_t_p, lambda x: stats.chosen_p(x, m)):
        single = [float(of(row)) for row in stack]
        assert np.allclose(of(stack), single, rtol=1e-9)
        assert single[0] == pytest.approx(single[2], rel=1e-9)  # two-sided


@pytest.mark.parametrize(
    ("n", "m", "test"),
    [(5, 1, "t"), (6, 1, "sign-flip"), (7, 5, "t"), (8, 5, "sign-flip"), (8, 6, "sign-flip"),
     (8, 7, "t"), (3, 1, "t")],
)  # fmt: skip
def test_choice_of_the_test(n: int, m: int, test: str) -> None:
    assert stats.choose_test(n, m, 0.05) == test
    reachable = m * 2.0 ** (1 - n) <= 0.05
    assert reachable == (test == "sign-flip")


def test_holm_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04 -> running maximum .02 .03 .06 .06
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.01, 0.4], m=5) == pytest.approx([0.05, 1.0])
    assert stats.holm([]).shape == (0,)
    stacked = stats.holm([[0.01, 0.02], [0.02, 0.01]])
    assert stacked == pytest.approx(np.array([[0.02, 0.02], [0.02, 0.02]]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    adjusted = stats.holm(p)
    assert np.all(adjusted >= p)
    assert np.all(adjusted <= np.minimum(np.array(p) * len(p), 1.0) + 1e-15)
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(adjusted[order]) >= 0)


@pytest.mark.parametrize("sesoi", [0.2, 1.0, 3.0])
def test_equivalence_is_two_one_sided_tests(sesoi: float) -> None:
    d = normal(9)
    above = float(np.asarray(reference.ttest_1samp(d, -sesoi, alternative="greater"))[1])
    below = float(np.asarray(reference.ttest_1samp(d, sesoi, alternative="less"))[1])
    p = float(stats.tost_p(d, sesoi))
    assert p == pytest.approx(max(above, below), rel=1e-9)
    low, high = stats.t_interval(d, 0.1)
    assert (p <= 0.05) == (-sesoi < low and high < sesoi)


def test_equivalence_without_spread_or_without_a_smallest_effect() -> None:
    assert stats.tost_p([0.0, 0.0], 0.01) == 0.0
    assert stats.tost_p([0.02, 0.02], 0.01) == 1.0
    assert stats.tost_p([0.0, 0.0], 0.0) == 1.0
    assert stats.tost_p(normal(9), 0.0) >= 0.5


def test_smallest_detectable_effects() -> None:
    factors = [round(stats.detectable_factor(n), 2) for n in (3, 5, 8)]
    assert factors == [3.26, 1.68, 1.16]
    assert stats.smallest_detectable(0.5, 8) == 0.5 * stats.detectable_factor(8)
    assert stats.detectable_factor(2) < 12  # scipy's noncentral t is NaN there


def test_power_is_that_of_the_noncentral_t() -> None:
    for n, effect in ((3, 3.0), (10, 1.0), (8, 0.7), (40, 0.4), (200, 0.1)):
        limit = reference.t.ppf(0.975, n - 1)
        shift = effect * math.sqrt(n)
        upper = reference.nct.sf(limit, n - 1, shift)
        expected = upper + reference.nct.cdf(-limit, n - 1, shift)
        assert stats.t_power(n, effect) == pytest.approx(expected, abs=1e-8)
    assert stats.t_power(7, 0.0, 0.03) == pytest.approx(0.03, abs=1e-9)


def test_equivalence_power_against_simulation() -> None:
    d = numpy_stream(1, "test").normal(size=(20_000, 6))
    observed = np.mean(stats.tost_p(d, 1.2) <= 0.05)
    assert observed == pytest.approx(stats.tost_power(6, 1.2), abs=0.011)


def test_pairs_needed() -> None:
    needed = stats.pairs_needed(1.0, 0.5)
    assert needed == 34  # the normal approximation, (1.96 + .84)^2 / .25 = 31.4, is too few
    assert stats.t_power(33, 0.5) < 0.8 <= stats.t_power(34, 0.5)
    assert stats.pairs_needed(2.0, 1.0) == needed
    assert stats.pairs_needed(1.0, 0.5, alpha=0.01) > needed  # type: ignore[operator]
    assert stats.pairs_needed(1.0, 0.0) is None
    assert stats.pairs_needed(1.0, 0.001) is None  # more than anyone trains
    assert stats.pairs_needed(0.0, 0.1, alpha=0.05 / 5) == 8
    equivalence = stats.pairs_needed_equivalence(1.0, 0.5)
    assert equivalence is not None
    assert stats.tost_power(equivalence - 1, 0.5) < 0.8 <= stats.tost_power(equivalence, 0.5)
    assert stats.pairs_needed_equivalence(1.0, 0.0) is None


def test_bca_interval() -> None:
    assert stats.bca_interval(normal(9)) is None
    d = np.exp(normal(25))
    expected = reference.bootstrap(
        (d,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    interval = stats.bca_interval(d)
    assert interval == stats.bca_interval(d)
    width = expected.high - expected.low
    assert interval == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert stats.bca_interval(np.full(10, 0.5)) == (0.5, 0.5)


def test_mean_and_standard_error() -> None:
    assert stats.mean_stderr([1.0, None, 3.0]) == (2.0, pytest.approx(1.0))  # sqrt(2) / sqrt(2)
    assert stats.mean_stderr([4.0, None]) == (4.0, None)
    assert stats.mean_stderr([None]) == (None, None)


def test_median_and_mad() -> None:
    assert stats.median([1.0, 2.0, 3.0, 4.0, 1000.0]) == 3.0
    assert stats.mad([1.0, 2.0, 3.0, 4.0, 1000.0]) == 1.0


# ---- a metric at one L0 --------------------------------------------------------------------


def test_at_l0_by_hand() -> None:
    # halfway between 2 and 8 in log L0 is 4
    assert stats.at_l0([8.0, 2.0], [0.1, 0.3], 4.0).value == pytest.approx(0.2)
    assert stats.at_l0([2.0, 4.0, 64.0], [0.5, 0.3, 0.1], 8.0).value == pytest.approx(0.25)


level_lists = st.lists(st.floats(0.1, 1000), min_size=1, max_size=8, unique=True)


@given(level_lists, st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_at_l0_is_exact_for_a_metric_linear_in_log_l0(
    levels: list[float], slope: float, origin: float, share: float
) -> None:
    values = [origin + slope * math.log(level) for level in levels]
    low, high = min(levels), max(levels)
    target = min(max(low**share * high ** (1 - share), low), high)
    found = stats.at_l0(levels, values, target)
    assert found.value == pytest.approx(origin + slope * math.log(target), rel=1e-9, abs=1e-9)
    assert found.reason == ""


@given(st.lists(st.tuples(st.floats(0.1, 100), numbers), min_size=1, max_size=8), st.randoms())
@example([(0.1, 0.0), (0.10000000000000002, 1.0)], random.Random(0))
def test_at_l0_passes_through_the_levels_in_any_order(
    pairs: list[tuple[float, float]], random: random.Random
) -> None:
    pairs = list(dict(pairs).items())
    shuffled = random.sample(pairs, len(pairs))
    levels, values = [x for x, _ in shuffled], [y for _, y in shuffled]
    for level, value in pairs:
        assert stats.at_l0(levels, values, level).value == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("target", [1.9, 8.1])
def test_at_l0_never_extrapolates(target: float) -> None:
    found = stats.at_l0([8.0, 2.0], [0.1, 0.3], target)
    assert found.value is None
    assert "L0 2 to 8" in found.reason and f"extrapolated to {target}" in found.reason


def test_at_l0_leaves_out_what_is_missing_and_averages_equal_levels() -> None:
    levels = [2.0, None, 0.0, 4.0, 8.0, 8.0]
    values = [0.3, 9.0, 9.0, math.nan, 0.0, 0.2]
    assert stats.at_l0(levels, values, 4.0).value == pytest.approx(0.2)
    nothing = stats.at_l0([None, 4.0], [0.1, None], 4.0)
    assert nothing == stats.AtL0(None, "no cell has both an L0 and a value")


@pytest.mark.parametrize(
    ("levels", "target", "setting"), [([1.0], 0.0, "target_l0"), ([1.0, 2.0], 1.0, "levels")]
)
def test_at_l0_refuses_nonsense(levels: list[float], target: float, setting: str) -> None:
    with pytest.raises(SettingError) as error:
        stats.at_l0(levels, [0.5], target)
    assert error.value.setting == setting
