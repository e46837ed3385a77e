"""Intervals over documents: against the cluster bootstrap, and what is said without them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from saelab.runs.schema import CellId
from saelab.seeding import numpy_stream
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.judge import Comparison
from saelab.verdict.over_texts import RATIOS, half_width, over_texts

SEEDS, DOCUMENTS = 3, 60
LOSSES = ("loss_tokens", "ce_clean", "ce_zero", "ce_mean", "ce_spliced")


def study(worse: float = 1.02) -> tuple[dict[str, ArmResult], list[dict[str, Any]]]:
    """A baseline and an arm whose error is larger by a factor, that differs between documents."""
    stream = numpy_stream(0, "test over texts")
    tokens = np.ceil(np.exp(stream.normal(5, 0.8, DOCUMENTS)))
    kind = np.exp(0.3 * stream.normal(size=DOCUMENTS))
    factor = 1 + (worse - 1) * (1 + 3 * stream.normal(size=DOCUMENTS))
    arms, rows = {}, []
    for name, f in (("baseline", np.ones(DOCUMENTS)), ("arm", factor)):
        arms[name] = ArmResult(name)
        for seed in range(SEEDS):
            noise = 1 + 0.01 * stream.normal(size=DOCUMENTS)
            sums = {
                "tokens": tokens,
                "error": 0.2 * tokens * kind * f * noise,
                "power": tokens * kind**0.5,
                "active": 32 * tokens * noise,
                "cosine": 0.9 * tokens * noise,
                "loss_tokens": np.where(np.arange(DOCUMENTS) < 40, tokens, 0.0),
            }
            levels = {"ce_clean": 3.0, "ce_zero": 9.0, "ce_mean": 8.0, "ce_spliced": 3.5 * f}
            sums |= {n: sums["loss_tokens"] * kind * level for n, level in levels.items()}
            values = {metric: value_of(metric, sums) for metric in RATIOS}
            measured = [
                {"metric": metric, "value": value, "slice": "", "definition": "core/1"}
                for metric, value in values.items()
            ]
            arms[name].add(CellGate(id=CellId(name, seed, 0.0), expected=(), facts={}), measured)
            for g in range(DOCUMENTS):
                numbers = {n: float(column[g]) for n, column in sums.items()}
                cell = {"arm": name, "seed": seed, "level": 0.0, "cluster": g, "kind": "document"}
                rows.append(cell | numbers)
    return arms, rows


def value_of(metric: str, sums: dict[str, np.ndarray], weight: Any = 1.0) -> float:
    above, below, sign = RATIOS[metric]
    parts = [
        sum(factor * (weight * sums[name]).sum() for name, factor in terms.items())
        for terms in (above, below)
    ]
    ratio = parts[0] / parts[1]
    return ratio if sign > 0 else 1 - ratio


def comparison(metric: str = "fvu", **changes: Any) -> Comparison:
    blank = Comparison(arm="arm", metric=metric, level=0.05, sesoi=0.0, exploratory=True)
    return replace(blank, mean_diff=0.004, low=0.001, high=0.007, **changes)


def bootstrap(rows: list[dict[str, Any]], metric: str, draws: int = 2000) -> np.ndarray:
    """Effects on resampled documents, both arms on the same ones, [draws]."""
    stream = numpy_stream(1, "test over texts")
    counted = range(40) if "ce_spliced" in RATIOS[metric][0] else range(DOCUMENTS)
    weights = stream.multinomial(len(counted), [1 / len(counted)] * len(counted), size=draws)
    means = {}
    for arm in ("arm", "baseline"):
        values = []
        for seed in range(SEEDS):
            own = [
                r for r in rows if (r["arm"], r["seed"]) == (arm, seed) and r["cluster"] in counted
            ]
            columns = {n: np.array([r[n] for r in own]) for n in own[0] if n not in ("arm", "kind")}
            values.append([value_of(metric, columns, w) for w in weights])
        means[arm] = np.mean(values, axis=0)
    return means["arm"] - means["baseline"]


@pytest.mark.parametrize("metric", sorted(RATIOS))
def test_it_is_the_variance_of_the_cluster_bootstrap(metric: str) -> None:
    arms, rows = study()
    (result,) = over_texts([comparison(metric)], arms, rows)
    effects = bootstrap(rows, metric)
    assert result.low is not None and result.high is not None and result.reason == ""
    assert (result.low + result.high) / 2 == pytest.approx(0.004)
    n = result.clusters
    assert n == (40 if "ce_spliced" in RATIOS[metric][0] else DOCUMENTS)
    from scipy.stats import t

    sizes = np.array([row["tokens"] for row in rows[:n]])
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    error = (result.high - result.low) / 2 / t.ppf(0.975, effective - 1)
    # the bootstrap's is too small for few documents, the jackknife's if anything too large
    assert 0.97 < error / (np.std(effects) * math.sqrt(n / (n - 1))) < 1.15
    if metric == "fvu":
        low, high = np.quantile(effects, [0.025, 0.975])
        assert 1 < (result.high - result.low) / (high - low) < 1.3  # t instead of quantiles


@pytest.mark.parametrize("documents", [20, 60, 200])
def test_coverage(documents: int) -> None:
    """95% intervals hold the true effect, which differs between documents of unequal lengths."""
    studies, stream = 2000, numpy_stream(2, "test over texts", documents)
    tokens = np.exp(stream.normal(5, 0.7, (studies, documents)))
    power = tokens * np.exp(0.2 * stream.normal(size=tokens.shape))
    effect = 0.01 + 0.02 * stream.normal(size=tokens.shape)
    base = 0.2 + 0.03 * stream.normal(size=tokens.shape)
    total, z = power.sum(1, keepdims=True), np.zeros_like(power)
    for sign, share in ((1, base + effect), (-1, base)):
        error = share * power
        z += (
            sign
            * error.sum(1, keepdims=True)
            / total
            * (error / error.sum(1, keepdims=True) - power / total)
        )
    estimate = (effect * power).sum(1) / total[:, 0]
    covered = float((np.abs(estimate - 0.01) <= half_width(z, tokens, 0.05)).mean())
    assert 0.93 <= covered <= 0.97


def test_it_is_the_jackknife_over_documents() -> None:
    stream = numpy_stream(3, "test over texts")
    sizes, effect = np.exp(0.5 * stream.normal(size=30)), stream.normal(size=30)
    whole = (sizes * effect).sum() / sizes.sum()
    left = [
        ((sizes * effect).sum() - s * e) / (sizes.sum() - s)
        for s, e in zip(sizes, effect, strict=True)
    ]
    error = math.sqrt(29 / 30 * np.sum((left - np.mean(left)) ** 2))
    from scipy.stats import t

    half = half_width(sizes / sizes.sum() * (effect - whole), sizes, 0.05)
    assert half == pytest.approx(error * t.ppf(0.975, sizes.sum() ** 2 / (sizes**2).sum() - 1))


def test_what_is_said_without_an_interval() -> None:
    arms, rows = study()
    (old,) = over_texts([comparison()], arms, [])
    assert (old.low, old.high) == (None, None) and "no documents.parquet" in old.reason
    assert old.sentence(comparison()).startswith("over texts: no interval, since the run has no")
    (other,) = over_texts([comparison("dead_share")], arms, rows)
    assert other.reason == "dead_share is not made of sums over documents"
    (refused,) = over_texts([replace(comparison(), mean_diff=None)], arms, rows)
    assert refused.reason == "there is no effect"
    no_losses = [{n: None if n in LOSSES else v for n, v in row.items()} for row in rows]
    (lost,) = over_texts([comparison("loss_recovered")], arms, no_losses)
    assert lost.reason == "the cells of arm have no sums of loss_recovered over documents"
    shorter = [row for row in rows if row["arm"] != "arm" or row["cluster"] < 50]
    (mixed,) = over_texts([comparison()], arms, shorter)
    assert mixed.reason == "the cells were measured on other texts"


def test_the_sentence_says_what_was_used_and_where_both_disagree() -> None:
    arms, rows = study()
    (result,) = over_texts([comparison()], arms, rows)
    assert result.low is not None and result.low < 0
    said = result.sentence(comparison())
    assert "(60 documents of one text, one model)" in said
    assert said.endswith(": other texts could turn its direction")
    open_ = replace(comparison(), low=-0.001)
    assert not result.sentence(open_).endswith("direction")


def test_a_failed_cell_counts_on_neither_interval() -> None:
    arms, rows = study()
    (before,) = over_texts([comparison()], arms, rows)
    gate = arms["arm"].gates[2]
    arms["arm"].add(
        CellGate(id=CellId("arm", 2, 0.0), expected=(), facts={"nonfinite_step": 3}), []
    )
    assert arms["arm"].failed == {2} and gate.outcome != "failed"
    (after,) = over_texts([comparison()], arms, rows)
    less = [row for row in rows if (row["arm"], row["seed"]) != ("arm", 2)]
    (without,) = over_texts([comparison()], arms, less)
    assert after == without != before
