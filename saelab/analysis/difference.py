"""The paired difference of any two arms of a finished run, from its final_info.json.

The verdict compares arms with the baseline; what an arm isolates may show against another arm (an
adapting threshold against the same one driven by a strange context). There is no word for it: it is
not in the family of comparisons that was declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, SourceError, nearest
from saelab.runs.folder import INFO, RunFolder
from saelab.verdict.judge import Difference, compare_secondary


def difference(folder: Path, arm: str, other: str, metric: str = "fvu") -> Difference:
    """arm - other at the matched L0, over the seeds that both have.

    Args:
        folder: of the run.

    Raises: SourceError when the run is not complete; SettingError for an unknown arm or metric;
        MismatchError when the two were measured by different definitions.
    """
    run = RunFolder(folder)
    if not run.has(INFO):
        raise SourceError(f"{folder} holds no final_info.json: name the folder of a complete run")
    info = run.info
    for name in (arm, other):
        if name not in info:
            known = f"the run has {', '.join(info)}"
            raise SettingError("arm", name, f"no such arm{nearest(name, info)}; {known}")
    values = {name: _lists(info[name]) for name in (arm, other)}
    common = [name for name in values[arm] if name in values[other]]
    if metric not in common:
        remedy = f"not measured in both{nearest(metric, common)}; both have {', '.join(common)}"
        raise SettingError("metric", metric, remedy)
    # an arm's seeds are the first ones of the study, in their order
    by_seed = {name: dict(enumerate(values[name][metric])) for name in values}
    definitions = _definitions(run, metric, (other, arm))
    own = {arm: by_seed[arm]}
    return compare_secondary(metric, by_seed[other], own, definitions=definitions)[0]


def _lists(group: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """The values of each metric, seed by seed."""
    found = group.get("final_info_dict", {}).items()
    return {
        name: values
        for name, values in found
        if isinstance(values, list) and not any(isinstance(v, (str, bool)) for v in values)
    }


def _definitions(run: RunFolder, metric: str, arms: tuple[str, ...]) -> dict[str, str]:
    """Arm -> definition id of a metric in a run's rows; arms without the metric are left out."""
    rows = [row for row in run.metrics if row["metric"] == metric and not row["slice"]]
    return {row["arm"]: row["definition"] for row in rows if row["arm"] in arms}
