"""Arms over several settings (model, layer, width, text), and in a setting that is not there yet.

With effects y_1 .. y_k of k settings, which have standard errors e_i and are taken as a sample of
settings like them, m = mean(y), s = standard deviation of y (ddof 1), and t = t(k-1, 1 - level/2):

    over these settings   m +- t s / sqrt(k)             Hartung and Knapp's interval
    for a new setting     m +- t s sqrt(1 + 1/k)         prediction interval
    heterogeneity         tau by Paule and Mandel, Q = sum w_i (y_i - y_w)^2 with w_i = 1 / e_i^2,
                          I^2 = max(0, 1 - (k-1) / Q)

What is uncertain about moving cells to the declared L0 may be the same error in all settings, which
no spread between them shows. So the mean of its standard errors is added to both, as in `effect`.

Every setting has the same weight. Then the first interval is the one-sample t interval, which keeps
its level for normal effects of any, unequal variances (Bakirov and Szekely 2006; Ibragimov and
Mueller 2010); weights 1 / (tau^2 + e_i^2) from few cells lose coverage, and gain little width
(docs/decisions/0015). The second one covers the effect that would be measured in a new setting, and
so the true one, which varies less.

Each interval gives a word by `judge.choose_words`. Fewer than three settings with a number give
none. An arm of whose cells a larger share failed in some setting can't win by its survivors here
either, as in one setting.

Source: Paule and Mandel 1982; Hartung and Knapp 2001; Q, I^2 and tau are computed by statsmodels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np

from saelab.runtime.counting import count
from saelab.stats import ROUNDING, Array
from saelab.verdict.judge import BARRED, Comparison, Direction, Word, choose_words

#: Settings with a number from which on there is a general word.
FEWEST_SETTINGS = 3
#: Most settings that are recommended. Our choice.
MOST_NEEDED = 100


@dataclass(frozen=True, kw_only=True)
class SettingEffect:
    """Comparison of an arm in one setting; missing numbers are None and `reason` says why.

    Args:
        setting: its name.
        word: in this setting.
        mean_diff, low, high, se, se_l0: as in `Comparison`.
        n, n_baseline: healthy cells of both sides.
        reason: one sentence.
    """

    setting: str
    word: Word
    mean_diff: float | None = None
    low: float | None = None
    high: float | None = None
    se: float | None = None
    se_l0: float = 0.0
    n: int = 0
    n_baseline: int = 0
    reason: str = ""

    @property
    def has_number(self) -> bool:
        return self.mean_diff is not None and self.se is not None


@dataclass(frozen=True, kw_only=True)
class AcrossSettings:
    """One arm over all settings of a run; numbers are None with too few settings.

    Args:
        arm, metric, against: as in `Comparison`.
        settings: the arm in each setting.
        n: settings with a number.
        level: 1 - coverage of both intervals.
        sesoi: smallest effect of interest.
        mean, low, high: mean effect and its interval.
        new_low, new_high: prediction interval of a new setting.
        tau: standard deviation of true effects between settings.
        i2: share of the spread between settings that the cells do not explain.
        p_same: p of equal true effects in all settings.
        mean_word, word: over these settings, and for a new setting.
        needed_settings: for 'cannot tell yet', settings that could decide, if effects vary as they
            do; None where more would not help.
        reason: one sentence with the numbers.
        exploratory: false only for the confirmatory run.
    """

    arm: str
    metric: str
    against: str = "baseline"
    settings: tuple[SettingEffect, ...] = ()
    n: int = 0
    level: float
    sesoi: float
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    new_low: float | None = None
    new_high: float | None = None
    tau: float | None = None
    i2: float | None = None
    p_same: float | None = None
    mean_word: Word = "refused"
    word: Word = "refused"
    needed_settings: int | None = None
    reason: str = ""
    exploratory: bool = True

    @property
    def missing(self) -> list[SettingEffect]:
        """Settings without a number."""
        return [one for one in self.settings if not one.has_number]

    def means(self) -> dict[str, float | str | None]:
        """Entries of `final_info.json`: the general word and mean take the places of those of a
        single setting."""
        metric = self.metric
        return {
            f"verdict.{metric}": self.word,
            f"verdict_over_settings.{metric}": self.mean_word,
            **{f"verdict.{metric}.{one.setting}": one.word for one in self.settings},
            f"diff.{metric}": self.mean,
            f"diff.{metric}.low": self.low,
            f"diff.{metric}.high": self.high,
            f"prediction.{metric}.low": self.new_low,
            f"prediction.{metric}.high": self.new_high,
            f"tau.{metric}": self.tau,
            **({"needed_settings": self.needed_settings} if self.needed_settings else {}),
        }

    def means_of_base(self) -> dict[str, float | str | None]:
        """Entries of the plan's own base alone, as a run without further settings has them."""
        base = self.settings[0]
        return {
            f"verdict.{self.metric}": base.word,
            f"diff.{self.metric}": base.mean_diff,
            f"diff.{self.metric}.low": base.low,
            f"diff.{self.metric}.high": base.high,
        }


def general_comparisons(
    comparisons: Sequence[Comparison], across: Sequence[AcrossSettings]
) -> list[Comparison]:
    """Comparisons of the plan's own base, each with the general word and prediction interval of its
    arm where there is one; a decision follows from these."""
    by_arm = {a.arm: a for a in across if a.mean is not None}
    return [
        replace(
            c,
            mean_diff=a.mean,
            low=a.new_low,
            high=a.new_high,
            level=a.level,
            word=a.word,
            needed_seeds=None,
            reason=a.reason,
        )
        if (a := by_arm.get(c.arm))
        else c
        for c in comparisons
    ]


def read_across(stored: Sequence[Mapping[str, Any]]) -> list[AcrossSettings]:
    """Reads what a manifest holds, see `runs.folder`; fields of other versions are left out."""
    found = []
    for one in stored:
        effects = tuple(
            SettingEffect(**_fields_of(SettingEffect, each)) for each in one["settings"]
        )
        known: dict[str, Any] = _fields_of(AcrossSettings, one) | {"settings": effects}
        found.append(AcrossSettings(**known))
    return found


def _fields_of(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in stored.items() if name in names}


@dataclass(frozen=True, eq=False)
class Intervals:
    """Mean effect and half widths of its interval and of the prediction interval; arrays [...]."""

    mean: Array
    half: Array
    new_half: Array


def intervals(effects: Array, level: float, shared: float = 0.0) -> Intervals:
    """Computes both intervals of coverage 1 - level from effects [..., k] of two or more settings.

    Args:
        shared: standard deviation of an error that all effects have in common.
    """
    k = effects.shape[-1]
    mean, variance = effects.mean(axis=-1), effects.var(axis=-1, ddof=1)
    flat = variance <= (ROUNDING * np.abs(effects).max(axis=-1)) ** 2
    variance = np.where(flat, 0.0, variance)
    undecided = flat & (shared == 0) & (2.0 ** (1 - k) >= level)  # as cells without any spread
    least = np.where(undecided, np.abs(mean), 0.0)
    half, new_half = (
        np.maximum(least, _half(share * variance, k - 1, level, shared**2))
        for share in (1 / k, 1 + 1 / k)
    )
    return Intervals(mean, half, new_half)


def _half(variance: Array, df: int, level: float, extra: float) -> Array:
    """Half width of an interval; the further variance is no estimate: with it df grows."""
    from scipy.special import stdtrit

    scale = np.where(variance > 0, variance, 1.0)
    more = np.where(variance > 0, df * ((variance + extra) / scale) ** 2, math.inf)
    return stdtrit(np.minimum(more, 1e6), 1 - level / 2) * np.sqrt(variance + extra)


@dataclass(frozen=True)
class Heterogeneity:
    """Differences between settings that the cells do not explain, see `AcrossSettings`."""

    tau: float
    i2: float
    p_same: float


def heterogeneity(effects: Sequence[float], errors: Sequence[float]) -> Heterogeneity:
    """Estimates how much true effects differ between two or more settings.

    Args:
        errors: standard errors; one of 0, as of cells without any spread, is taken as rounding.
    """
    from scipy.special import chdtrc

    y, scale = np.array(effects), max(map(abs, effects))
    v = np.maximum(np.square(errors), (1e-6 * scale) ** 2)
    if not v.max() > 0 or np.ptp(y) <= ROUNDING * scale:
        return Heterogeneity(0.0, 0.0, 1.0)
    from statsmodels.stats.meta_analysis import combine_effects

    unit = float(np.sqrt(v.mean()))  # numbers of about 1, whatever the metric's unit
    fit: Any = combine_effects(y / unit, v / unit**2, method_re="iterated")
    q, df = float(fit.q), len(y) - 1
    i2 = max(0.0, 1 - df / q) if q > 0 else 0.0
    return Heterogeneity(unit * math.sqrt(fit.tau2), i2, float(chdtrc(df, q)))


def judge_across(
    comparisons: Mapping[str, Sequence[Comparison]],
    direction: Direction,
    levels: Mapping[str, float] | None = None,
) -> list[AcrossSettings]:
    """Judges every arm over the settings.

    Args:
        comparisons: setting -> comparisons of its run; the first setting names the arms.
        levels: arm -> level that the study's error budget gave its general word; the others have
            the smallest one of their settings.
    """
    first = next(iter(comparisons.values()), [])
    by_arm = {
        c.arm: {
            setting: one
            for setting, group in comparisons.items()
            for one in group
            if one.arm == c.arm
        }
        for c in first
    }
    sign = 1.0 if direction == "higher" else -1.0
    return [
        _judge_arm(of_arm, list(comparisons), sign, (levels or {}).get(arm))
        for arm, of_arm in by_arm.items()
    ]


def _judge_arm(
    comparisons: Mapping[str, Comparison], names: Sequence[str], sign: float, level: float | None
) -> AcrossSettings:
    """Judges one arm.

    Args:
        comparisons: of the settings that have one.
        names: of all settings.
        sign: turns a difference into a gain.
        level: of the general word.
    """
    effects = tuple(_effect(name, comparisons.get(name)) for name in names)
    numbers = [one for one in effects if one.has_number]
    measured = [comparisons[one.setting] for one in numbers]
    any_one = next(iter(comparisons.values()))
    blank = AcrossSettings(
        arm=any_one.arm,
        metric=any_one.metric,
        against=any_one.against,
        settings=effects,
        n=len(numbers),
        level=level or min((c.level for c in measured), default=any_one.level),
        sesoi=any_one.sesoi,
        exploratory=any_one.exploratory,
    )
    if len(numbers) < FEWEST_SETTINGS:
        return replace(blank, reason=_too_few(blank))
    y = [cast(float, one.mean_diff) for one in numbers]
    spread = heterogeneity(y, [cast(float, one.se) for one in numbers])
    shared = float(np.mean([one.se_l0 for one in numbers]))
    found = intervals(np.array(y), blank.level, shared)
    barred: set[Word] = {word for c in comparisons.values() for word in BARRED[c.balance]}
    done = replace(
        blank,
        mean=float(found.mean),
        low=float(found.mean - found.half),
        high=float(found.mean + found.half),
        new_low=float(found.mean - found.new_half),
        new_high=float(found.mean + found.new_half),
        tau=spread.tau,
        i2=spread.i2,
        p_same=spread.p_same,
        mean_word=_word(sign * found.mean, found.half, blank.sesoi, barred),
        word=_word(sign * found.mean, found.new_half, blank.sesoi, barred),
    )
    if done.word == "cannot tell yet" and not barred:
        done = replace(done, needed_settings=_settings_to_tell(y, blank, shared))
    return replace(done, reason=_reason(done, bool(barred)))


def _effect(setting: str, c: Comparison | None) -> SettingEffect:
    if c is None:
        return SettingEffect(setting=setting, word="refused", reason="the arm was not compared")
    return SettingEffect(
        setting=setting,
        word=c.word,
        mean_diff=c.mean_diff,
        low=c.low,
        high=c.high,
        se=c.se,
        se_l0=c.se_l0,
        n=c.n,
        n_baseline=c.n_baseline,
        reason=c.reason,
    )


def _word(gain: Array, half: Array, sesoi: float, barred: set[Word]) -> Word:
    word = cast(Word, str(choose_words(gain, gain - half, gain + half, sesoi)))
    return "cannot tell yet" if word in barred else word


def _settings_to_tell(effects: Sequence[float], blank: AcrossSettings, shared: float) -> int | None:
    """First number of settings above the present one at which the prediction interval would give a
    word, if mean and spread stayed as they are; None up to `MOST_NEEDED`."""
    y = np.array(effects, dtype=np.float64)
    mean, variance = np.array([y.mean()]), np.array([y.var(ddof=1)])
    for k in range(len(effects) + 1, MOST_NEEDED + 1):
        half = _half(variance * (1 + 1 / k), k - 1, blank.level, shared**2)
        (word,) = choose_words(mean, mean - half, mean + half, blank.sesoi)
        if word != "cannot tell yet":
            return k
    return None


# ----------------------------------------------------------------------------------- in sentences


def _too_few(a: AcrossSettings) -> str:
    have = count(a.n, "setting")
    text = f"{have} of {len(a.settings)} with a number, and {FEWEST_SETTINGS} are needed for a word"
    return "; ".join([f"{text} over settings: add [[settings]]", *_missing_texts(a)])


def _missing_texts(a: AcrossSettings) -> list[str]:
    return [f"{one.setting} is missing ({one.reason})" for one in a.missing]


def _reason(a: AcrossSettings, barred: bool) -> str:
    """Sentence with the numbers behind both words."""
    parts = [
        f"{a.metric} differs by {a.mean:+.4g} [{a.low:.4g}, {a.high:.4g}] over "
        f"{count(a.n, 'setting')}, and by {a.new_low:.4g} to {a.new_high:.4g} in a new one",
        f"true effects vary by tau = {a.tau:.3g} between settings (I² = {a.i2:.0%}, p of equal "
        f"effects {a.p_same:.3g})",
        *_missing_texts(a),
    ]
    if a.word == "cannot tell yet":
        parts.append(_open_text(a, barred))
    return "; ".join(parts)


def _open_text(a: AcrossSettings, barred: bool) -> str:
    if barred:
        return "more cells of one side failed in some setting, so that its survivors can't decide"
    if a.needed_settings is not None:
        return f"{count(a.needed_settings, 'setting')} could decide, if effects vary as they do"
    return "more settings would not decide, if effects vary as they do"
