"""What a launch adds to the facts and rows of its cells."""

from __future__ import annotations

import pytest

from saelab.launch.collect import _scalar_rows, scalar_spreads
from saelab.runs.schema import SCALAR, SCALARS_DEFINITION, UNSIGNED_DEFINITION, CellId
from saelab.sae import SAEConfig
from saelab.study.plan import CellSpec
from saelab.training.optim import TrainConfig

SCALED = {"kind": "variance", "tau": 0.5}


def spec(arm: str, seed: int, level: float = 16.0, **scaling: float) -> CellSpec:
    sae = SAEConfig.parse({"d_sae": 64, "scaling": SCALED | scaling})
    return CellSpec(id=CellId(arm, seed, level), sae=sae, train=TrainConfig())


def test_the_spread_of_a_scalars_way_is_that_of_the_seeds_of_one_arm_and_level() -> None:
    moved = {
        spec("A", 0): 0.1, spec("A", 1): 0.2, spec("A", 2): 0.3,
        spec("A", 0, 8.0): 5.0, spec("B", 0): 9.0, spec("B", 1): 8.0,
    }  # fmt: skip
    found = scalar_spreads({one: {"scalar_moved.theta": way} for one, way in moved.items()})
    for one in moved:
        three = one.id.arm == "A" and one.id.level == 16.0
        assert (found[one] == {}) == (not three)
    spreads = [facts["scalar_spread.theta"] for facts in found.values() if facts]
    assert spreads == pytest.approx([0.1] * 3)


def test_a_scalar_whose_sign_is_free_is_reported_without_it() -> None:
    last = {"beta": -1.5, "theta": -0.1, "loss": 2.0}
    rows = {row.metric: row for row in _scalar_rows(spec("A", 0), last)}
    theta, beta = rows[f"{SCALAR}theta"], rows[f"{SCALAR}beta"]
    assert (theta.value, theta.definition) == (0.1, UNSIGNED_DEFINITION)
    assert (beta.value, beta.definition) == (-1.5, SCALARS_DEFINITION)
    started = {row.metric: row for row in _scalar_rows(spec("A", 0, theta=0.5), last)}
    assert started[f"{SCALAR}theta"].value == -0.1  # its start chose the sign
