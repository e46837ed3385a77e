"""Numbers of a binary probe on its test rows, to the last bit those of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers of one probe on the test rows.

    Args:
        accuracy, f1, auc: on the test rows; F1 is the mean over classes weighted by their rows.
        validation_auc: mean over the folds, for the setting that was chosen.
        fits: regressions and networks that were fitted.
        stopped: those that ended at the limit of iterations.
    """

    accuracy: float
    f1: float
    auc: float
    validation_auc: float
    fits: int = 0
    stopped: int = 0


def area(y: Array, scores: Array) -> float:
    """Returns the area under the ROC curve; NaN where all rows have one class.

    The corners of the curve and the sum over them are scikit-learn's, so that areas that tie there
    tie here: the first of the largest areas chooses C.

    Args:
        y: [n], 0 or 1.
        scores: float64 [n].
    """
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], np.cumsum(y[order], dtype=np.float64)
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(y) - 1)
    true = positive[ends]
    false = 1.0 + ends - true
    if true[-1] == 0 or false[-1] == 0:
        return float("nan")
    if len(ends) > 2:
        corner = np.concatenate(
            [[True], (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0), [True]]
        )
        true, false = true[corner], false[corner]
    rates = np.concatenate([[0.0], true]) / true[-1]
    steps = np.diff(np.concatenate([[0.0], false]) / false[-1])
    return float((steps * (rates[1:] + rates[:-1]) / 2.0).sum())


def weighted_f1(y: Array, predicted: Array) -> float:
    """Returns the mean of both classes' F1, weighted by their rows; 0 for a class without any."""
    total = 0.0
    for label in (0, 1):
        rows, chosen = y == label, predicted == label
        both = int((rows & chosen).sum())
        if both:
            total += int(rows.sum()) * 2 * both / int(rows.sum() + chosen.sum())
    return total / len(y)
