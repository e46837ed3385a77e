"""The paired difference of any two arms of a finished run, from its final_info.json.

The verdict compares arms with the baseline; what an arm isolates may show against another arm (an
adapting threshold against the same one driven by a strange context). There is no word for it: it is
not in the family of comparisons that was declared.
"""

from __future__ import annotations

from pathlib import Path

from saelab.errors import SettingError, SourceError, nearest
from saelab.files import read_json
from saelab.study.verdict import Difference, compare_secondary


def difference(folder: Path, arm: str, other: str, metric: str = "fvu") -> Difference:
    """arm - other at the matched L0, over the seeds that both have.

    Args:
        folder: of the run.

    Raises: SourceError when the run is not complete; SettingError for an unknown arm or metric;
        MismatchError when the two were measured by different definitions.
    """
    file = folder / "final_info.json"
    if not file.is_file():
        raise SourceError(f"{folder} holds no final_info.json: name the folder of a complete run")
    info = read_json(file)
    for name in (arm, other):
        if name not in info:
            known = f"the run has {', '.join(info)}"
            raise SettingError("arm", name, f"no such arm{nearest(name, info)}; {known}")
    values = {name: info[name]["final_info_dict"] for name in (arm, other)}
    common = [name for name in values[arm] if name in values[other]]
    if metric not in common:
        remedy = f"not measured in both{nearest(metric, common)}; both have {', '.join(common)}"
        raise SettingError("metric", metric, remedy)
    # an arm's seeds are the first ones of the study, in their order
    by_seed = {name: dict(enumerate(values[name][metric])) for name in values}
    definitions = _definitions(folder / "metrics.parquet", metric, (other, arm))
    own = {arm: by_seed[arm]}
    return compare_secondary(metric, by_seed[other], own, definitions=definitions)[0]


def _definitions(table: Path, metric: str, arms: tuple[str, ...]) -> dict[str, str]:
    """Arm -> definition id of a metric in a run's rows; those that it has not are left out."""
    if not table.is_file():
        return {}
    import pyarrow.parquet as pq

    columns = ["arm", "definition"]
    chosen = [("metric", "==", metric), ("slice", "==", ""), ("arm", "in", arms)]
    rows = pq.read_table(table, columns=columns, filters=chosen).to_pylist()
    return {row["arm"]: row["definition"] for row in rows}
