"""The paired difference of any two arms of a finished run, from its final_info.json.

The verdict compares arms with the baseline; what an arm isolates may show against another arm (an
adapting threshold against the same one driven by a foreign context). Such a difference gets none of
the four words, since it is not in the family of comparisons that was declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, nearest
from saelab.runs.folder import INFO, RunFolder
from saelab.runtime.counting import count
from saelab.verdict.judge import Difference, compare_secondary


def difference(folder: Path, arm: str, other: str, metric: str = "fvu") -> Difference:
    """Computes arm - other at the matched L0, over the seeds that both have.

    Args:
        folder: of the run.
        metric: its name in final_info.json.

    Raises: SourceError when the run is not complete; SettingError for an unknown arm or metric;
        MismatchError when the two were measured by different definitions.
    """
    run = RunFolder(folder)
    if not run.has(INFO):
        raise SourceError(f"{folder} holds no final_info.json: name the folder of a complete run")
    info = run.info
    for name in (arm, other):
        if name not in info:
            names = f"the run has {', '.join(info)}"
            raise SettingError("arm", name, f"no such arm{nearest(name, info)}; {names}")
    values = {name: _values_by_seed(info[name]) for name in (arm, other)}
    common = [name for name in values[arm] if name in values[other]]
    if metric not in common:
        remedy = f"not measured in both{nearest(metric, common)}; both have {', '.join(common)}"
        raise SettingError("metric", metric, remedy)
    # an arm's seeds are the first ones of the study, in their order
    by_seed = {name: dict(enumerate(values[name][metric])) for name in values}
    definitions = _definitions(run, metric, (other, arm))
    own = {arm: by_seed[arm]}
    return compare_secondary(metric, by_seed[other], own, definitions=definitions)[0]


def difference_line(result: Difference, arm: str, other: str) -> str:
    """One line of text: the mean difference with its interval, or the reason why it is missing."""
    title = f"{arm} - {other}, {result.metric}"
    if result.low is None or result.high is None or result.mean_diff is None:
        return f"{title}: {result.reason}"
    interval = f"95% interval {result.low:+.4f} to {result.high:+.4f}, {count(result.n, 'pair')}"
    return f"{title}: {result.mean_diff:+.4f}  ({interval})"


def _values_by_seed(group: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Metric -> its values, seed by seed."""
    return {
        name: values
        for name, values in group.get("final_info_dict", {}).items()
        if isinstance(values, list) and not any(isinstance(v, (str, bool)) for v in values)
    }


def _definitions(run: RunFolder, metric: str, arms: tuple[str, ...]) -> dict[str, str]:
    """Arm -> definition id of a metric in a run's rows; arms without the metric are left out."""
    rows = [row for row in run.metrics if row["metric"] == metric and not row["slice"]]
    return {row["arm"]: row["definition"] for row in rows if row["arm"] in arms}
