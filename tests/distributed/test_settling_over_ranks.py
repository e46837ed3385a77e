"""The last step of a training finds the same thresholds on several ranks as on one."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from in_ranks import alone, in_ranks

from saelab.data.activations.store import MemorySource, Shard
from saelab.distributed.ranks import Ranks
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training import calibration_text
from saelab.training.calibration_text import CalibrationText

D_IN, TARGET = 16, 5.0
CASES: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {"activation": "jumprelu", "losses": ["reconstruction", "l0"]},
}


def text() -> MemorySource:
    stream = torch_stream(0, "calibration")
    shards = [
        Shard(
            torch.randn(n, 32, D_IN, generator=stream),
            torch.rand((n, 32), generator=stream) < 0.9,
        )
        for n in (20, 7)
    ]
    return MemorySource(shards, {})


def settled(ranks: Ranks, cases: list[str]) -> dict[str, tuple[float, float, float]]:
    """L0 before and after, and the amount, of SAEs that start with an L0 of 8."""
    found = {}
    controller = [{"kind": "l0_target", "target": TARGET}]
    for case in cases:
        settings = {"d_sae": 130, "initial_l0": 8, "controllers": controller} | CASES[case]
        sae = SAEConfig.parse(settings).build(D_IN, 10, 3, ranks)
        sae.initialise(text().shard(0).rows()[0], 3)
        sae.eval()
        with patch.object(calibration_text, "FARTHEST", 10.0):
            one = CalibrationText(text()).settle(sae, training_rows=10**6)
        assert one is not None
        after = CalibrationText(text()).measure_l0(sae)
        found[case] = one.before, after, one.amount
    return found


def assert_agree(data: int, latents: int) -> None:
    wanted = alone(settled, list(CASES))
    for found in in_ranks(data, latents, settled, list(CASES)):
        for case, (before, after, amount) in found.items():
            assert before == pytest.approx(wanted[case][0], rel=1e-4), case
            assert amount == pytest.approx(wanted[case][2], rel=0.02), case
            assert before > 1.2 * TARGET and after == pytest.approx(TARGET, rel=0.05), case


def test_rows_and_latents() -> None:
    assert_agree(2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "latents"), [(2, 1), (1, 2), (4, 1)])
def test_other_splits(data: int, latents: int) -> None:
    assert_agree(data, latents)


def test_the_amount_is_the_same_bits_on_every_rank() -> None:
    first, *others = in_ranks(2, 2, settled, ["relu"])
    assert all(other == first for other in others)
    assert torch.tensor(first["relu"]).isfinite().all()
