"""The difference of any two arms of a finished run at the declared L0, from its files.

The verdict compares arms with the baseline; what an arm isolates may show against another arm (an
adapting threshold against the same one driven by a foreign context). Such a difference gets no
word, since it is not in the family of comparisons that was declared.
"""

from __future__ import annotations

from pathlib import Path

from saelab.errors import SettingError, SourceError, nearest
from saelab.runs.folder import INFO, RunFolder
from saelab.runtime.counting import count
from saelab.verdict.final_info import cells_at_target
from saelab.verdict.judge import Difference, compare_secondary
from saelab.verdict.review import judge_files


def difference(folder: Path, arm: str, other: str, metric: str = "fvu") -> Difference:
    """Computes arm - other at the declared L0, as the verdict does.

    Args:
        folder: of the run.
        metric: its name in final_info.json.

    Raises: SourceError when the run is not complete; DamageError for a file that can't be read or
        was changed; SettingError for an unknown arm or metric;
        MismatchError when the two were measured by different definitions.
    """
    run = RunFolder(folder)
    if not run.has(INFO):
        raise SourceError(f"{folder} holds no final_info.json: name the folder of a complete run")
    _ = run.info  # which must be as it was written
    judged = judge_files(run)
    for name in (arm, other):
        if name not in judged.arms:
            names = f"the run has {', '.join(judged.arms)}"
            remedy = f"no such arm{nearest(name, judged.arms)}; {names}"
            raise SettingError("arm", name, remedy)
    both = [judged.arms[name].definitions for name in (arm, other)]
    common = [name for name in both[0] if name in both[1]]
    if metric not in common:
        remedy = f"not measured in both{nearest(metric, common)}; both have {', '.join(common)}"
        raise SettingError("metric", metric, remedy)
    cells = cells_at_target(judged.arms, other, metric, judged.plan)
    return compare_secondary(metric, cells[other], {arm: cells[arm]}, baseline_name=other)[0]


def difference_line(result: Difference, arm: str, other: str) -> str:
    """One line of text: the mean difference with its interval, or the reason why it is missing."""
    title = f"{arm} - {other}, {result.metric}"
    if result.low is None or result.high is None or result.mean_diff is None:
        return f"{title}: {result.reason}"
    interval = f"95% interval {result.low:+.4f} to {result.high:+.4f}, {count(result.n, 'cell')}"
    return f"{title}: {result.mean_diff:+.4f}  ({interval})"
