"""Controls that are as good as an arm, or better, on the primary metric.

A control subject has no trained dictionary, or one that is random. Where it scores as well as an
arm, the arm's score does not show that training found anything, whatever the verdict on the arm's
difference from the baseline is. Means over seeds are compared as they were measured:

    better        the control's mean is better by at least the smallest effect of interest
    as good       it is better, or worse by less than that effect

The A/A twin and the planted effect are left out: they are the trained baseline itself, at other
seeds and worsened by a known amount.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saelab.runs import schema
from saelab.study.plan import PlanConfig
from saelab.verdict.arms import ArmResult


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A control that is as good as an arm on the primary metric, or better.

    Args:
        control, arm: their names.
        metric: the primary metric.
        value, arm_value: means of the control and of the arm.
        l0, arm_l0: mean active latents per token of each; None where it was not measured.
        better: whether the control is better by at least the smallest effect of interest.
    """

    control: str
    arm: str
    metric: str
    value: float
    arm_value: float
    l0: float | None
    arm_l0: float | None
    better: bool


def find_rivals(
    arms: Mapping[str, ArmResult], controls: Sequence[Mapping[str, Any]], plan: PlanConfig
) -> list[Rival]:
    """Lists every control that is as good as an arm or better, by control.

    Args:
        arms: results by arm, the baseline among them.
        controls: rows of the control subjects.
        plan: names the metric, the direction of better values and the smallest effect of interest.
    """
    sign = 1.0 if plan.direction == "higher" else -1.0
    means = {name: (_mean(arm, plan.primary), _mean(arm, "l0")) for name, arm in arms.items()}
    rivals = []
    for name, values in control_values(controls).items():
        value, short = values.get(plan.primary), name.removeprefix(schema.CONTROL)
        if value is None or short in (schema.PLANTED, schema.TWIN):
            continue
        for arm, (mean, l0) in means.items():
            if mean is None:
                continue
            lead = sign * (value - mean)
            if lead > -plan.sesoi:
                rivals.append(
                    Rival(
                        control=short,
                        arm=arm,
                        metric=plan.primary,
                        value=value,
                        arm_value=mean,
                        l0=values.get("l0"),
                        arm_l0=l0,
                        better=lead >= plan.sesoi,
                    )
                )
    return rivals


def rivals_sentence(rivals: Sequence[Rival]) -> str:
    """Says in one sentence which controls are as good as which arms; '' without any."""
    if not rivals:
        return ""
    parts = []
    for control in dict.fromkeys(rival.control for rival in rivals):
        own = [rival for rival in rivals if rival.control == control]
        value = _with_l0(own[0].value, own[0].l0)
        for better, words in ((True, "is better than"), (False, "is as good as")):
            names = [
                f"{r.arm} ({_with_l0(r.arm_value, r.arm_l0)})" for r in own if r.better == better
            ]
            if names:
                parts.append(f"{control} ({value}) {words} {', '.join(names)}")
    return (
        f"CONTROLS AS GOOD AS ARMS: on {rivals[0].metric}, {'; '.join(parts)}: the score of such "
        "an arm does not show that its training found anything"
    )


def control_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Control -> metric -> mean over all data; the model's channels under the names of an SAE."""
    by_control: dict[str, dict[str, list[float]]] = {}
    for name in schema.control_names(rows):
        of_metric = by_control.setdefault(name, {})
        for row in rows:
            if row["arm"] == name and not row["slice"] and row["value"] is not None:
                metric = row["metric"]
                metric = f"sae{metric[3:]}" if metric.startswith("llm_") else metric
                metric = metric.replace("sae_probes_channels_", "sae_probes_")
                of_metric.setdefault(metric, []).append(row["value"])
    return {
        name: {metric: sum(values) / len(values) for metric, values in of_metric.items()}
        for name, of_metric in by_control.items()
    }


def _mean(arm: ArmResult, metric: str) -> float | None:
    numbers = [value for value in arm.metric(metric).values() if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _with_l0(value: float, l0: float | None) -> str:
    return f"{value:.4g}" if l0 is None else f"{value:.4g} at L0 {l0:.3g}"
