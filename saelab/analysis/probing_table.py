"""A finished run's sparse probing by entry: its arms, its controls and the model's own channels.

    mean +- half width of the 95% t interval over the seeds of an arm, at the plan's L0

The summary of a run has means over entries only; whether a few latents predict the class of a text
is another question in each entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saelab import stats
from saelab.analysis.saebench import CHANNELS, align_right
from saelab.errors import SourceError
from saelab.evals.base import check_one_definition
from saelab.runs.folder import MANIFEST, METRICS, RunFolder
from saelab.runs.random_code import SHARE, complete_losses
from saelab.runs.schema import CONTROL

#: Metrics over all data, shown before the accuracies.
CORE = ("fvu", "l0", "loss_recovered", "ce_rise", SHARE)
#: Accuracies by what follows the prefix ('sae', 'llm') in their names, as they are shown.
ACCURACIES = {
    "top_1_test_accuracy": "k = 1",
    "top_5_test_accuracy": "k = 5",
    "test_accuracy": "full",
}


def by_entry(folder: Path) -> dict[str, Any]:
    """Sums up a run's probing as plain data: every seed's value, means, and the run's settings.

    Raises: SourceError when the run is not complete, DamageError when it is not as it was written,
        MismatchError when a metric was computed by several definitions.
    """
    run = RunFolder(folder)
    if not run.has(METRICS, MANIFEST):
        raise SourceError(f"{folder} holds no {METRICS}: name the folder of a complete run")
    manifest, level = run.required("target_l0", "base", "data"), run.target_level
    every = complete_losses(run.metrics)
    rows = [r for r in every if r["arm"].startswith(CONTROL) or r["level"] == level]
    return {"base": manifest["base"], "data": manifest["data"], "rows": list(_summaries(rows))}


def _summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields one row for each subject, metric and slice: over all data, and for each entry."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        metric, where = row["metric"], row["slice"]
        probed = metric.partition("_")[2] in ACCURACIES
        entry = where.startswith("entry=") and "," not in where
        if (metric in CORE and not where) or (probed and (entry or not where)):
            groups.setdefault((row["arm"], metric, where), []).append(row)
    for metric, definitions in _definitions(groups.values()).items():
        check_one_definition(metric, definitions)
    for (arm, metric, where), group in groups.items():
        values = [row["value"] for row in group]
        yield {
            **{"subject": arm, "metric": metric, "slice": where, "values": values},
            "definition": group[0]["definition"],
            **_mean(values),
            "reason": next((row["reason"] for row in group if row["reason"]), ""),
        }


def _definitions(groups: Iterable[list[dict[str, Any]]]) -> dict[str, dict[str, str]]:
    """Metric -> cell that has a number of it -> definition of that number."""
    by_metric: dict[str, dict[str, str]] = {}
    for row in (row for group in groups for row in group if row["value"] is not None):
        cells = by_metric.setdefault(row["metric"], {})
        cells[f"{row['arm']}, seed {row['seed']}"] = row["definition"]
    return by_metric


def _mean(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and half width, both None if a seed's value is missing; one seed has no interval."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return {"mean": None, "half_width": None}
    low, high = stats.t_interval(numbers) if len(numbers) > 1 else (None, None)
    half = None if low is None or high is None else float(high - low) / 2
    return {"mean": sum(numbers) / len(numbers), "half_width": half}


def table_lines(data: dict[str, Any]) -> list[str]:
    """Formats `by_entry` as text: metrics over all data, accuracies by entry, and the reasons why
    others are missing."""
    values = {(r["subject"], r["metric"], r["slice"]): r for r in data["rows"]}
    subjects = list(dict.fromkeys(row["subject"] for row in data["rows"]))
    slices = list(dict.fromkeys(r["slice"] for r in data["rows"] if r["slice"]))
    core = [["over all data", *CORE]]
    core += [
        [subject, *(_cell(values.get((subject, metric, ""))) for metric in CORE)]
        for subject in subjects
        if (subject, CORE[0], "") in values
    ]
    head = ["accuracy", "probe", "all entries", *(s.removeprefix("entry=") for s in slices)]
    probing = [head]
    for subject in subjects:
        prefix = "llm" if subject == CHANNELS else "sae"
        for name, label in ACCURACIES.items():
            cells = [values.get((subject, f"{prefix}_{name}", where)) for where in ("", *slices)]
            if any(cells):
                probing.append([subject, label, *map(_cell, cells)])
    why = dict.fromkeys(f"{r['metric']}: {r['reason']}" for r in data["rows"] if r["reason"])
    return [*align_right(core), "", *align_right(probing), *(["", *why] if why else [])]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return "-"
    half = "" if row["half_width"] is None else f" ±{row['half_width']:.4f}"
    return f"{row['mean']:.4f}{half}"
