"""A finished run's sparse probing by entry: its arms, its controls and the model's own channels.

    mean +- half width of the 95% t interval over the seeds of an arm, at the plan's L0

The summary of a run has means over entries only; whether few latents tell the class of a text is
another question in each of them.
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
from saelab.runs.schema import CONTROL

#: Metrics over all data, shown before the accuracies.
CORE = ("fvu", "l0", "loss_recovered")
#: Accuracies by what follows the prefix ('sae', 'llm') in their names, as they are shown.
ACCURACIES = {
    "top_1_test_accuracy": "k = 1",
    "top_5_test_accuracy": "k = 5",
    "test_accuracy": "full",
}


def by_entry(folder: Path) -> dict[str, Any]:
    """What `shown` prints, as plain data with every seed's value and the run's settings.

    Raises: SourceError when the run is not complete, DamageError when it is not as it was written,
        MismatchError when a metric was not computed by one definition.
    """
    run = RunFolder(folder)
    if not run.has(METRICS, MANIFEST):
        raise SourceError(f"{folder} holds no {METRICS}: name the folder of a complete run")
    manifest, level = run.required("target_l0", "base", "data"), run.target_level
    rows = [r for r in run.metrics if r["arm"].startswith(CONTROL) or r["level"] == level]
    return {"base": manifest["base"], "data": manifest["data"], "rows": list(_summaries(rows))}


def _summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each subject, metric and slice: the whole, and each entry."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        metric, where = row["metric"], row["slice"]
        probed = metric.partition("_")[2] in ACCURACIES
        entry = where.startswith("entry=") and "," not in where
        if (metric in CORE and not where) or (probed and (entry or not where)):
            groups.setdefault((row["arm"], metric, where), []).append(row)
    for metric, named in _definitions(groups.values()).items():
        check_one_definition(metric, named)
    for (arm, metric, where), own in groups.items():
        values = [row["value"] for row in own]
        found = {"subject": arm, "metric": metric, "slice": where, "values": values}
        found["definition"] = own[0]["definition"]
        yield (
            found | _mean(values) | {"reason": next((r["reason"] for r in own if r["reason"]), "")}
        )


def _definitions(groups: Iterable[list[dict[str, Any]]]) -> dict[str, dict[str, str]]:
    """Metric -> who has a number of it -> its definition."""
    found: dict[str, dict[str, str]] = {}
    for row in (row for own in groups for row in own if row["value"] is not None):
        found.setdefault(row["metric"], {})[f"{row['arm']}, seed {row['seed']}"] = row["definition"]
    return found


def _mean(values: Sequence[float | None]) -> dict[str, float | None]:
    """Missing where a seed's value is missing; one seed has no interval."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return {"mean": None, "half_width": None}
    low, high = stats.t_interval(numbers) if len(numbers) > 1 else (None, None)
    half = None if low is None or high is None else float(high - low) / 2
    return {"mean": sum(numbers) / len(numbers), "half_width": half}


def table_lines(found: dict[str, Any]) -> list[str]:
    """Lines of text: metrics over all data, accuracies by entry, and why others are missing."""
    values = {(r["subject"], r["metric"], r["slice"]): r for r in found["rows"]}
    subjects = list(dict.fromkeys(row["subject"] for row in found["rows"]))
    slices = list(dict.fromkeys(r["slice"] for r in found["rows"] if r["slice"]))
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
            own = [values.get((subject, f"{prefix}_{name}", where)) for where in ("", *slices)]
            if any(own):
                probing.append([subject, label, *map(_cell, own)])
    why = dict.fromkeys(f"{r['metric']}: {r['reason']}" for r in found["rows"] if r["reason"])
    return [*align_right(core), "", *align_right(probing), *(["", *why] if why else [])]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return "-"
    half = "" if row["half_width"] is None else f" ±{row['half_width']:.4f}"
    return f"{row['mean']:.4f}{half}"
