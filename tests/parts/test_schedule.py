"""Schedules by hand, and every activation with a k that follows one."""

from __future__ import annotations

from typing import Any

import pytest

from saelab.checks.trials import D_SAE, STEPS, batch, fresh_cell, rows
from saelab.errors import SettingError
from saelab.parts import TABLE, parse_part
from saelab.parts.base import Dims
from saelab.sae import SAEConfig


def schedule(**settings: Any) -> Any:
    return parse_part("controller", {"kind": "schedule", **settings}).build(Dims(4, 8, steps=10))


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"start": 0.0, "end": 1.0}, {0: 0.1, 4: 0.5, 9: 1.0}),
        ({"start": 2.0, "end": 1.0, "begin": 0.4, "until": 0.8}, {0: 2.0, 3: 2.0, 5: 1.5, 8: 1.0}),
        ({"start": 1.0, "end": 16.0, "shape": "geometric"}, {4: 4.0, 9: 16.0}),
        ({"start": 1.0, "end": 0.0, "shape": "cosine"}, {4: 0.5, 9: 0.0}),
        ({"start": 0.0, "end": 1.0, "shape": "steps", "stairs": 2}, {3: 0.0, 4: 0.5, 8: 0.5, 9: 1}),
    ],
)
def test_values_by_hand(settings: dict[str, Any], values: dict[int, float]) -> None:
    controller = schedule(**settings)
    assert {step: controller.value(step) for step in values} == pytest.approx(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin": 0.5, "until": 0.5}, "begin = 0.5: must be below until = 0.5"),
        ({"shape": "geometric"}, "start = 0.0: must be above 0 where the shape is 'geometric'"),
        ({"shape": "geometric", "start": 1.0, "end": -1.0}, "end = -1.0: must be above 0"),
    ],
)
def test_impossible_schedules(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        schedule(**settings)


FOLLOWERS = [
    kind
    for kind, config in TABLE["activation"].items()
    if any(example.part.l0_setting for example in config.examples(D_SAE))
]


@pytest.mark.parametrize("kind", FOLLOWERS)
def test_k_follows_a_schedule(kind: str, global_random_seed: int) -> None:
    course = {"kind": "schedule", "name": "k", "start": 64, "end": 8, "until": 0.5}
    parts = {"activation": {"kind": kind, "k": "k"}, "controllers": [course]}
    parts |= TABLE["activation"][kind].parse({}).companions
    config = SAEConfig.parse({"d_sae": D_SAE, "losses": ["reconstruction"], **parts})
    cell = fresh_cell(config, global_random_seed)
    for i in range(STEPS):
        cell.step(batch(rows(global_random_seed + i)))
    l0 = cell.log.columns["l0"]
    if not cell.sae.activation.uses_weights:  # k steps of a pursuit may choose a latent again
        assert l0[0] == pytest.approx(61, abs=2) and l0[-1] == 8
    assert 15 < l0[0] <= 64 and 7 < l0[-1] <= 8
    assert cell.log.last(f"{kind}.k") == 8 and config.l0_rules(8) == {"found"}


def test_three_kinds_follow() -> None:
    assert {*FOLLOWERS} >= {"topk", "batchtopk", "abs_topk"}
