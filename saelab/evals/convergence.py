"""Settling of a cell's loss and its scalars, from the log of every step.

    convergence.<scalar>   share of the run after which it stays within 5% of its final value
    drift.<scalar>         its change over the last tenth of the run, in its own unit
    moved.<scalar>         its change from the first step to the last
    convergence.steps      share of the run after which the smoothed loss stays within 2% of its
                           final value

A scalar whose final value is near 0 settles late by that definition: its drift says more then. The
loss is the reconstruction loss; at each step it is the mean over the 2% of the run that end there,
and its final value the mean over the last 5%. It must stay near, because it may pass that value on
the way: a code that starts dense reconstructs well before it is made sparse.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from saelab.evals.base import ALWAYS_NAMED, Row, TrainingLog, missing, number

DEFINITION = "convergence/1"
#: How near is settled: share of a scalar's final value, and of the loss's.
NEAR, NEAR_LOSS = 0.05, 0.02
#: Shares of the run that the loss is smoothed over, and that its final value is the mean of.
SMOOTH, FINAL = 0.02, 0.05
#: Fewest steps whose loss can be smoothed, or looked over for spikes.
FEWEST = 50


def convergence(log: TrainingLog, scalars: Iterable[str] = ()) -> list[Row]:
    """The rows of one finished cell.

    Args:
        scalars: names of its logged scalars that are learned (`saelab.sae.learned_scalars`).
    """
    rows = [_steps(log)]
    for name in dict.fromkeys((*ALWAYS_NAMED, *scalars)):
        column = log.columns.get(name, np.zeros(0))[: log.length].astype(np.float64)
        if len(column) and np.isfinite(column).all() and np.ptp(column) > 0:
            rows += [
                number(f"convergence.{name}", settling_share(column, column[-1]), DEFINITION),
                number(f"drift.{name}", column[-1] - column[_tenth_before(column)], DEFINITION),
                number(f"moved.{name}", column[-1] - column[0], DEFINITION),
            ]
        elif len(column) or name in ALWAYS_NAMED:
            reason = f"{name} does not change" if len(column) else f"the cell has no {name}"
            rows.append(missing(f"convergence.{name}", DEFINITION, reason))
    return rows


def settling_share(values: np.ndarray, final: float, near: float = NEAR) -> float:
    """Share of the run after which values [n] stay within `near` of `final`; 0: from the start."""
    away = np.flatnonzero(np.abs(values - final) > near * abs(final))
    return float(away[-1] + 1) / len(values) if len(away) else 0.0


def smooth(loss: np.ndarray) -> np.ndarray:
    """Averages loss [n] at each step over the `SMOOTH` of the run that ends there."""
    width = max(1, round(SMOOTH * len(loss)))
    sums = np.concatenate([[0.0], loss.cumsum()])
    ends = np.arange(1, len(loss) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def steps_to_final(loss: np.ndarray) -> float:
    """Share of the run after which the smoothed loss [n] stays near its final value."""
    final = float(loss[-max(1, round(FINAL * len(loss))) :].mean())
    return settling_share(smooth(loss), final, NEAR_LOSS)


def _tenth_before(column: np.ndarray) -> int:
    return max(0, len(column) - 1 - len(column) // 10)


def _steps(log: TrainingLog) -> Row:
    if len(log.loss) < FEWEST:
        reason = f"a loss of {log.length} steps is too short to be smoothed (least: {FEWEST})"
        return missing("convergence.steps", DEFINITION, reason)
    return number("convergence.steps", steps_to_final(log.loss), DEFINITION)
