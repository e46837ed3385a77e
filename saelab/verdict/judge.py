"""The verdict: does an arm move the primary metric, and by enough to matter?

The effect is arm minus baseline at the declared L0, estimated from all healthy cells of both sides
(`effect`), and its interval has coverage 1 - level. With s, the smallest effect of interest:

    helps / hurts     the interval excludes 0, its estimate is at least s, and it reaches beyond s;
                      or a significantly smaller / larger share of the arm's cells fails
    equivalent        the interval lies inside +-s, whether or not it excludes 0
    cannot tell yet   otherwise, with the number of seeds that could decide it
    refused           no comparison is made: L0 off target, too few cells, other definitions

The level is the one that the study's error budget gave the comparison (`ledger`), at most alpha
over the number of comparisons of the family (Bonferroni), which it is without a ledger; so all
intervals of a run hold together. Where any cell of the two sides failed, half of the level goes to
an exact test of the numbers of failures (`failures`) and the other half to the metric of the cells
that did not; the side with the larger share of failures then can't win by the metric of its
survivors, and neither side is called equivalent. A cell that is `invalid` (the software's fault)
has the value None and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np

from saelab import stats
from saelab.errors import SettingError
from saelab.evals.base import check_one_definition, other_definition
from saelab.runtime.counting import count
from saelab.verdict.effect import Effect, estimate_by_seed
from saelab.verdict.failures import Failures
from saelab.verdict.l0_adjustment import Matched, slope_variance

Word = Literal["helps", "hurts", "equivalent", "cannot tell yet", "refused"]
Direction = Literal["lower", "higher"]
Values = Mapping[int, float | None]

#: Balance of failures -> words that the metric of the survivors can't give.
BARRED: dict[int, tuple[Word, ...]] = {
    1: ("helps", "equivalent"),
    -1: ("hurts", "equivalent"),
    0: (),
}

#: Variation that the intervals cover, printed in every report.
COVERS = (
    "The interval over seeds covers SAE initialisation and data order, the one over texts other "
    "documents of the same kind. One model and one text were used: none covers other models or "
    "texts."
)
#: Power at which smallest detectable effects and numbers of seeds are stated.
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of an arm with the baseline on the primary metric; missing numbers are None.

    Args:
        arm, metric: the arm, and the metric of the comparison.
        n, n_baseline, n_shared: healthy cells of the arm and of the baseline that entered, and the
            seeds that both have.
        mean_diff, low, high: mean of arm - baseline and its interval, in the metric's unit.
        se: standard error of that mean.
        se_l0: the part of it that comes from moving cells to the declared L0, which no further
            cells reduce.
        level: 1 - coverage of the interval.
        p: two-sided p of no difference in the metric; below `level` it decides.
        correlation: of arm and baseline within a seed.
        spread: standard deviation of the difference of two cells of one seed.
        failures: k of n on both sides, as a sentence; '' where no cell failed.
        p_failures: two-sided p of equal shares of failures; None where no cell failed.
        balance: 1 where a larger share of the arm's cells failed, -1 where a smaller one, else 0.
        sesoi: smallest effect of interest, in the metric's unit.
        detectable: smallest true effect that the interval excludes 0 for in 80% of studies with
            these cells.
        word: the verdict.
        needed_seeds: for 'cannot tell yet', seeds of both sides that could decide it, see
            `seeds_to_tell`; None where more seeds would not help.
        reason: one sentence with the numbers.
        exploratory: false only for the confirmatory run.
        against: the arm that it is compared with.
    """

    arm: str
    metric: str
    n: int = 0
    n_baseline: int = 0
    n_shared: int = 0
    mean_diff: float | None = None
    low: float | None = None
    high: float | None = None
    se: float | None = None
    se_l0: float = 0.0
    level: float
    p: float | None = None
    correlation: float | None = None
    spread: float | None = None
    failures: str = ""
    p_failures: float | None = None
    balance: int = 0
    sesoi: float
    detectable: float | None = None
    word: Word = "refused"
    needed_seeds: int | None = None
    reason: str = ""
    exploratory: bool
    against: str = "baseline"

    def __repr__(self) -> str:
        """Returns arm, word and interval on one line."""
        if self.mean_diff is None or self.low is None or self.high is None:
            numbers = self.reason or "no difference could be measured"
        else:
            interval = f"{1 - self.level:.4g} interval {self.low:+.4g} to {self.high:+.4g}"
            numbers = f"{self.metric} differs by {self.mean_diff:+.4g} ({interval})"
        cells = f"{count(self.n, 'cell')} and {self.n_baseline}, smallest effect {self.sesoi:g}"
        return f"Comparison({self.arm} against {self.against}: {self.word}; {numbers}; {cells})"

    def means(self) -> dict[str, float | str | None]:
        """Entries of `final_info.json` that hold this comparison."""
        return {
            f"verdict.{self.metric}": self.word,
            f"diff.{self.metric}": self.mean_diff,
            f"diff.{self.metric}.low": self.low,
            f"diff.{self.metric}.high": self.high,
            "level": self.level,
            **({"needed_seeds": self.needed_seeds} if self.needed_seeds else {}),
            **({"against": self.against} if self.against != "baseline" else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference on a secondary metric: mean of arm - baseline with its 95% interval.

    Args:
        arm, metric: their names.
        n: cells of the arm that have a number.
        mean_diff: mean of the arm minus that of the other; None where it can't be had.
        low, high: ends of the interval; None without one.
        reason: why it is missing; '' where it is there.
    """

    arm: str
    metric: str
    n: int
    mean_diff: float | None
    low: float | None
    high: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules of a verdict, all of them fixed before anything is measured.

    Args:
        primary: name of the metric.
        direction: of better values.
        sesoi: smallest effect of interest, in the metric's unit; 0 means that none is declared.
        alpha: share of studies without any effect in which a word may be wrong.
        family: planned number of comparisons when it is larger than the number of arms.
        looks: how often the comparison is judged, with more seeds each time, this one included;
            None where it is judged once. Look k has the level alpha / 2^k.
        exploratory: marks every comparison; false for the confirmatory run.
        baseline: name of the arm that the others are compared with.

    Raises: SettingError for an impossible rule.
    """

    primary: str
    direction: Direction
    sesoi: float
    alpha: float = 0.05
    family: int | None = None
    looks: int | None = None
    exploratory: bool = True
    baseline: str = "baseline"

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher"):
            raise SettingError("direction", self.direction, "say 'lower' or 'higher'")
        if not (math.isfinite(self.sesoi) and self.sesoi >= 0):
            raise SettingError("sesoi", self.sesoi, "a finite number >= 0 is needed")
        if not 0 < self.alpha < 0.5:
            raise SettingError("alpha", self.alpha, "a level between 0 and 0.5 is needed")
        if self.looks is not None and self.looks < 1:
            raise SettingError("looks", self.looks, "at least 1 is needed")

    @property
    def sign(self) -> float:
        """Turns a difference of values into a gain: 1 where higher is better, else -1."""
        return 1.0 if self.direction == "higher" else -1.0

    def level(self, comparisons: int) -> float:
        """The level of each of so many comparisons."""
        return self.alpha / max(1, comparisons) / (2**self.looks if self.looks else 1)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one arm.

    Args:
        matched: the primary metric at the declared L0.
        failed: seeds whose cell failed by the arm's own fault.
        definition: id of the metric's definition; None where it is not known.
    """

    matched: Matched
    failed: frozenset[int] = field(default_factory=frozenset)
    definition: str | None = None

    @property
    def healthy(self) -> dict[int, float]:
        """Seed -> value of the cells that count in the metric."""
        values = self.matched.values.items()
        return {seed: v for seed, v in values if v is not None and seed not in self.failed}

    @property
    def invalid(self) -> int:
        """Number of cells without a value by a fault of the software."""
        values = self.matched.values.items()
        return sum(v is None and seed not in self.failed for seed, v in values)


def judge(
    rules: Rules,
    baseline: Cells,
    arms: Mapping[str, Cells],
    levels: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """Judges every arm of one run on the primary metric.

    Args:
        arms: all arms of the run, without the baseline.
        levels: arm -> level that the study's error budget gave it; the others have that of `rules`.

    Raises: SettingError for a baseline among the arms or a value that is not finite.
    """
    _check_values(rules.baseline, baseline, arms)
    level = rules.level(max(len(arms), rules.family or 0))
    given = levels or {}
    return [
        _compare(rules, given.get(name, level), name, baseline, cells)
        for name, cells in arms.items()
    ]


def choose_words(
    gain: stats.Array, low: stats.Array, high: stats.Array, sesoi: float
) -> np.ndarray:
    """Chooses among the words by an interval; positive gains are good.

    Args:
        gain, low, high: estimate and ends of the interval.
    """
    decided = ((low > 0) | (high < 0)) & (np.abs(gain) >= sesoi)
    inside = (low > -sesoi) & (high < sesoi)
    conditions = [inside, decided & (gain > 0), decided & (gain < 0)]
    return np.select(conditions, ["equivalent", "helps", "hurts"], "cannot tell yet")


def words_with_failures(
    interval: tuple[stats.Array, stats.Array, stats.Array],
    sesoi: float,
    failures: Failures,
    level: float,
) -> np.ndarray:
    """Chooses among the words by the numbers of failures and by an interval; positive gains are
    good.

    Args:
        interval: estimate and ends, NaN where a side has too few cells.
        failures: the same of all comparisons.
        level: that of the failures, which is the interval's too.
    """
    if failures.any and failures.p <= level:
        return np.full(np.shape(interval[0]), "hurts" if failures.balance > 0 else "helps")
    words = choose_words(*interval, sesoi)
    return np.where(np.isin(words, BARRED[failures.balance]), "cannot tell yet", words)


def compare_secondary(
    metric: str,
    baseline: Cells,
    arms: Mapping[str, Cells],
    alpha: float = 0.05,
    baseline_name: str = "baseline",
) -> list[Difference]:
    """Computes differences of a secondary metric with intervals; it gets no word.

    Raises: MismatchError when the metric was measured by different definitions.
    """
    known = {baseline_name: baseline, **arms}
    check_one_definition(
        metric, {name: c.definition for name, c in known.items() if c.definition is not None}
    )
    return [_difference(metric, name, cells, baseline, alpha) for name, cells in arms.items()]


def _difference(metric: str, name: str, cells: Cells, baseline: Cells, alpha: float) -> Difference:
    blank = Difference(arm=name, metric=metric, n=0, mean_diff=None, low=None, high=None)
    refusal = cells.matched.refusal or baseline.matched.refusal
    one, other = cells.healthy, baseline.healthy
    if refusal or not (one and other):
        return replace(blank, reason=refusal or "no cell of one side has a value")
    mean = float(np.mean(list(one.values())) - np.mean(list(other.values())))
    if min(len(one), len(other)) < 2:
        reason = "one cell has no interval"
        return replace(blank, n=len(one), mean_diff=mean, reason=reason)
    effect = estimate_by_seed(one, other, slope_variance(cells.matched, baseline.matched))
    low, high = effect.interval(alpha)
    return replace(blank, n=len(one), mean_diff=mean, low=float(low), high=float(high))


# ------------------------------------------------------------------------------- one comparison


def _compare(rules: Rules, level: float, name: str, baseline: Cells, cells: Cells) -> Comparison:
    blank = Comparison(
        arm=name,
        metric=rules.primary,
        level=level,
        sesoi=rules.sesoi,
        exploratory=rules.exploratory,
        against=rules.baseline,
    )
    if refusal := _refusal(cells, baseline):
        return replace(blank, reason=refusal)
    one, other = cells.healthy, baseline.healthy
    failures = Failures(
        arm=len(cells.failed),
        of_arm=len(cells.failed) + len(one),
        baseline=len(baseline.failed),
        of_baseline=len(baseline.failed) + len(other),
    )
    if failures.any:
        blank = replace(
            blank,
            level=level / 2,
            failures=str(failures),
            p_failures=failures.p,
            balance=failures.balance,
        )
    if min(len(one), len(other)) < 2 and failures.p > blank.level:
        reason = _too_few(cells, baseline, failures)
        return replace(blank, n=len(one), n_baseline=len(other), reason=reason)
    shared = sum(seed in other for seed in one)
    done = replace(blank, n=len(one), n_baseline=len(other), n_shared=shared)
    effect = None
    if min(len(one), len(other)) >= 2:
        extra = slope_variance(cells.matched, baseline.matched)
        effect = estimate_by_seed(one, other, extra)
        done = _with_numbers(done, effect)
    done = replace(done, word=_word(done, rules, failures))
    if done.word == "cannot tell yet" and effect is not None and not failures.balance:
        done = replace(done, needed_seeds=seeds_to_tell(effect, rules.sesoi, done.level))
    return replace(done, reason=_reason(done, rules, failures, cells, baseline))


def _with_numbers(blank: Comparison, effect: Effect) -> Comparison:
    low, high = effect.interval(blank.level)
    return replace(
        blank,
        mean_diff=float(effect.mean),
        low=float(low),
        high=float(high),
        se=float(effect.se),
        se_l0=math.sqrt(float(effect.extra)),
        p=float(effect.p),
        correlation=float(effect.correlation),
        spread=float(effect.pair_sd),
        detectable=stats.detectable_ratio(float(effect.df), blank.level, POWER) * float(effect.se),
    )


def _word(done: Comparison, rules: Rules, failures: Failures) -> Word:
    """Chooses the word of one comparison."""
    numbers = (done.mean_diff, done.low, done.high)
    values = np.array([math.nan if x is None else rules.sign * x for x in numbers])
    interval = (values[0], *np.sort(values[1:]))
    return cast(Word, str(words_with_failures(interval, rules.sesoi, failures, done.level)))


def seeds_to_tell(effect: Effect, sesoi: float, level: float) -> int | None:
    """Number of seeds of both sides that could decide a comparison, if the spread stays as it is.

    The first of these that exceeds the present number: seeds for 80% power both to find an effect
    of sesoi and to show that there is none; seeds to find an effect as large as the estimated one.
    None when neither can be stated, or where the L0 is what is uncertain.
    """
    present = min(effect.n[:2])
    if float(effect.extra) > float(effect.variance):
        return None
    sd = float(effect.pair_sd)
    parts = (
        stats.pairs_needed(sd, sesoi, level, POWER),
        stats.pairs_needed_equivalence(sd, sesoi, level / 2, POWER),
    )
    planned = None if None in parts else max(part for part in parts if part is not None)
    estimate = abs(float(effect.mean))
    observed = stats.pairs_needed(sd, estimate, level, POWER) if estimate >= sesoi else None
    return next((n for n in (planned, observed) if n is not None and n > present), None)


# ----------------------------------------------------------------------------------- in sentences


def _refusal(cells: Cells, baseline: Cells) -> str:
    """Says why no comparison is made; '' where one is."""
    known = baseline.definition if cells.healthy else None
    if known is not None and (text := other_definition(cells.definition, known)):
        return text
    return cells.matched.refusal or baseline.matched.refusal


def _too_few(cells: Cells, baseline: Cells, failures: Failures) -> str:
    counts = f"{count(len(cells.healthy), 'healthy cell')} and {len(baseline.healthy)} of the other"
    invalid = cells.invalid + baseline.invalid
    parts = [f"{invalid} excluded as invalid or missing"] if invalid else []
    parts += [f"{failures} ({stats.format_p_sentence(failures.p)})"] if failures.any else []
    why = "".join(f", {part}" for part in parts)
    return f"{counts}{why}: two on each side are needed, so fix those cells or add seeds"


def _reason(c: Comparison, rules: Rules, failures: Failures, cells: Cells, baseline: Cells) -> str:
    """Sentence with the numbers behind the word."""
    parts = [_difference_text(c)]
    if c.p is not None:
        parts.append(f"{stats.format_p_sentence(c.p)} at level {c.level:.2g}")
    if c.word == "equivalent":
        parts.append(f"an effect of {c.sesoi:g} is excluded{_leaning(c, rules)}")
    if c.word == "cannot tell yet":
        parts.append(_open_text(c, failures))
    if failures.any:
        parts.append(f"{failures} ({stats.format_p_sentence(failures.p)})")
    if invalid := cells.invalid + baseline.invalid:
        parts.append(f"{count(invalid, 'cell')} excluded as invalid or missing")
    parts.append(_l0_text(cells.matched, baseline.matched))
    return "; ".join(part for part in parts if part)


def _difference_text(c: Comparison) -> str:
    if c.mean_diff is None:
        return f"{c.metric} has no number on one side"
    span = f"[{c.low:.4g}, {c.high:.4g}]"
    counts = f"{count(c.n, 'cell')} and {c.n_baseline}, {count(c.n_shared, 'seed')} in common"
    return f"{c.metric} differs by {c.mean_diff:+.4g} {span} over {counts}"


def _leaning(c: Comparison, rules: Rules) -> str:
    """Names the direction of an effect that is too small to matter."""
    if c.low is None or c.high is None or c.low <= 0 <= c.high:
        return ""
    good = rules.sign * c.low > 0
    return f", though a smaller one {'for the better' if good else 'for the worse'} is there"


def _open_text(c: Comparison, failures: Failures) -> str:
    if failures.balance:
        more = "the arm" if failures.balance > 0 else "the baseline"
        return f"more cells of {more} failed, so that its survivors can't decide"
    if c.needed_seeds is not None:
        return f"with this spread {count(c.needed_seeds, 'seed')} could decide"
    if c.sesoi == 0:
        return "no smallest effect of interest is declared, so none can be excluded"
    return f"the number of seeds that could decide is unknown (or above {stats.MOST_PAIRS})"


def _l0_text(arm: Matched, baseline: Matched) -> str:
    """Says what the correction of L0 adds to the uncertainty, where it is not negligible."""
    if "unknown" in (arm.origin, baseline.origin) and slope_variance(arm, baseline) > 0:
        return "the interval is wider since no further levels say how the metric changes with L0"
    return ""


def _check_values(name: str, baseline: Cells, arms: Mapping[str, Cells]) -> None:
    if name in arms:
        remedy = "the baseline is not one of the arms: leave it out"
        raise SettingError("arms", name, remedy)
    for arm, cells in {name: baseline, **arms}.items():
        for seed, value in cells.matched.values.items():
            if value is not None and not math.isfinite(value):
                raise SettingError(f"{arm}, seed {seed}", value, "a missing number must be None")
