"""The verdict: does an arm move the primary metric against the baseline of the same seeds?

Differences are arm minus baseline, seed by seed. One test is chosen beforehand from the numbers of
pairs and arms (`stats.choose_test`), its p is Holm-adjusted over the family, and then

    helps / hurts   Holm-adjusted p <= alpha, by the sign against the declared direction
    no evidence     otherwise, and an effect worth having is excluded: the equivalence test (TOST)
                    inside +- the smallest effect of interest has p <= alpha
    cannot tell     otherwise, with the number of seeds that could decide it
    refused         no comparison is made: L0 off target, fewer than two pairs, other definitions

A cell that is `invalid` (the software's fault) has the value None and its pair is left out. A cell
that `failed` (the arm's fault: it died, diverged or lost its sparsity) stays and counts against the
arm, because dropping it would leave the survivors only. Its pair enters with its measured number
where that number is against the arm, and otherwise as a loss as large as the largest measured
difference, at least the smallest effect of interest. An arm with a failed cell never gets the word
'helps', and with a loss of unknown size it does not get 'no evidence' either.
The pair of a baseline cell without a value is left out, whatever the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np

from saelab import stats
from saelab.errors import SettingError
from saelab.evals.base import check_one_definition, other_definition
from saelab.runtime.counting import count

Word = Literal["helps", "hurts", "no evidence", "cannot tell", "refused"]
Direction = Literal["lower", "higher"]
Values = Mapping[int, float | None]
Kind = Literal["normal", "skewed", "discrete", "asymmetric"]

#: Variation that the interval covers, printed in every report.
COVERS = "The interval covers SAE initialisation and data order, not other models or texts."
#: Power at which smallest detectable effects and numbers of seeds are stated.
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of an arm with the baseline on the primary metric; missing numbers are None.

    Args:
        arm, metric: the arm, and the metric of the comparison.
        n: pairs that entered, failed ones included.
        mean_diff, low, high: mean of arm - baseline and its t interval, in the metric's unit.
        p, p_holm: of the test that decides, before and after Holm over the family.
        test: 'sign-flip' or 't'; '' when refused.
        sesoi: smallest effect of interest, in the metric's unit.
        detectable: smallest true effect that n pairs of this spread find in 80% of studies
            (t test at alpha, one comparison).
        word: the verdict.
        needed_seeds: for 'cannot tell', pairs that could decide it, see `seeds_to_tell`;
            None where more pairs would not help, as for an arm with a failed cell.
        reason: one sentence with the numbers.
        exploratory: false only for the confirmatory run.
        bca_low, bca_high: BCa bootstrap interval, from 10 pairs.
        against: the arm that it is compared with.
    """

    arm: str
    metric: str
    n: int
    mean_diff: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    test: str = ""
    sesoi: float
    detectable: float | None = None
    word: Word
    needed_seeds: int | None = None
    reason: str = ""
    exploratory: bool
    bca_low: float | None = None
    bca_high: float | None = None
    against: str = "baseline"

    def means(self) -> dict[str, float | str | None]:
        """Entries of `final_info.json` that hold this comparison."""
        return {
            f"verdict.{self.metric}": self.word,
            f"diff.{self.metric}": self.mean_diff,
            f"diff.{self.metric}.low": self.low,
            f"diff.{self.metric}.high": self.high,
            **({"against": self.against} if self.against != "baseline" else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference on a secondary metric: mean of arm - baseline with its 95% t interval."""

    arm: str
    metric: str
    n: int
    mean_diff: float | None
    low: float | None
    high: float | None
    reason: str = ""


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one arm as gains (positive is good), or the reason for no comparison."""

    gains: stats.Array
    measured: bool = True
    failed: int = 0
    losses: int = 0
    excluded: int = 0
    refusal: str = ""

    @property
    def usable(self) -> bool:
        return not self.refusal


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules of a verdict, all of them fixed before anything is measured.

    Args:
        primary: name of the metric.
        direction: of better values.
        sesoi: smallest effect of interest, in the metric's unit; 0 means that none is declared.
        target_l0: L0 of the plan; None leaves sparsity unchecked.
        tolerance: largest relative distance of a cell's L0 from the target.
        alpha: level of the Holm-adjusted test and of the equivalence test.
        family: planned number of comparisons when it is larger than the number of arms.
        exploratory: marks every comparison; false for the confirmatory run.
        baseline: name of the arm that the others are compared with.

    Raises: SettingError for an impossible rule.
    """

    primary: str
    direction: Direction
    sesoi: float
    target_l0: float | None = None
    tolerance: float = 0.05
    alpha: float = 0.05
    family: int | None = None
    exploratory: bool = True
    baseline: str = "baseline"

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher"):
            raise SettingError("direction", self.direction, "say 'lower' or 'higher'")
        if not (math.isfinite(self.sesoi) and self.sesoi >= 0):
            raise SettingError("sesoi", self.sesoi, "a finite number >= 0 is needed")
        if self.target_l0 is not None and not (
            math.isfinite(self.target_l0) and self.target_l0 > 0
        ):
            remedy = "a number of latents per token above 0 is needed"
            raise SettingError("target_l0", self.target_l0, remedy)
        if not 0 < self.tolerance < 1:
            raise SettingError("tolerance", self.tolerance, "a share between 0 and 1 is needed")
        if not 0 < self.alpha < 0.5:
            raise SettingError("alpha", self.alpha, "a level between 0 and 0.5 is needed")

    @property
    def sign(self) -> float:
        """Turns a difference of values into a gain: 1 where higher is better, else -1."""
        return 1.0 if self.direction == "higher" else -1.0

    def blank(self, arm: str) -> Comparison:
        """Builds the comparison of an arm that has no number yet."""
        return Comparison(
            arm=arm,
            metric=self.primary,
            n=0,
            sesoi=self.sesoi,
            word="refused",
            exploratory=self.exploratory,
            against=self.baseline,
        )


def judge(
    rules: Rules,
    baseline: Values,
    arms: Mapping[str, Values],
    l0: Mapping[str, Mapping[int, float]],
    failed: Mapping[str, set[int]] | None = None,
    definitions: Mapping[str, str] | None = None,
) -> list[Comparison]:
    """Judges every arm of one run on the primary metric.

    Args:
        baseline: seed -> value of the baseline; None is an invalid cell.
        arms: arm -> seed -> value; all arms of the run, without the baseline.
        l0: arm -> seed -> L0 (latents per token) at which the value holds; the baseline's under
            its name is checked too when given.
        failed: arm -> seeds whose cell failed by the arm's own fault.
        definitions: arm -> definition id of the metric, the baseline's under its name.

    Raises: SettingError for a baseline among the arms or a value that is not finite.
    """
    _check_values(rules.baseline, baseline, arms)
    m = max(len(arms), rules.family or 0)
    definitions, failed = definitions or {}, failed or {}
    pairs: dict[str, _Pairs] = {}
    for arm, values in arms.items():
        definition, reference = definitions.get(arm), definitions.get(rules.baseline)
        refusal = other_definition(definition, reference) if definitions else ""
        if refusal:
            pairs[arm] = _Pairs(np.zeros(0), refusal=refusal)
        else:
            own = _L0(rules.target_l0, rules.tolerance, l0.get(arm, {}), l0.get(rules.baseline))
            pairs[arm] = _pair(rules, baseline, values, set(failed.get(arm, ())), own)
    usable = [arm for arm in arms if pairs[arm].usable]
    p = {arm: float(stats.chosen_p(pairs[arm].gains, m, rules.alpha)) for arm in usable}
    p_holm = dict(zip(usable, map(float, stats.holm(list(p.values()), m)), strict=True))
    return [
        _compare(
            replace(
                rules.blank(arm), n=len(pairs[arm].gains), p=p.get(arm), p_holm=p_holm.get(arm)
            ),
            pairs[arm],
            rules,
            m,
        )
        for arm in arms
    ]


def choose_words(
    gain: stats.Array, p_holm: stats.Array, p_tost: stats.Array, alpha: float
) -> np.ndarray:
    """Chooses among the four words by mean gain (positive is good), Holm-adjusted p and the
    equivalence test's p."""
    decided = p_holm <= alpha
    conditions = [decided & (gain > 0), decided & (gain < 0), p_tost <= alpha]
    return np.select(conditions, ["helps", "hurts", "no evidence"], "cannot tell")


def compare_secondary(
    metric: str,
    baseline: Values,
    arms: Mapping[str, Values],
    alpha: float = 0.05,
    definitions: Mapping[str, str] | None = None,
) -> list[Difference]:
    """Computes differences of a secondary metric with t intervals; it gets no word.

    Args:
        definitions: arm, and the baseline under its name, -> definition id of the metric.

    Raises: MismatchError when those differ.
    """
    check_one_definition(metric, definitions or {})
    differences = []
    for arm, values in arms.items():
        d = [a - b for a, b in _shared_values(baseline, values).values()]
        if not d:
            reason = "no pair has both values"
            differences.append(
                Difference(
                    arm=arm, metric=metric, n=0, mean_diff=None, low=None, high=None, reason=reason
                )
            )
            continue
        summary = stats.paired_summary(d, alpha)
        reason = "" if summary.n > 1 else "one pair has no interval"
        differences.append(
            Difference(
                arm=arm,
                metric=metric,
                n=summary.n,
                mean_diff=summary.mean,
                low=summary.low,
                high=summary.high,
                reason=reason,
            )
        )
    return differences


# ---------------------------------------------------------------------------------------- pairing


def off_target(l0: float, target: float, tolerance: float) -> str:
    """Describes an L0 outside the tolerance (a relative distance from the target); '' inside."""
    off = abs(l0 / target - 1)
    if off <= tolerance + 1e-9:
        return ""
    return f"{l0:.4g}, {off:.1%} from the target {target:g} (tolerance {tolerance:.0%})"


@dataclass(frozen=True)
class _L0:
    """L0 of the cells of one arm and of the baseline, with the target for both."""

    target: float | None
    tolerance: float
    arm: Mapping[int, float]
    baseline: Mapping[int, float] | None

    def complaint(self, seeds: list[int]) -> str:
        """Reason why these cells can't be compared at equal L0; '' when they can."""
        cells = [("arm", seed, self.arm.get(seed)) for seed in seeds]
        if self.baseline is not None:
            cells += [("baseline", seed, self.baseline.get(seed)) for seed in seeds]
        return next((text for cell in cells if (text := self._off(*cell))), "")

    def _off(self, who: str, seed: int, l0: float | None) -> str:
        if self.target is None:
            return ""
        if l0 is None:
            return f"the {who}'s L0 at seed {seed} is missing: measure it"
        off = off_target(l0, self.target, self.tolerance)
        if not off:
            return ""
        return (
            f"the {who}'s L0 at seed {seed} is {off}: calibrate it, or interpolate over its "
            "sparsity levels to the target"
        )


def _pair(rules: Rules, baseline: Values, values: Values, failed: set[int], l0: _L0) -> _Pairs:
    """Computes gains by seed, of healthy pairs first, then of failed ones; or refuses."""
    both = _shared_values(baseline, values)
    healthy = [seed for seed in both if seed not in failed]
    fallen = sorted(seed for seed in failed if baseline.get(seed) is not None)
    n = len(healthy) + len(fallen)
    excluded = len((set(values) | failed) - set(healthy) - set(fallen))
    if n < 2:
        return _Pairs(np.zeros(n), excluded=excluded, refusal=_too_few_text(n, excluded))
    if complaint := l0.complaint(healthy):
        return _Pairs(np.zeros(n), refusal=complaint)
    gain = {seed: rules.sign * (both[seed][0] - both[seed][1]) for seed in both}
    loss = -max([rules.sesoi, *(abs(gain[seed]) for seed in healthy)])
    known_loss = {seed: gain[seed] for seed in fallen if gain.get(seed, 0.0) < 0}
    measured = bool(healthy or known_loss)
    if not measured:  # nothing but losses of unknown size: only their signs can be tested
        loss = -1.0
    gains = [gain[seed] for seed in healthy] + [known_loss.get(seed, loss) for seed in fallen]
    losses = len(fallen) - len(known_loss)
    return _Pairs(np.array(gains), measured, len(fallen), losses, excluded=excluded)


def _shared_values(baseline: Values, values: Values) -> dict[int, tuple[float, float]]:
    """Seed -> (arm, baseline), in the baseline's order, for seeds where both have a value."""
    return {
        seed: (value, reference)
        for seed, reference in baseline.items()
        if (value := values.get(seed)) is not None and reference is not None
    }


def _too_few_text(n: int, excluded: int) -> str:
    why = f", {excluded} excluded because a cell is invalid or missing" if excluded else ""
    return f"{count(n, 'usable pair')}{why}: two are needed, so fix those cells or add seeds"


# ------------------------------------------------------------------------------------- the verdict


def _compare(blank: Comparison, pairs: _Pairs, rules: Rules, m: int) -> Comparison:
    """Fills in the numbers, the word and the reason of a usable comparison."""
    alpha = rules.alpha
    if blank.p_holm is None:
        return replace(blank, reason=pairs.refusal)
    n = len(pairs.gains)
    p_tost = stats.tost_p(pairs.gains, blank.sesoi) if pairs.measured else np.array(1.0)
    word = cast(Word, str(choose_words(pairs.gains.mean(), np.array(blank.p_holm), p_tost, alpha)))
    if (word == "helps" and pairs.failed) or (word == "no evidence" and pairs.losses):
        word = "cannot tell"
    done = replace(blank, word=word, test=stats.choose_test(n, m, alpha))
    if pairs.measured:
        done = _with_numbers(done, rules.sign * pairs.gains, alpha)
    if word == "cannot tell" and pairs.measured and not pairs.failed:
        needed = seeds_to_tell(stats.paired_summary(pairs.gains, alpha), blank.sesoi, m, alpha)
        done = replace(done, needed_seeds=needed)
    return replace(done, reason=_reason(done, pairs, m))


def _with_numbers(done: Comparison, d: stats.Array, alpha: float) -> Comparison:
    summary = stats.paired_summary(d, alpha)
    sd = summary.sd or 0.0
    bca = stats.bca_interval(d, alpha)
    return replace(
        done,
        mean_diff=summary.mean,
        low=summary.low,
        high=summary.high,
        detectable=stats.smallest_detectable(sd, summary.n, alpha, POWER),
        bca_low=bca[0] if bca else None,
        bca_high=bca[1] if bca else None,
    )


def seeds_to_tell(summary: stats.Paired, sesoi: float, m: int, alpha: float) -> int | None:
    """Number of pairs that could decide the comparison, if the spread stays as it is.

    The first of these that exceeds the present number: pairs for 80% power both to find an effect
    of sesoi and to exclude it when there is none; pairs to find an effect as large as the observed
    one. The test's level is alpha / m, Holm's strictest. None when neither can be stated.
    """
    sd = summary.sd or 0.0
    parts = (
        stats.pairs_needed(sd, sesoi, alpha / m, POWER),
        stats.pairs_needed_equivalence(sd, sesoi, alpha, POWER),
    )
    planned = max((part for part in parts if part is not None), default=None)
    if None in parts:
        planned = None
    observed = stats.pairs_needed(sd, summary.mean, alpha / m, POWER)
    return next((n for n in (planned, observed) if n is not None and n > summary.n), None)


def _reason(c: Comparison, pairs: _Pairs, m: int) -> str:
    """Sentence with the numbers behind the word."""
    parts = [_difference_text(c), f"p = {c.p_holm:.3g} ({c.test}, Holm over {m})"]
    if c.word in ("helps", "hurts") and c.mean_diff is not None and abs(c.mean_diff) < c.sesoi:
        parts.append(f"smaller than the smallest effect of interest, {c.sesoi:g}")
    if c.word == "no evidence":
        parts.append(f"an effect of {c.sesoi:g} is excluded")
    if c.word == "cannot tell":
        parts.append(_open_text(c, pairs))
    if pairs.failed:
        parts.append(_failed_text(pairs))
    if pairs.excluded:
        parts.append(f"{count(pairs.excluded, 'pair')} excluded as invalid or missing")
    return "; ".join(part for part in parts if part)


def _difference_text(c: Comparison) -> str:
    if c.mean_diff is None:
        return f"no number over {count(c.n, 'pair')}"
    span = f"[{c.low:.4g}, {c.high:.4g}]"
    return f"{c.metric} differs by {c.mean_diff:+.4g} {span} over {count(c.n, 'pair')}"


def _open_text(c: Comparison, pairs: _Pairs) -> str:
    if pairs.failed:
        return "an arm with a failed cell can't get the word helps, with any number of seeds"
    if c.needed_seeds is not None:
        return f"with this spread {count(c.needed_seeds, 'seed')} could decide"
    if c.sesoi == 0:
        return "no smallest effect of interest is declared, so none can be excluded"
    return f"the number of seeds that could decide is unknown (or above {stats.MOST_PAIRS})"


def _failed_text(pairs: _Pairs) -> str:
    text = f"{pairs.failed} of {len(pairs.gains)} cells failed and count against the arm"
    if pairs.losses and pairs.measured:
        text += f", {pairs.losses} as losses as large as the largest measured difference"
    return text


def _check_values(baseline_name: str, baseline: Values, arms: Mapping[str, Values]) -> None:
    if baseline_name in arms:
        raise SettingError(
            "arms", baseline_name, "the baseline is not one of the arms: leave it out"
        )
    for name, values in {baseline_name: baseline, **arms}.items():
        for seed, value in values.items():
            if value is not None and not math.isfinite(value):
                raise SettingError(f"{name}, seed {seed}", value, "a missing number must be None")


# -------------------------------------------------------------------------------------- validation
