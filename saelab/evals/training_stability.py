"""Stability of a cell's training, from the log of every step.

    spikes                   runs of `LASTING` steps or more in which the log loss lies more than 5
                             MAD above its running median
    stability.rise           largest s_t / min_{u <= t} s_u - 1 of the smoothed loss s
    stability.detrended      variance of the log loss around its trend, a cubic in the share of the
                             run, by least squares
    stability.gradient_cv    standard deviation of the gradient's norm over its mean, in the last
                             half of the run
    stability.nonfinite      1 where training stopped at a step that was not finite, else 0

The loss is the reconstruction loss. The first three use the run from `SETTLED` on, since the loss
moves by design before; an arm whose k still falls then, or whose latents are resampled, has
rises by design later too. MADs are of the residuals from the running median, without a factor for
normal data: 5 are 3.4 standard deviations of normal noise. The gate warns only of `LARGE` ones
(10 MAD), which it counts in the same way. A cell that stopped early has only the last row: its log
covers another share of the run.
"""

from __future__ import annotations

import numpy as np

from saelab import stats
from saelab.evals.base import Row, TrainingLog, missing, number
from saelab.evals.convergence import FEWEST, smooth

DEFINITION = "stability/1"
#: Share of the run before which the loss moves by design (warm-up).
SETTLED = 0.2
#: Spikes of the measure, and those the gate warns of: MAD above the running median.
SPIKE, LARGE = 5.0, 10.0
#: Fewest consecutive steps of a spike: one batch alone may be hard.
LASTING = 3
#: Steps of the running median. Our choice: far longer than a spike, far shorter than any run.
WINDOW = 51
#: Degree of the trend. Our choice: it follows warm-up and decay, and no wave shorter than the run.
DEGREE = 3
OF_LOSS = ("spikes", "stability.rise", "stability.detrended")


def stability(log: TrainingLog, stopped: int | None = None) -> list[Row]:
    """Computes the rows of one cell.

    Args:
        log: of its steps.
        stopped: step at which training failed; None for a finished cell.
    """
    nonfinite = number("stability.nonfinite", stopped is not None, DEFINITION)
    if stopped is not None:
        reason = f"training stopped at step {stopped}"
        names = (*OF_LOSS, "stability.gradient_cv")
        return [*(missing(name, DEFINITION, reason) for name in names), nonfinite]
    return [*_of_loss(log), _gradient(log), nonfinite]


def spikes(loss: np.ndarray, factor: float = SPIKE) -> int:
    """Counts the runs of `LASTING` steps or more in which the log of loss [n] is above its running
    median by `factor` MAD."""
    logs = _log(loss)
    padded = np.pad(logs, WINDOW // 2, mode="reflect")  # the last value may belong to a spike
    median = np.median(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), axis=1)
    residual = _settled(logs - median)
    high = np.pad(residual > factor * max(stats.mad(residual), 1e-9), 1).astype(np.int8)
    begins, ends = np.flatnonzero(np.diff(high) > 0), np.flatnonzero(np.diff(high) < 0)
    return int((ends - begins >= LASTING).sum())


def rise(loss: np.ndarray) -> float:
    """Largest rise of the smoothed loss [n] above its running minimum, relative to that."""
    level = _settled(smooth(loss))
    return float((level / np.maximum(np.minimum.accumulate(level), 1e-12)).max() - 1)


def detrended_variance(loss: np.ndarray) -> float:
    """Variance of the log of loss [n] around its trend."""
    logs = _settled(_log(loss))
    trend = np.polynomial.Polynomial.fit(np.arange(len(logs)), logs, DEGREE)
    return float(np.square(logs - trend(np.arange(len(logs)))).mean())


def gradient_cv(norms: np.ndarray) -> float:
    """Standard deviation over mean of the last half of norms [n]; 0 where all are 0."""
    half = norms[len(norms) // 2 :]
    return float(half.std() / half.mean()) if half.any() else 0.0


def _of_loss(log: TrainingLog) -> list[Row]:
    if len(log.loss) < FEWEST:
        reason = f"a loss of {log.length} steps is too short (least: {FEWEST})"
        return [missing(name, DEFINITION, reason) for name in OF_LOSS]
    values = (spikes(log.loss), rise(log.loss), detrended_variance(log.loss))
    return [number(*pair, DEFINITION) for pair in zip(OF_LOSS, values, strict=True)]


def _gradient(log: TrainingLog) -> Row:
    norms = log.columns.get("grad_norm", np.zeros(0))[: log.length].astype(np.float64)
    if len(norms) < FEWEST:
        reason = f"{len(norms)} gradient norms are too few (least: {FEWEST})"
        return missing("stability.gradient_cv", DEFINITION, reason)
    return number("stability.gradient_cv", gradient_cv(norms), DEFINITION)


def _settled(values: np.ndarray) -> np.ndarray:
    return values[int(SETTLED * len(values)) :]


def _log(loss: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(loss, 1e-12))
