"""Agreement between the seeds of each arm with its interval, in words, from a run's numbers."""

from __future__ import annotations

from saelab.report.figures.style import legend_name
from saelab.report.run_data import Run
from saelab.runs.schema import PAIR
from saelab.verdict.agreement import Agreement, agreement, coverage_text


def agreements(run: Run, metric: str) -> dict[str, Agreement]:
    """Arm -> mean over the pairs of its seeds at the target L0; arms without pairs are left out."""
    pairs: dict[str, dict[tuple[int, int], float]] = {}
    for name, slice in run.values:
        if name == metric and slice.startswith(PAIR):
            other = int(slice.removeprefix(PAIR))
            for arm, values in run.at_target(name, slice).items():
                for v in values:
                    if v.value is not None:
                        both = (min(v.seed, other), max(v.seed, other))
                        pairs.setdefault(arm, {})[both] = v.value
    results = {arm: agreement(pairs[arm]) for arm in run.arms if arm in pairs}
    return {arm: result for arm, result in results.items() if result is not None}


def agreements_text(run: Run, metric: str) -> str:
    """'; 98.3% intervals by the jackknife over seeds: baseline 0.590 to 0.610'; '' without any."""
    parts = [
        f"{legend_name(arm)} {result.low:.3f} to {result.high:.3f}"
        for arm, result in agreements(run, metric).items()
        if result.low is not None and result.high is not None
    ]
    return f"; {coverage_text()} intervals by the jackknife over seeds: {', '.join(parts)}" * bool(
        parts
    )
