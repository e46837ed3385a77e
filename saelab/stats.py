"""Statistics of paired differences over seeds: intervals, tests, equivalence and power.

With differences d_1 .. d_n of one seed each, mean m and standard deviation s (ddof 1):

    interval         m +- t(n-1, 1-alpha/2) * s / sqrt(n)
    sign-flip p      share of the 2^n sign patterns e with |sum e_i d_i| >= |sum d_i|
    Holm             p'_(i) = max over j <= i of (M - j + 1) * p_(j), at most 1
    equivalence p    max of the one-sided p of "m <= -sesoi" and of "m >= sesoi" (TOST)
    power            P(|T| > t(n-1, 1-alpha/2)), T noncentral t around sqrt(n) * effect / s

    at_l0            linear in log L0 between the two measured levels around the target; none beyond

Sources: Fisher 1935 (sign flips), Holm 1979, Schuirmann 1987 (TOST), Efron 1987 (BCa). The power is
integrated over the chi distribution of s, because scipy's noncentral t can return NaN.

Functions of `differences` take [..., n] and work along the last axis, unless they say "one row".
Differences that are all equal have no spread to estimate a t statistic from: their p is the p of
the sign flips, 2^(1-n), or 1 when all are zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelab.errors import SettingError
from saelab.runtime.counting import count
from saelab.seeding import numpy_stream

Array = NDArray[np.float64]
Test = Literal["sign-flip", "t"]

#: Pairs up to which all sign patterns are counted; beyond, patterns are drawn.
EXACT_UP_TO = 20
#: Sign patterns drawn beyond that. Our choice: standard error .0007 at p = .05.
DRAWS = 100_000
#: Pairs from which a BCa interval is given; below it covers too little (.89 at 8 pairs).
BCA_FROM = 10
#: Resamples of the BCa bootstrap. Our choice: the ends are stable to about 2% of the width.
RESAMPLES = 10_000
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
    d = _rows(differences)
    mean, sd = _moments(d)
    half = _t_quantile(1 - alpha / 2, d.shape[-1] - 1) * sd / math.sqrt(d.shape[-1])
    return mean - half, mean + half


def bca_interval(
    differences: ArrayLike, alpha: float = 0.05, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Returns the bias-corrected and accelerated bootstrap interval of the mean of one row.

    It is None below `BCA_FROM` differences, where the interval covers too little.
    """
    from scipy.special import ndtr, ndtri

    row = _row(differences)
    n = len(row)
    if n < BCA_FROM:
        return None
    mean, sd = _moments(row)
    if sd == 0:
        return float(mean), float(mean)
    draws = numpy_stream(seed, "bca", n).integers(0, n, (resamples, n))
    means = row[draws].mean(axis=1)
    below = np.mean(means < mean) + np.mean(means == mean) / 2
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    influence = row - mean  # the jackknife's values, up to a factor that cancels
    acceleration = np.sum(influence**3) / (6 * np.sum(influence**2) ** 1.5)
    z = bias + ndtri(np.array([alpha / 2, 1 - alpha / 2]))
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def sign_flip_p(differences: ArrayLike, seed: int = 0) -> Array:
    """Returns the two-sided sign-flip p [...]: exact up to `EXACT_UP_TO` differences."""
    d = _rows(differences)
    n = d.shape[-1]
    limit = np.abs(d.sum(axis=-1, keepdims=True)) - ROUNDING * np.abs(d).sum(axis=-1, keepdims=True)
    if n > EXACT_UP_TO:
        return _drawn_sign_flip_p(d, limit, seed)
    sums = d[..., :1]  # flipping all signs changes no |sum|, so the first sign stays
    for i in range(1, n):
        sums = np.concatenate([sums + d[..., i : i + 1], sums - d[..., i : i + 1]], axis=-1)
    return np.mean(np.abs(sums) >= limit, axis=-1)


def _drawn_sign_flip_p(d: Array, limit: Array, seed: int, chunk: int = 10_000) -> Array:
    """Returns (1 + hits) / (1 + draws), which is never zero and never too small on average."""
    stream = numpy_stream(seed, "sign-flip", d.shape[-1])
    hits = np.zeros(d.shape[:-1])
    for _ in range(DRAWS // chunk):
        signs = stream.integers(0, 2, (chunk, d.shape[-1])) * 2.0 - 1.0
        hits += np.sum(np.abs(d @ signs.T) >= limit, axis=-1)
    return (1 + hits) / (1 + DRAWS)


def paired_t_p(differences: ArrayLike) -> Array:
    """Returns the two-sided p [...] of the paired t test; without spread it is 2^(1-n) or 1."""
    from scipy.special import stdtr

    d = _rows(differences)
    n = d.shape[-1]
    mean, sd = _moments(d)
    flat = np.where(mean == 0, 1.0, 2.0 ** (1 - n))
    t = np.abs(mean) * math.sqrt(n) / np.where(sd == 0, 1.0, sd)
    return np.where(sd == 0, flat, 2 * stdtr(n - 1, -t))


def choose_test(n: int, m: int, alpha: float = 0.05) -> Test:
    """Chooses the one test that decides from the numbers of pairs and comparisons alone.

    The smallest sign-flip p is 2^(1-n). Holm multiplies it by up to m, so below
    n = ceil(log2(2m / alpha)) sign flips can never reach alpha and the t test is used.
    """
    return "sign-flip" if n >= math.ceil(math.log2(2 * m / alpha)) else "t"


def chosen_p(differences: ArrayLike, m: int, alpha: float = 0.05) -> Array:
    """Returns the p [...] of the test that `choose_test` names for these differences."""
    d = _rows(differences)
    return sign_flip_p(d) if choose_test(d.shape[-1], m, alpha) == "sign-flip" else paired_t_p(d)


def holm(p: ArrayLike, m: int | None = None) -> Array:
    """Returns the Holm-adjusted p [..., k] over the last axis.

    Args:
        p: unadjusted p, [..., k].
        m: size of the family when it is larger than k (comparisons that could not be made count).
    """
    values = np.asarray(p, dtype=np.float64)
    k = values.shape[-1]
    family = max(k, m or 0)
    order = np.argsort(values, axis=-1)
    stepped = np.take_along_axis(values, order, axis=-1) * (family - np.arange(k))
    stepped = np.minimum(np.maximum.accumulate(stepped, axis=-1), 1.0)
    adjusted = np.empty_like(values)
    np.put_along_axis(adjusted, order, stepped, axis=-1)
    return adjusted


def tost_p(differences: ArrayLike, sesoi: float) -> Array:
    """Returns the p [...] of "the effect is at least sesoi in size"; small means equivalent.

    p <= alpha exactly when the interval of coverage 1 - 2 alpha lies inside +-sesoi.
    """
    from scipy.special import stdtr

    d = _rows(differences)
    n = d.shape[-1]
    mean, sd = _moments(d)
    t = (sesoi - np.abs(mean)) * math.sqrt(n) / np.where(sd == 0, 1.0, sd)
    return np.where(sd == 0, np.where(np.abs(mean) < sesoi, 0.0, 1.0), stdtr(n - 1, -t))


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


@functools.cache
def detectable_factor(n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Returns the smallest effect, in standard deviations, that n >= 2 pairs detect."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if t_power(n, middle, alpha) >= power else (middle, high)
    return high


def smallest_detectable(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Returns the smallest true effect, in the unit of `sd`, that n pairs detect."""
    return detectable_factor(n, alpha, power) * sd


def pairs_needed(sd: float, effect: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Returns the fewest pairs at which the t test detects `effect`; None above `MOST_PAIRS`.

    Without spread it is the number at which sign flips alone reach alpha.
    """
    if effect == 0:
        return None
    if sd == 0:
        return math.ceil(math.log2(2 / alpha))
    return _fewest(lambda n: t_power(n, effect / sd, alpha) >= power)


def pairs_needed_equivalence(
    sd: float, sesoi: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Returns the fewest pairs at which a true effect of zero is judged equivalent."""
    if sesoi <= 0:
        return None
    return 2 if sd == 0 else _fewest(lambda n: tost_power(n, sesoi / sd, alpha) >= power)


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


def _rows(differences: ArrayLike) -> Array:
    """Returns the differences as [..., n]; raises SettingError below two pairs."""
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim < 1 or d.shape[-1] < 2:
        raise SettingError("differences", d.tolist(), "at least two pairs are needed")
    return d


def _moments(d: Array) -> tuple[Array, Array]:
    """Returns mean and standard deviation [...]; a spread that is only rounding counts as zero."""
    sd = d.std(axis=-1, ddof=1)
    return d.mean(axis=-1), np.where(sd <= ROUNDING * np.abs(d).max(axis=-1), 0.0, sd)


def _t_quantile(p: float, df: int) -> Array:
    from scipy.special import stdtrit

    return stdtrit(df, p)


@functools.cache
def _legendre(count: int = 200) -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(count)


def _chi_nodes(df: int) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights for the distribution of s / sigma with df degrees."""
    nodes, weights = _legendre()
    low, high = max(0.0, 1 - 9 / math.sqrt(2 * df)), 1 + 9 / math.sqrt(df)
    s = low + (nodes + 1) * (high - low) / 2
    density = weights * np.exp((df - 1) * np.log(s) - df * (s**2 - 1) / 2)
    return s, density / density.sum()


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """Returns the smallest n from 2 to MOST_PAIRS that is enough, or None.

    The condition must stay true once it is true.
    """
    low, high = 1, 2
    while not enough(high):
        if high >= MOST_PAIRS:
            return None
        low, high = high, min(2 * high, MOST_PAIRS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
