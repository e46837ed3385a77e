"""Statistics of paired differences, against hand-derived values and scipy."""

from __future__ import annotations

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


def test_power_is_that_of_the_noncentral_t() -> None:
    for n, effect in ((3, 3.0), (10, 1.0), (8, 0.7), (40, 0.4), (200, 0.1)):
        limit = reference.t.ppf(0.975, n - 1)
        shift = effect * math.sqrt(n)
        upper = reference.nct.sf(limit, n - 1, shift)
        expected = upper + reference.nct.cdf(-limit, n - 1, shift)
        assert stats.t_power(n, effect) == pytest.approx(expected, abs=1e-8)
    assert stats.t_power(7, 0.0, 0.03) == pytest.approx(0.03, abs=1e-9)


#: Pairs, effects in standard deviations and levels, to the far corners of what is asked.
CORNERS = [
    (n, effect, alpha)
    for n in (2, 3, 5, 8, 20, 200, 5000)
    for effect in (1e-4, 0.05, 0.3, 1.0, 3.0, 10.0, 40.0)
    for alpha in (0.05, 0.05 / 6, 0.05 / 64)
]


def test_power_is_a_number_everywhere_and_scipys_where_that_is_one() -> None:
    compared = 0
    for n, effect, alpha in CORNERS:
        ours = stats.t_power(n, effect, alpha)
        assert 0 <= ours <= 1 + 1e-12
        limit, shift = reference.t.ppf(1 - alpha / 2, n - 1), effect * math.sqrt(n)
        theirs = reference.nct.sf(limit, n - 1, shift) + reference.nct.cdf(-limit, n - 1, shift)
        if np.isfinite(theirs):
            assert ours == pytest.approx(theirs, abs=2e-5)
            compared += 1
    assert compared > 100


def test_power_and_pairs_are_those_of_statsmodels() -> None:
    power = pytest.importorskip("statsmodels.stats.power").TTestPower()
    for effect in (0.05, 0.2, 0.5, 1.0, 3.0):
        for alpha in (0.05, 0.05 / 6):
            solved = power.solve_power(effect, alpha=alpha, power=0.8)
            assert stats.pairs_needed(1.0, effect, alpha) == math.ceil(solved)
            theirs = power.power(effect, 12, alpha)
            if np.isfinite(theirs):  # which it is not for the largest effect
                assert stats.t_power(12, effect, alpha) == pytest.approx(theirs, abs=1e-8)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6, 0.05 / 64])
def test_pairs_needed_are_the_fewest_that_are_enough(alpha: float) -> None:
    for effect in np.exp(numpy_stream(0, "test pairs").normal(-1, 1.2, 40)):
        for needed, enough in (
            (stats.pairs_needed(1.0, effect, alpha), stats.t_power),
            (stats.pairs_needed_equivalence(1.0, effect, alpha), stats.tost_power),
        ):
            if needed is None:
                assert enough(stats.MOST_PAIRS, effect, alpha) < 0.8
            else:
                assert enough(needed, effect, alpha) >= 0.8
                assert needed == 2 or enough(needed - 1, effect, alpha) < 0.8


def test_mean_and_standard_error() -> None:
    assert stats.mean_stderr([1.0, None, 3.0]) == (2.0, pytest.approx(1.0))  # sqrt(2) / sqrt(2)
    assert stats.mean_stderr([4.0, None]) == (4.0, None)
    assert stats.mean_stderr([None]) == (None, None)


def test_median_and_mad() -> None:
    assert stats.median([1.0, 2.0, 3.0, 4.0, 1000.0]) == 3.0
    assert stats.mad([1.0, 2.0, 3.0, 4.0, 1000.0]) == 1.0
    row = normal(31)
    assert stats.mad(row) == pytest.approx(reference.median_abs_deviation(row))


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


def test_detectable_effects_have_the_power_that_is_stated() -> None:
    for df, level in ((2, 0.05), (7, 0.05), (7, 0.05 / 6)):
        ratio = stats.detectable_ratio(df, level)
        limit = reference.t.ppf(1 - level / 2, df)
        power = reference.nct.sf(limit, df, ratio) + reference.nct.cdf(-limit, df, ratio)
        assert power == pytest.approx(0.8, abs=1e-6)
    assert stats.detectable_ratio(1e6, 0.05) == pytest.approx(1.95996 + 0.84162, abs=1e-3)


def test_planned_errors_and_degrees_of_freedom() -> None:
    assert stats.degrees_of_freedom(8, 0) == 7 and stats.degrees_of_freedom(0, 11) == 9
    assert 2 < stats.degrees_of_freedom(3, 5) < 9
    assert stats.planned_error(8, 8, 8) == pytest.approx(8**-0.5)
    assert stats.planned_error(3, 8, 3) == pytest.approx(((1 / 3 + 1 / 8) / 2) ** 0.5)
    assert stats.planned_error(8, 8, 0) == pytest.approx(8**-0.5)


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_the_interval_agrees_with_scipy(n: int) -> None:
    d = normal(n)
    interval = reference.ttest_1samp(d, 0.0).confidence_interval(0.9)
    assert stats.t_interval(d, 0.1) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_an_interval_needs_two_pairs() -> None:
    with pytest.raises(SettingError, match="two pairs"):
        stats.t_interval([1.0])


def test_equivalence_power_against_simulation() -> None:
    d = numpy_stream(1, "test").normal(size=(20_000, 6))
    low, high = stats.t_interval(d, 0.1)
    observed = np.mean((low > -1.2) & (high < 1.2))
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


def test_a_p_value_below_what_seeds_support_is_a_bound() -> None:
    assert stats.format_p(0.0123) == "0.0123" and stats.format_p(None) == "-"
    assert stats.format_p(1e-186) == stats.format_p(0.0) == "< 1e-09"
    assert stats.format_p_sentence(1e-9) == "p = 1e-09"
    assert stats.format_p_sentence(1e-10) == "p < 1e-09"
