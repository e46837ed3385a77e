"""Statistics of differences over seeds: intervals, power, and numbers of seeds.

With differences d_1 .. d_n of one seed each, mean m and standard deviation s (ddof 1):

    interval         m +- t(n-1, 1-alpha/2) * s / sqrt(n)
    power            P(|T| > t(n-1, 1-alpha/2)), T noncentral t around sqrt(n) * effect / s
    equivalence      the interval of coverage 1 - 2 alpha lies inside +-sesoi (TOST)

    at_l0            linear in log L0 between the two measured levels around the target; none beyond

Source: Schuirmann 1987 (TOST). The power is integrated over the chi distribution of s, because
scipy's noncentral t, and with it statsmodels' power, returns NaN for some sizes of effect (in 11 of
147 settings of the tests) and takes five times as long; tests hold it against both.
`saelab.verdict.effect` has the estimate of arms whose seeds are shared in part.

Functions of `differences` take [..., n] and work along the last axis, unless they say "one row".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelab.errors import SettingError
from saelab.runtime.counting import count

Array = NDArray[np.float64]
#: Smallest p value that is printed as a number. Our choice: below it the shape of the tails, which
#: a few seeds say nothing of, decides the number.
SMALLEST_P = 1e-9

#: Share of the largest difference below which a spread is rounding. Our choice.
ROUNDING = 1e-9
#: Largest number of pairs that is recommended. Our choice: nobody trains more.
MOST_PAIRS = 10_000


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Summary of n paired differences; `low` and `high` bound the t interval (None at n = 1)."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def paired_summary(differences: ArrayLike, alpha: float = 0.05) -> Paired:
    """Returns mean, standard deviation (ddof 1) and t interval of one row of differences.

    Raises: SettingError when there is no difference or one is not finite.
    """
    row = _row(differences)
    if len(row) == 1:
        return Paired(n=1, mean=float(row[0]), sd=None, low=None, high=None)
    mean, sd = _moments(row)
    low, high = t_interval(row, alpha)
    return Paired(n=len(row), mean=float(mean), sd=float(sd), low=float(low), high=float(high))


def t_interval(differences: ArrayLike, alpha: float = 0.05) -> tuple[Array, Array]:
    """Returns the two ends of the t interval of coverage 1 - alpha, each [...]."""
    d = rows(differences)
    mean, sd = _moments(d)
    half = _t_quantile(1 - alpha / 2, d.shape[-1] - 1) * sd / math.sqrt(d.shape[-1])
    return mean - half, mean + half


def t_power(n: int, effect: float, alpha: float = 0.05) -> float:
    """Returns the power of the two-sided paired t test for an effect in standard deviations."""
    from scipy.special import ndtr

    scale, weight = _chi_nodes(n - 1)
    limit = float(_t_quantile(1 - alpha / 2, n - 1)) * scale
    shift = abs(effect) * math.sqrt(n)
    return float(weight @ (ndtr(shift - limit) + ndtr(-shift - limit)))


def tost_power(n: int, sesoi: float, alpha: float = 0.05) -> float:
    """Returns the power of the equivalence test at no effect; sesoi in standard deviations."""
    from scipy.special import ndtr

    scale, weight = _chi_nodes(n - 1)
    room = sesoi * math.sqrt(n) - float(_t_quantile(1 - alpha, n - 1)) * scale
    return float(weight @ np.maximum(2 * ndtr(room) - 1, 0.0))


def degrees_of_freedom(shared: int, alone: int) -> float:
    """Returns those of a difference of means with so many seeds that both sides have, and that one
    has alone; Derrick et al. 2017."""
    return shared - 1 + alone * (alone + shared - 1) / (alone + 2 * shared)


def planned_error(n_arm: int, n_baseline: int, shared: int) -> float:
    """Returns the standard error of a difference of means before anything is measured, in units of
    the standard deviation of the difference of two cells of one seed.

    Where seeds are not shared, cells of one seed are taken to be independent, which is the largest
    error for any correlation that is not negative.
    """
    if n_arm == n_baseline == shared:
        return 1 / math.sqrt(shared)
    return math.sqrt((1 / n_arm + 1 / n_baseline) / 2)


@functools.lru_cache(4096)
def detectable_ratio(df: float, level: float, power: float = 0.8) -> float:
    """Returns the smallest effect, in standard errors of its estimate, that an interval with `df`
    degrees of freedom and coverage 1 - level excludes 0 for with this power."""
    from scipy.optimize import brentq
    from scipy.special import ndtr

    scale, weight = _chi_nodes(df)
    limit = float(_t_quantile(1 - level / 2, df)) * scale

    def excess(shift: float) -> float:
        return float(weight @ (ndtr(shift - limit) + ndtr(-shift - limit))) - power

    highest = float(limit[-1]) + 10.0  # at which no estimate of the error is large enough
    return cast(float, brentq(excess, 0.0, highest, xtol=1e-9))


def pairs_needed(sd: float, effect: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Returns the fewest pairs at which the t test detects `effect`; None above `MOST_PAIRS`.

    Without spread it is the number at which sign flips alone reach alpha.
    """
    if effect == 0:
        return None
    if sd == 0:
        return math.ceil(math.log2(2 / alpha))
    guess = (_normal_quantile(1 - alpha / 2) + _normal_quantile(power)) * sd / effect
    return _fewest(lambda n: t_power(n, effect / sd, alpha) >= power, guess**2)


def pairs_needed_equivalence(
    sd: float, sesoi: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Returns the fewest pairs at which a true effect of zero is judged equivalent."""
    if sesoi <= 0:
        return None
    if sd == 0:
        return 2
    guess = (_normal_quantile(1 - alpha) + _normal_quantile((1 + power) / 2)) * sd / sesoi
    return _fewest(lambda n: tost_power(n, sesoi / sd, alpha) >= power, guess**2)


def mean_stderr(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Returns mean and standard error sd / sqrt(n) (ddof 1) of the values that are not None.

    The mean of no values is None, and so is the error of fewer than two.
    """
    present = [value for value in values if value is not None]
    if not present:
        return None, None
    row = _row(present)
    error = float(row.std(ddof=1)) / math.sqrt(len(row)) if len(row) > 1 else None
    return float(row.mean()), error


@dataclass(frozen=True)
class AtL0:
    """A metric at one L0; `reason` says why there is no value."""

    value: float | None
    reason: str = ""


def at_l0(levels: Sequence[float | None], values: Sequence[float | None], target: float) -> AtL0:
    """Interpolates one seed's metric at L0 = target, linearly in log L0; never extrapolates.

    Args:
        levels: the measured L0 of each cell; equal ones are averaged.
        values: the metric of each; cells without a finite value or a positive L0 are left out.

    Raises: SettingError for a target that is not positive or for lists of different lengths.
    """
    if not target > 0:
        raise SettingError("target_l0", target, "must be positive")
    if len(levels) != len(values):
        raise SettingError(
            "levels", len(levels), f"there are {count(len(values), 'value')}: give as many"
        )
    pairs = zip(levels, values, strict=True)
    present = [(x, y) for x, y in pairs if x is not None and y is not None]
    usable = [(x, y) for x, y in present if math.isfinite(x) and math.isfinite(y) and x > 0]
    measured, group = np.unique([x for x, _ in usable], return_inverse=True)
    if not len(measured):
        return AtL0(None, "no cell has both an L0 and a value")
    if not measured[0] <= target <= measured[-1]:
        span = f"measured at L0 {measured[0]:.4g} to {measured[-1]:.4g}"
        return AtL0(None, f"{span}, and not extrapolated to {target:g}: add a level beyond it")
    means = np.bincount(group, [y for _, y in usable]) / np.bincount(group)
    if target in measured:  # its logarithm may equal the logarithm of a neighbour
        return AtL0(float(means[measured == target][0]))
    return AtL0(float(np.interp(math.log(target), np.log(measured), means)))


def format_p(p: float | None, missing: str = "-") -> str:
    """Returns a p value as text, '< 1e-09' below `SMALLEST_P`."""
    if p is None:
        return missing
    return f"< {SMALLEST_P:g}" if p < SMALLEST_P else f"{p:.3g}"


def format_p_sentence(p: float) -> str:
    """Returns 'p = 0.012' or 'p < 1e-09'."""
    return f"p {format_p(p)}" if p < SMALLEST_P else f"p = {format_p(p)}"


def median(values: Sequence[float] | Array) -> float:
    """Returns the median of one row."""
    return float(np.median(_row(values)))


def mad(values: Sequence[float] | Array) -> float:
    """Returns the median absolute deviation of one row, without a factor for normal data."""
    row = _row(values)
    return float(np.median(np.abs(row - np.median(row))))


def outside_share(path: Sequence[float] | Array, low: float = 0.02, high: float = 0.98) -> float:
    """Returns the share of a path's steps outside [low, high]; above 0.1 a balance collapsed."""
    row = _row(path)
    return float(((row < low) | (row > high)).mean())


def moved_share(alpha: Sequence[float] | Array, reach: float) -> float:
    """Returns the distance that the logit of alpha moved from start to end, over its reach.

    Args:
        alpha: path of a share in [0, 1].
        reach: the farthest that the logit could move: the sum of its learning rates.
    """
    ends = np.clip(_row(alpha)[[0, -1]], 1e-7, 1 - 1e-7)
    start, end = np.log(ends / (1 - ends))
    return abs(float(end - start)) / reach


def _row(values: ArrayLike) -> Array:
    """Returns the values as one row of at least one finite number.

    Raises: SettingError for anything else.
    """
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or not row.size or not np.isfinite(row).all():
        raise SettingError(
            "values", np.asarray(values).tolist(), "one row of finite numbers is needed"
        )
    return row


def rows(differences: ArrayLike) -> Array:
    """Returns the differences as [..., n]; raises SettingError below two pairs."""
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim < 1 or d.shape[-1] < 2:
        raise SettingError("differences", d.tolist(), "at least two pairs are needed")
    return d


def _moments(d: Array) -> tuple[Array, Array]:
    """Returns mean and standard deviation [...]; a spread that is only rounding counts as zero."""
    sd = d.std(axis=-1, ddof=1)
    return d.mean(axis=-1), np.where(sd <= ROUNDING * np.abs(d).max(axis=-1), 0.0, sd)


def _t_quantile(p: float, df: float) -> Array:
    from scipy.special import stdtrit

    return stdtrit(df, p)


def _normal_quantile(p: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(p))


@functools.cache
def _legendre(count: int = 200) -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(count)


@functools.lru_cache(4096)
def _chi_nodes(df: float) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights for the distribution of s / sigma with df degrees.

    They lie on s = low + (high - low) u^2, densest near 0: with one degree of freedom and a small
    level the test decides at values of s far below 1.
    """
    nodes, weights = _legendre()
    low, high = max(0.0, 1 - 9 / math.sqrt(2 * df)), 1 + 9 / math.sqrt(df)
    u = (nodes + 1) / 2
    s = low + (high - low) * u**2
    density = weights * u * np.exp((df - 1) * np.log(s) - df * (s**2 - 1) / 2)
    return s, density / density.sum()


def _fewest(enough: Callable[[int], bool], guess: float) -> int | None:
    """Returns the smallest n from 2 to MOST_PAIRS that is enough, or None.

    The condition must stay true once it is true; a guess near that n saves time.
    """
    start, step = int(min(max(guess, 2.0), MOST_PAIRS)), 1
    low, high = start - 1, start
    if enough(start):
        while low >= 2 and enough(low):
            low, high, step = max(1, low - 2 * step), low, 2 * step
    else:
        while not enough(high := min(high + step, MOST_PAIRS)):
            if high == MOST_PAIRS:
                return None
            low, step = high, 2 * step
        low = max(low, start)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
