"""The estimate of an effect from cells that share their seeds in part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from saelab.errors import SettingError
from saelab.seeding import numpy_stream
from saelab.verdict.effect import estimate, estimate_by_seed


def draw(*shape: int) -> np.ndarray:
    return numpy_stream(0, "test-effect", str(shape)).normal(size=shape)


def test_with_all_seeds_shared_it_is_the_paired_t_test() -> None:
    a, b = draw(8), 0.5 + draw(2, 8)[1]
    found, other = estimate(a, b, 8), scipy_stats.ttest_rel(a, b)
    low, high = found.interval(0.05)
    interval = other.confidence_interval(0.95)
    assert float(found.p) == pytest.approx(other.pvalue) and float(found.df) == 7
    assert (float(low), float(high)) == pytest.approx((interval.low, interval.high))
    assert float(found.pair_sd) == pytest.approx(np.std(a - b, ddof=1))


def test_without_shared_seeds_it_is_no_bolder_than_the_two_sample_tests() -> None:
    a, b = draw(5), 0.5 + 2 * draw(2, 9)[1]
    found = estimate(a, b, 0)
    pooled = scipy_stats.ttest_ind(a, b)
    welch = scipy_stats.ttest_ind(a, b, equal_var=False)
    assert float(found.df) == pooled.df
    larger = max(abs(found.mean / pooled.statistic), abs(found.mean / welch.statistic))
    assert float(found.se) == pytest.approx(float(larger))


def test_a_published_example() -> None:
    """Statistic and degrees of freedom of Derrick et al. 2017, computed from their formulas."""
    a, b = draw(6), draw(3, 9)[1]
    found, n_a, n_b, shared = estimate(a, b, 4), 6, 9, 4
    r = np.corrcoef(a[:4], b[:4])[0, 1]
    pooled = ((n_a - 1) * a.var(ddof=1) + (n_b - 1) * b.var(ddof=1)) / (n_a + n_b - 2)
    first = pooled * (1 / n_a + 1 / n_b - 2 * r * shared / (n_a * n_b))
    both = a.var(ddof=1) / n_a + b.var(ddof=1) / n_b
    second = both - 2 * r * a.std(ddof=1) * b.std(ddof=1) * shared / (n_a * n_b)
    assert float(found.variance) == pytest.approx(max(first, second))
    only_a, only_b = n_a - shared, n_b - shared
    df = (shared - 1) + (only_a + only_b + shared - 1) / (only_a + only_b + 2 * shared) * (
        only_a + only_b
    )
    assert float(found.df) == pytest.approx(df)


def test_further_variance_widens_the_interval_and_its_degrees_of_freedom() -> None:
    a, b = draw(8), draw(2, 8)[0]
    plain, wider = estimate(a, b, 8), estimate(a, b, 8, extra=4.0)
    assert float(wider.se) == pytest.approx(float(np.sqrt(plain.variance + 4)))
    assert float(wider.df) > float(plain.df)
    flat = estimate(np.ones(3), np.zeros(3), 3, extra=4.0)
    assert float(flat.p) == pytest.approx(2 * scipy_stats.norm.sf(0.5), rel=1e-3)


def test_cells_without_spread() -> None:
    low, high = estimate(np.full(3, 0.25), np.full(3, 0.5), 3).interval(0.05)
    assert (float(low), float(high)) == (-0.25, 0.0)
    low, high = estimate(np.full(8, 0.25), np.full(8, 0.5), 8).interval(0.05)
    assert (float(low), float(high)) == (-0.25, -0.25)


@given(st.permutations(range(7)), st.integers(0, 5))
def test_order_and_sides_do_not_matter(order: list[int], shift: int) -> None:
    values = draw(2, 7)
    arm = {seed + shift: float(values[0][seed]) for seed in order}
    base = {seed: float(values[1][seed]) for seed in range(7)}
    found, turned = estimate_by_seed(arm, base), estimate_by_seed(base, arm)
    again = estimate_by_seed(dict(sorted(arm.items())), base)
    assert float(found.p) == pytest.approx(float(turned.p)) == pytest.approx(float(again.p))
    assert float(found.mean) == pytest.approx(-float(turned.mean)) and found.n[2] == 7 - shift


def test_one_cell_has_no_spread() -> None:
    with pytest.raises(SettingError, match="two"):
        estimate(np.ones(1), np.ones(8), 1)


def test_many_comparisons_at_once() -> None:
    """Arms beside one baseline that is not copied, each with a further variance of its own."""
    arms, baseline = draw(4, 3, 8), draw(5, 8)[:4, None]
    extra = np.array([0.0, 0.5, 4.0])
    together = estimate(arms, baseline, 6, extra)
    for i, j in np.ndindex(4, 3):
        one = estimate(arms[i, j], baseline[i, 0], 6, float(extra[j]))
        for name in ("mean", "se", "df", "p", "correlation", "pair_sd", "flat"):
            assert getattr(together, name)[i, j] == pytest.approx(float(getattr(one, name))), name
        ends = [float(end[i, j]) for end in together.interval(0.05)]
        assert ends == pytest.approx([float(end) for end in one.interval(0.05)])
    assert together.mean.shape == together.extra.shape == (4, 3)
