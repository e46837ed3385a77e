"""Uncertainty of an effect over documents of the held-out text, next to that over seeds.

A core metric is a ratio of sums over documents, R = sum_g a_g / sum_g b_g. If other documents of
the same kind had been held out, arm and baseline would both have been measured on those. With cells
s of the arm and t of the baseline, all on the same G documents:

    z_g  = mean_s R_s (a_sg / A_s - b_sg / B_s) - mean_t R_t (a_tg / A_t - b_tg / B_t)
    w_g  = z_g / (1 - h_g),   h_g = n_g / sum_g n_g
    V    = (G - 1) / G sum_g (w_g - mean w)^2
    interval   effect +- t(G' - 1) sqrt(V),   G' = 1 / sum_g h_g^2

with n_g the tokens of a document: a few long documents are worth fewer than G equal ones.

This is the jackknife that leaves out one document at a time. It is the cluster bootstrap's variance
for many documents, not too small for few, needs no random numbers and has any coverage; tests hold
it against 2000 resamples, and `saelab.verdict.simulation.intervals` shows its coverage. The effect
is the verdict's, at the declared L0; the correction for L0, and the mean activation in the
variance, are taken as fixed. Seeds are held fixed as well: the interval says what other documents
would change, the one over seeds what other seeds would.

`saelab.evals.text_sums` says what a document is. A metric that is no such ratio has no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saelab.runtime.counting import count
from saelab.stats import Array
from saelab.verdict.arms import ArmResult
from saelab.verdict.judge import Comparison

#: Column -> factor, of the sum above and of the sum below the line.
_Terms = Mapping[str, float]
#: Metric -> both sums, and the sign that the ratio has in it.
RATIOS: dict[str, tuple[_Terms, _Terms, float]] = {
    "fvu": ({"error": 1}, {"power": 1}, 1.0),
    "explained_variance": ({"error": 1}, {"power": 1}, -1.0),
    "mse": ({"error": 1}, {"tokens": 1}, 1.0),
    "cosine": ({"cosine": 1}, {"tokens": 1}, 1.0),
    "l0": ({"active": 1}, {"tokens": 1}, 1.0),
    "loss_recovered": (
        {"ce_zero": 1, "ce_spliced": -1},
        {"ce_zero": 1, "ce_clean": -1},
        1.0,
    ),
    "loss_recovered_mean": (
        {"ce_mean": 1, "ce_spliced": -1},
        {"ce_mean": 1, "ce_clean": -1},
        1.0,
    ),
    "ce_spliced": ({"ce_spliced": 1}, {"loss_tokens": 1}, 1.0),
    "ce_rise": ({"ce_spliced": 1, "ce_clean": -1}, {"loss_tokens": 1}, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class OverTexts:
    """Interval of an arm's effect over documents.

    Args:
        arm, metric: as in the comparison.
        low, high: ends of the interval, with the comparison's coverage; None where `reason` says
            why there is none.
        clusters: number of documents, or contexts.
        kind: 'document' or 'context'.
        reason: '' where there is an interval.
    """

    arm: str
    metric: str
    low: float | None = None
    high: float | None = None
    clusters: int = 0
    kind: str = "document"
    reason: str = ""

    def sentence(self, c: Comparison) -> str:
        """Names the interval, what it is over, and whether it agrees with the one over seeds."""
        if self.low is None or self.high is None:
            return f"over texts: no interval, since {self.reason}"
        span = f"[{self.low:.4g}, {self.high:.4g}]"
        text = f"over texts {span} ({count(self.clusters, self.kind)} of one text, one model)"
        seeds_differ = c.low is not None and c.high is not None and not c.low <= 0 <= c.high
        if seeds_differ and self.low <= 0 <= self.high:
            return f"{text}: other texts could turn its direction"
        return text


def over_texts(
    comparisons: Sequence[Comparison],
    arms: Mapping[str, ArmResult],
    rows: Sequence[Mapping[str, Any]],
) -> list[OverTexts]:
    """Computes the interval over documents of each comparison.

    Args:
        arms: results of each arm.
        rows: of documents.parquet; none in runs of older versions.
    """
    tables = _tables(rows)
    return [_over_texts(c, arms, tables) for c in comparisons]


@dataclass(frozen=True, eq=False)
class _Table:
    """Sums of one cell: column -> [clusters]."""

    kind: str
    sums: Mapping[str, Array]

    def combine(self, terms: _Terms) -> Array:
        return np.sum([factor * self.sums[name] for name, factor in terms.items()], axis=0)


def _tables(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], _Table]:
    """Arm and seed -> sums of the cell at the target."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["seed"]), []).append(row)
    tables = {}
    for key, members in groups.items():
        members.sort(key=lambda row: row["cluster"])
        columns = [n for n, v in members[0].items() if isinstance(v, float) and n != "level"]
        sums = {n: np.array([row[n] for row in members], dtype=np.float64) for n in columns}
        tables[key] = _Table(members[0]["kind"], sums)
    return tables


def _over_texts(
    c: Comparison, arms: Mapping[str, ArmResult], tables: Mapping[tuple[str, int], _Table]
) -> OverTexts:
    blank = OverTexts(arm=c.arm, metric=c.metric, reason=_why_not(c, tables))
    if blank.reason:
        return blank
    sides = [_influences(arms[name], c.metric, tables) for name in (c.arm, c.against)]
    if any(isinstance(side, str) for side in sides):
        return OverTexts(
            arm=c.arm, metric=c.metric, reason=next(s for s in sides if isinstance(s, str))
        )
    one, other = (side for side in sides if not isinstance(side, str))
    if len(one) != len(other):
        return OverTexts(
            arm=c.arm, metric=c.metric, reason="the cells were measured on other texts"
        )
    present = ~(np.isnan(one) | np.isnan(other))
    z, sizes = (one - other)[present], _sizes(c, tables)[present]
    if len(z) < 2:
        return OverTexts(arm=c.arm, metric=c.metric, reason="there is one context")
    assert c.mean_diff is not None
    half = float(half_width(z, sizes, c.level))
    kind = next(iter(tables.values())).kind
    return OverTexts(
        arm=c.arm,
        metric=c.metric,
        low=c.mean_diff - half,
        high=c.mean_diff + half,
        clusters=len(z),
        kind=kind,
    )


def _sizes(c: Comparison, tables: Mapping[tuple[str, int], _Table]) -> Array:
    """Tokens of each document that the metric is measured on, [clusters]."""
    table = next(table for (arm, _), table in tables.items() if arm == c.arm)
    return table.sums[_counted(c.metric)]


def _counted(metric: str) -> str:
    """Column with the number of tokens that a metric is measured on."""
    return "loss_tokens" if "ce_spliced" in RATIOS[metric][0] else "tokens"


def half_width(z: Array, sizes: Array, level: float) -> Array:
    """Half the width of the interval of a sum of influences [..., G] of documents of these sizes
    [..., G]; at least one degree of freedom."""
    from scipy.special import stdtrit

    n, share = z.shape[-1], sizes / sizes.sum(axis=-1, keepdims=True)
    w = z / (1 - share)
    variance = (n - 1) / n * ((w - w.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    effective = 1 / (share**2).sum(axis=-1)
    return stdtrit(np.maximum(effective - 1, 1.0), 1 - level / 2) * np.sqrt(variance)


def _why_not(c: Comparison, tables: Mapping[tuple[str, int], _Table]) -> str:
    """Says why a comparison has no interval over documents; '' where it may have one."""
    if c.mean_diff is None:
        return "there is no effect"
    if c.metric not in RATIOS:
        return f"{c.metric} is not made of sums over documents"
    if not tables:
        return "the run has no documents.parquet (an older version made it)"
    return ""


def _influences(
    arm: ArmResult, metric: str, tables: Mapping[tuple[str, int], _Table]
) -> Array | str:
    """Mean over an arm's healthy cells of what each document adds to the metric, [clusters]; NaN
    for documents on which it was not measured. The reason (a str) where a cell lacks the sums."""
    above, below, sign = RATIOS[metric]
    parts = []
    for seed, value in arm.metric(metric).items():
        if value is None or seed in arm.failed:
            continue
        table = tables.get((arm.name, seed))
        if table is None or not {*above, *below} <= table.sums.keys():
            return f"the cells of {arm.name} have no sums of {metric} over documents"
        a, b = table.combine(above), table.combine(below)
        counted = table.sums[_counted(metric)] > 0
        ratio = value if sign > 0 else 1 - value
        z = sign * ratio * (a / a.sum() - b / b.sum())
        parts.append(np.where(counted, z, np.nan))
    if len({len(part) for part in parts}) > 1:
        return "the cells were measured on other texts"
    return np.mean(parts, axis=0)
