"""The L0 controller on simulated plants, whose response to the coefficient is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from saelab.parts.base import Dims, Pass
from saelab.parts.controllers.l0_target import SHORT, L0Target, L0TargetConfig
from saelab.training.optim import TrainConfig

TARGET = 32.0
#: Share of the run in which the learning rate falls.
DECAY = 0.4
#: Spread of log L0 between batches of 512 rows of the embedded model.
NOISE = 0.02


@dataclass(frozen=True)
class Plant:
    """Answer of log L0 to the logarithm of the coefficient c, at a full learning rate and in steps
    of a run of SHORT steps; all of it slows down with the learning rate.

    Args:
        lag: steps after which log L0 has followed by 1 - 1/e; 0 for an integrator.
        strength: change of log L0 per change of log c in the end; of an integrator, per step.
        rise: change of the log of the holding coefficient while the learning rate falls to 0: 0.14
            to 0.31 in cells of the embedded model.
    """

    lag: float
    strength: float
    rise: float

    def step(self, log_l0: float, log_c: float, rate: float) -> float:
        """Returns the next log L0 relative to the target."""
        missing = math.log(0.08) + self.rise * (1 - rate) - log_c
        if not self.lag:
            return log_l0 + rate * self.strength * math.tanh(missing)
        return log_l0 + rate * (self.strength * missing - log_l0) / self.lag


PLANTS = {
    "weights": Plant(20, 1.0, 0.3),
    "weights that need no rise": Plant(20, 1.0, 0.0),
    "slow weights": Plant(60, 1.0, 0.3),
    "weights that answer little": Plant(100, 0.7, 0.2),
    "thresholds": Plant(0, 0.03, 0.15),
    "slow thresholds": Plant(0, 0.01, 0.3),
}


def errors(plant: Plant, steps: int, seed: int, **settings: Any) -> np.ndarray:
    """Log L0 relative to the target at every step, without the batches' noise; [steps]."""
    rng = np.random.default_rng(seed)
    schedule = TrainConfig(tokens=steps, batch_size=1, decay=DECAY)
    config = L0TargetConfig(target=TARGET, **settings)
    controller = cast(L0Target, config.build(Dims(8, 64, steps=steps)))
    slower = max(1.0, steps / SHORT)
    plant = Plant(plant.lag * slower, plant.strength / (1 if plant.lag else slower), plant.rise)
    log_l0, path = math.log(2.2), []
    for step in range(steps):
        log_c = math.log(controller.value(step))
        log_l0 = plant.step(log_l0, log_c, schedule.rate(step))
        seen = TARGET * math.exp(log_l0 + NOISE * rng.standard_normal())
        controller.update(cast(Pass, SimpleNamespace(l0=seen, step=step, rate=schedule.rate(step))))
        path.append(log_l0)
    return np.array(path)


@pytest.mark.parametrize("steps", [977, 4000])
@pytest.mark.parametrize("name", PLANTS)
def test_ends_on_the_target_while_the_rate_decays(name: str, steps: int) -> None:
    paths = np.array([errors(PLANTS[name], steps, seed) for seed in range(8)])
    assert abs(paths[:, -1].mean()) < 0.005
    assert np.abs(paths[:, -1]).max() < 0.01
    assert np.abs(paths[:, -steps // 5 :]).max() < 0.02


def test_with_one_integral_and_no_lead_a_rise_leaves_an_error() -> None:
    """The gains of the first version: L0 ended as far above its target as the formula says."""
    steps, rise = 977, 0.3
    first = {"proportional": 1.0, "integral": 60.0, "drift": 0.0, "lead": 0.0, "smoothing": 0.9}
    ends = [errors(Plant(20, 1.0, rise), steps, seed, **first)[-1] for seed in range(8)]
    expected = rise / (DECAY * steps) * SHORT / 60
    assert np.mean(ends) == pytest.approx(expected, rel=0.25) and expected > 0.02


def test_the_same_batches_give_the_same_coefficients() -> None:
    one, other = (errors(PLANTS["thresholds"], 300, seed=1) for _ in range(2))
    assert np.array_equal(one, other)
