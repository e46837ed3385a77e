"""When scalars and losses settle, on logs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from saelab.evals.convergence import convergence, settling_share, steps_to_final
from saelab.training.cell import Log


def log_of(**columns: np.ndarray) -> Log:
    length = len(next(iter(columns.values())))
    return Log(length, {n: c.astype(np.float32) for n, c in columns.items()}, length)


def test_a_scalar_settles_after_its_last_step_outside_five_percent() -> None:
    values = np.concatenate([np.linspace(0, 1, 60), [1.2], np.ones(39)])
    assert settling_share(values, values[-1]) == pytest.approx(
        0.61
    )  # step 60 is the last one outside
    assert settling_share(np.ones(10), 1.0) == 0
    assert settling_share(np.linspace(1, 0, 100), 0.0) == pytest.approx(
        0.99
    )  # no share of 0 is near it


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_steps_to_the_final_loss(noise: float) -> None:
    u = np.arange(1000) / 1000
    loss = 0.2 + 0.8 * np.exp(-20 * u)  # within 2% of 0.2 from u = log(200) / 20 = 0.265 on
    loss *= np.exp(np.random.default_rng(0).normal(0, noise, 1000))
    assert steps_to_final(loss) == pytest.approx(0.265 + 0.01, abs=0.03)


def test_a_loss_that_only_passes_its_final_value_is_not_there() -> None:
    u = np.arange(1000) / 1000
    loss = np.where(u < 0.1, 0.1, 0.3 - 0.1 * np.minimum(1, (u - 0.1) / 0.6))
    assert 0.6 < steps_to_final(loss) < 0.75


def test_rows_of_a_log() -> None:
    path = np.linspace(0.5, 1.5, 200)
    found = {
        row.metric: row
        for row in convergence(log_of(loss=np.full(200, 0.3), beta=path, tau=np.full(200, 0.5)))
    }
    assert found["convergence.beta"].value == pytest.approx(0.925, abs=0.01)  # 5% of 1.5 is 0.075
    assert found["drift.beta"].value == pytest.approx(0.1, abs=0.002)
    assert found["moved.beta"].value == pytest.approx(1.0)
    assert found["convergence.steps"].value == 0
    assert found["convergence.tau"].reason == "tau does not change"
    assert found["convergence.theta"].reason == "the cell has no theta"
    assert "convergence.alpha" not in found


def test_a_short_log_has_no_smoothed_loss() -> None:
    (steps, *_) = convergence(log_of(loss=np.ones(20)))
    assert steps.metric == "convergence.steps" and "too short" in steps.reason
