"""Losses of the language model in nats, as a run's tables show them next to loss recovered.

For all cells of a run, loss recovered, the rise of the loss and the share of the way from the
random code (`saelab.runs.random_code`) are one scale in three units: the clean loss, that with
zeros and that with the random code are theirs together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saelab import stats
from saelab.runs.random_code import NO_RANDOM_CODE, RANDOM, SHARE
from saelab.verdict.arms import ArmResult

#: Metrics of an arm in the order in which they are shown, and the heading of that table.
OF_ARM = ("ce_spliced", "ce_rise", "loss_recovered", SHARE)
HEADS = ("arm", "loss", "rise", "loss recovered", "from the random code")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a run in nats per held-out token; None where there is none.

    Args:
        clean, zero, random: of the unchanged model, with zeros at the hook, and with the random
            code; the same for all arms.
        arms: arm -> metric of `OF_ARM` -> mean over its valid seeds.
        reason: why `random` is missing, or ''.
    """

    clean: float
    zero: float | None
    random: float | None
    arms: Mapping[str, Mapping[str, float]]
    reason: str = ""

    def line(self) -> str:
        """Names the losses that all arms share."""
        parts = [f"clean {self.clean:.4g}"]
        parts += [] if self.zero is None else [f"with zeros at the hook {self.zero:.4g}"]
        if self.random is None:
            parts.append(f"with the random code missing ({self.reason})")
        else:
            parts.append(f"with the random code (untrained) {self.random:.4g}")
        return f"loss of the language model in nats per token: {', '.join(parts)}"

    def lines(self) -> list[list[str]]:
        """Rows of a table of the arms, after its heading."""
        return [
            [arm, *(f"{values[m]:.4g}" if m in values else "-" for m in OF_ARM)]
            for arm, values in self.arms.items()
        ]


def losses_of_run(
    rows: Sequence[Mapping[str, Any]], arms: Mapping[str, ArmResult] | None = None
) -> Losses | None:
    """Returns the losses of a run; None where its model has none.

    Args:
        rows: of metrics.parquet, with those of `complete_losses`.
        arms: results by arm; None for the losses that they share alone.
    """
    of_text = [row for row in rows if not row["slice"]]
    shared = {
        name: next((row for row in of_text if row["metric"] == name and _has_value(row)), None)
        for name in ("ce_clean", "ce_zero", RANDOM)
    }
    clean, zero, random = (row["value"] if row else None for row in shared.values())
    if clean is None:
        return None
    absent = (row["reason"] for row in of_text if row["metric"] == RANDOM and row["reason"])
    by_arm = {name: _means(arm) for name, arm in (arms or {}).items()}
    return Losses(
        clean=clean,
        zero=zero,
        random=random,
        arms={name: values for name, values in by_arm.items() if values},
        reason="" if random is not None else next(absent, NO_RANDOM_CODE),
    )


def _has_value(row: Mapping[str, Any]) -> bool:
    return row["value"] is not None


def _means(arm: ArmResult) -> dict[str, float]:
    means = {metric: stats.mean_stderr(arm.metric(metric).values())[0] for metric in OF_ARM}
    return {metric: value for metric, value in means.items() if value is not None}
