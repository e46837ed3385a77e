"""Verdicts for the page: a sentence for each comparison, and a bar on a shared scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saelab import stats
from saelab.report.figures.axes import NAMES
from saelab.runtime.counting import count
from saelab.study.plan import BASELINE, PlanConfig
from saelab.verdict.across_settings import AcrossSettings
from saelab.verdict.judge import Comparison
from saelab.verdict.over_texts import OverTexts


class Word(NamedTuple):
    """Appearance of a verdict: the sign next to its word, its class in page.css, its meaning."""

    sign: str
    look: str
    meaning: str


WORDS: dict[str, Word] = {
    "helps": Word("▲", "helps", "better than the baseline by at least the smallest effect of"
                  " interest, or fewer of its cells fail"),
    "hurts": Word("▼", "hurts", "worse than the baseline, by the same rule"),
    "equivalent": Word("=", "none", "any difference is smaller than the smallest effect of"
                       " interest"),
    "cannot tell yet": Word("?", "open", "the interval leaves both possible; the number of seeds"
                            " that could decide it is given"),
    "refused": Word("✕", "refused", "no comparison is made; the reason is given next to it"),
}  # fmt: skip

#: Width of a bar's scale over the widest interval. Our choice.
ROOM = 1.12


@dataclass(frozen=True)
class Bar:
    """A difference with its interval, in percent of the width of its box.

    Args:
        low, middle, high: the interval and its middle; None without a comparison.
        zone: stripe of effects that are smaller than the smallest of interest.
        zero: place of no difference.
    """

    low: float | None
    middle: float | None
    high: float | None
    zone: tuple[float, float]
    zero: float = 50.0


def metric_name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def format_signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}".replace("-", "−")


def format_span(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{format_signed(low)} to {format_signed(high)}"


def sentence(c: Comparison, plan: PlanConfig) -> str:
    """States the result of a comparison with effect, interval and pairs."""
    who = c.arm if c.against == BASELINE else f"{c.arm}, against {c.against},"
    name = metric_name(c.metric)
    if c.word == "refused" or c.mean_diff is None:
        return f"{who} is not compared: {c.reason}."
    numbers = f"({_interval_text(c)}, {_cells_text(c)})"
    where = "below" if c.mean_diff < 0 else "above"
    other = "the baseline" if c.against == BASELINE else c.against
    amount = f"{name} is {abs(c.mean_diff):.4f} {where} that of {other} {numbers}"
    if c.word in ("helps", "hurts"):
        return f"{who} {c.word}: {amount}{f'; {c.failures}' if c.failures else ''}."
    if c.word == "equivalent":
        return f"{who} is equivalent: {amount}; an effect of {plan.sesoi:g} is excluded."
    more = (
        f"about {count(c.needed_seeds, 'seed')} would decide it"
        if c.needed_seeds
        else "more seeds would not decide it"
    )
    return f"Cannot tell yet for {who}: {amount}; {more}."


def _interval_text(c: Comparison) -> str:
    return "without interval" if c.low is None else f"interval {format_span(c.low, c.high)}"


def _cells_text(c: Comparison) -> str:
    return f"{c.n} and {count(c.n_baseline, 'cell')}"


def across_row(a: AcrossSettings) -> Mapping[str, Any]:
    """Fields of one arm over all settings: the general word, and the word in each setting."""
    return {
        "arm": a.arm if a.against == BASELINE else f"{a.arm}, against {a.against}",
        **_badge(a.word),
        "mean": _badge(a.mean_word),
        "settings": [{"setting": one.setting, **_badge(one.word)} for one in a.settings],
        "reason": a.reason,
    }


def _badge(word: str) -> dict[str, str]:
    return {"word": word, "sign": WORDS[word].sign, "look": WORDS[word].look}


def bars(comparisons: Sequence[Comparison], sesoi: float) -> list[Bar]:
    """Bars of the comparisons, all on one scale around 0."""
    ends = [
        abs(end) for c in comparisons for end in (c.low, c.high, c.mean_diff) if end is not None
    ]
    reach = ROOM * max([*ends, sesoi, 1e-12])

    def place(value: float | None) -> float | None:
        return None if value is None else round(50 + 50 * value / reach, 2)

    zone = (round(50 - 50 * sesoi / reach, 2), round(50 + 50 * sesoi / reach, 2))
    return [Bar(place(c.low), place(c.mean_diff), place(c.high), zone) for c in comparisons]


def count_words(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Counts the verdicts by word, and adds the meaning and appearance of each word."""
    words = [c.word for c in comparisons]
    return [
        {"word": word, "count": words.count(word), **about._asdict()}
        for word, about in WORDS.items()
    ]


def texts_notes(comparisons: Sequence[Comparison], texts: Sequence[OverTexts]) -> list[str]:
    """Sentences on the intervals over texts: what they are over, or why there are none."""
    pairs = zip(comparisons, texts, strict=True)
    sentences = [f"{c.arm}: {one.sentence(c)}" for c, one in pairs if not one.reason]
    reasons = dict.fromkeys(one.reason for one in texts if one.reason)
    return [*sentences, *(f"No interval over texts: {reason}." for reason in reasons)]


def row(
    c: Comparison, texts: OverTexts, bar: Bar, plan: PlanConfig, comment: str
) -> Mapping[str, Any]:
    """Fields of one line of a verdict table."""
    return {
        "arm": c.arm,
        "against": "" if c.against == BASELINE else c.against,
        "comment": comment,
        "word": c.word,
        "sign": WORDS[c.word].sign,
        "look": WORDS[c.word].look,
        "bar": bar,
        "difference": format_signed(c.mean_diff),
        "interval": format_span(c.low, c.high),
        "over_texts": format_span(texts.low, texts.high),
        "cells": f"{c.n}/{c.n_baseline}",
        "coverage": f"{1 - c.level:.2%}",
        "p": stats.format_p(c.p, missing="–"),
        "correlation": "–" if c.correlation is None else f"{c.correlation:.2f}",
        "detectable": "–" if c.detectable is None else f"{c.detectable:.2g}",
        "needed": c.needed_seeds or "–",
        "reason": c.reason,
        "sentence": sentence(c, plan),
        "exploratory": c.exploratory,
    }
