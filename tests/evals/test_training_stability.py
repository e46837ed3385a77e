"""How steady training was, on logs whose spikes, rises and noise are known."""

from __future__ import annotations

import numpy as np
import pytest

from saelab.evals.training_stability import (
    LARGE,
    detrended_variance,
    gradient_cv,
    rise,
    spikes,
    stability,
)
from saelab.training.cell import Log

N = 1000
U = np.arange(N) / N


def log_of(**columns: np.ndarray) -> Log:
    length = len(next(iter(columns.values())))
    return Log(length, {n: c.astype(np.float32) for n, c in columns.items()}, length)


def shaking(size: float) -> np.ndarray:
    """A loss whose log is size, -size, size, -size, 0 and so on: any 51 of them have the median 0,
    and the median absolute deviation is `size`."""
    return np.exp(size * np.resize([1, -1, 1, -1, 0], N))


@pytest.mark.parametrize(
    ("length", "height", "count"),
    [
        (1, 0.5, 0),  # one hard batch
        (2, 0.5, 0),
        (3, 0.5, 1),
        (12, 0.5, 1),  # one spike, however long
        (3, 0.03, 0),  # 3 MAD
        (3, 0.07, 1),  # 7 MAD, which is no large one
    ],
)
def test_spikes_last_three_steps_and_stand_five_mad_above(
    length: int, height: float, count: int
) -> None:
    logs = np.log(shaking(0.01))
    logs[500 : 500 + length] = height
    assert spikes(np.exp(logs)) == count
    assert spikes(np.exp(logs), LARGE) == (count if height > 0.1 else 0)


def test_spikes_are_counted_at_every_scale_and_beside_a_falling_loss() -> None:
    loss = shaking(0.01) * np.exp(-2 * U)
    for begin in (300, 600, 997):  # the last one ends with the run
        loss[begin : begin + 3] *= 1.5
    loss[100:110] *= 3  # in the warm-up
    assert spikes(loss) == spikes(1e-3 * loss) == 3
    assert spikes(1 / loss) == 0  # a fall is none
    assert spikes(np.ones(N)) == 0


def test_healthy_noise_has_no_spikes() -> None:
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.03, N)
        assert spikes(np.exp(noise - U)) == 0


def test_the_rise_is_of_the_smoothed_loss_above_its_lowest() -> None:
    assert rise(np.exp(-U)) == pytest.approx(0, abs=1e-12)
    step = np.where(U < 0.5, 2.0, 3.0)
    assert rise(step) == pytest.approx(0.5)
    assert rise(7 * step) == pytest.approx(0.5)
    one = np.ones(N)
    one[600] = 3.0  # the mean over 20 steps is 22 / 20
    assert rise(one) == pytest.approx(0.1)
    assert rise(np.where(U < 0.1, 0.1, 1.0)) == pytest.approx(0)  # in the warm-up
    back = np.interp(U, [0, 0.4, 0.6, 0.8, 1], [4, 2, 3, 2, 1])
    assert rise(back) == pytest.approx(0.5, abs=0.06)  # smoothing takes a little off the top


def test_the_detrended_variance_is_of_what_no_cubic_follows() -> None:
    cubic = np.exp(0.3 - 2 * U + U**2 - 0.5 * U**3)
    assert detrended_variance(cubic) == pytest.approx(0, abs=1e-20)
    wave = 0.1 * np.sin(2 * np.pi * 40 * U)  # variance of a sine: half its squared size
    assert detrended_variance(cubic * np.exp(wave)) == pytest.approx(0.005, rel=0.01)
    assert detrended_variance(100 * shaking(0.2)) == pytest.approx(0.8 * 0.04, rel=0.01)
    slow = np.exp(0.1 * np.sin(2 * np.pi * 4 * U))  # slower than any batch's noise
    assert 0.003 < detrended_variance(slow) < 0.005


def test_the_gradients_variation_is_of_the_last_half() -> None:
    norms = np.where(np.arange(N) % 2, 3.0, 1.0)  # mean 2, standard deviation 1
    norms[: N // 2] = 1000
    assert gradient_cv(norms) == pytest.approx(0.5)
    assert gradient_cv(np.zeros(N)) == 0


def test_rows_of_a_finished_cell() -> None:
    log = log_of(**{"loss.reconstruction": shaking(0.2), "grad_norm": np.ones(N)})
    found = {row.metric: row.value for row in stability(log)}
    assert found.pop("stability.detrended") == pytest.approx(0.8 * 0.04, rel=0.01)
    assert found.pop("stability.rise") == pytest.approx(0, abs=1e-6)  # 20 steps are 4 periods
    assert found == {"spikes": 0, "stability.gradient_cv": 0, "stability.nonfinite": 0}


def test_a_stopped_cell_says_so_and_nothing_else() -> None:
    rows = stability(log_of(loss=np.ones(N), grad_norm=np.ones(N)), stopped=120)
    assert {row.metric: row.value for row in rows if row.value is not None} == {
        "stability.nonfinite": 1
    }
    others = [row for row in rows if row.value is None]
    assert len(others) == 4 and all("step 120" in row.reason for row in others)


def test_short_or_missing_columns_have_reasons() -> None:
    rows = stability(log_of(loss=np.ones(20), grad_norm=np.ones(20)))
    assert [row.metric for row in rows if row.value is not None] == ["stability.nonfinite"]
    found = {row.metric: row for row in stability(log_of(loss=np.ones(100)))}
    assert found["spikes"].value == 0
    assert found["stability.gradient_cv"].reason.startswith("0 gradient norms")
