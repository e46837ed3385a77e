"""Grids of settings: their arms, what is refused, and which arm is the best."""

from __future__ import annotations

from typing import Any

import pytest

from saelab.errors import SettingError
from saelab.study.plan import BaseConfig, PlanConfig, arm_settings
from saelab.study.sweep import MOST_ARMS, check_free_of_l0, grid, summarise, sweep_run

BASE = BaseConfig.parse({"sae": {"preset": "topk", "d_sae": 64, "activation": {"k": 8}}})
PLAN = PlanConfig(study="s", target_l0=8, levels=(), tolerance=0.05)


def test_a_grid_has_every_combination_under_short_names() -> None:
    arms = grid({"train.lr": [1e-3, 2e-3], "sae.d_sae": [64, 128]})
    assert [arm.name for arm in arms] == [
        *("lr 0.001, d_sae 64", "lr 0.001, d_sae 128"),
        *("lr 0.002, d_sae 64", "lr 0.002, d_sae 128"),
    ]
    assert arms[3].changes == {"train.lr": 2e-3, "sae.d_sae": 128}


def test_settings_that_go_together_are_paired() -> None:
    arms = grid({"train.lr": [1e-3, 2e-3], "sae.d_sae": [64, 128]}, together=True)
    assert [tuple(arm.changes.values()) for arm in arms] == [(1e-3, 64), (2e-3, 128)]
    with pytest.raises(SettingError, match="equally many values"):
        grid({"train.lr": [1e-3], "sae.d_sae": [64, 128]}, together=True)


def test_names_say_kinds_and_tell_equal_ends_apart() -> None:
    kinds = [{"kind": "relu"}, {"kind": "topk", "k": 4}]
    assert [a.name for a in grid({"sae.activation": kinds})] == [
        "activation relu",
        "activation topk (k 4)",
    ]
    (arm,) = grid({"train.betas": [[0.9, 0.99]], "sae.betas": ["x"]})
    assert arm.name == "train.betas [0.9, 0.99], sae.betas x"


def test_nothing_to_try_and_too_much_are_refused() -> None:
    with pytest.raises(SettingError, match="name its values"):
        grid({"train.lr": []})
    with pytest.raises(SettingError, match=f"use at most {MOST_ARMS}"):
        grid({"train.lr": [1e-3] * 20, "sae.d_sae": [64] * 20})


def test_the_combination_of_the_config_itself_is_the_baselines_twin() -> None:
    run = sweep_run({"train.lr": [BASE.train.lr, 1e-2]}, BASE)
    assert [arm.twin_of for arm in run.arms] == [None, "baseline", None]
    assert all(arm.primary for arm in run.arms[1:])


def test_a_sweep_over_what_the_l0_sets_is_refused() -> None:
    run = sweep_run({"sae.activation.k": [4, 16]}, BASE)
    with pytest.raises(SettingError, match="sweep over L0s by --levels"):
        check_free_of_l0(run, BASE, PLAN)
    check_free_of_l0(run, BASE, PLAN.patched({"target_l0": None}))  # each at its own L0
    check_free_of_l0(sweep_run({"train.lr": [1e-2]}, BASE), BASE, PLAN)


def entry(fvu: float | None, l0: float) -> dict[str, Any]:
    return {"means": {"fvu": fvu, "l0": l0}, "final_info_dict": {"l0": [l0, l0]}}


def test_the_best_arm_keeps_the_l0() -> None:
    run = sweep_run({"train.lr": [1e-3, 2e-3, 1e-2]}, BASE)
    names = [arm.name for arm in run.arms]
    info = dict(
        zip(names, [entry(0.3, 8), entry(0.2, 8), entry(0.1, 12), entry(None, 8)], strict=True)
    )
    best, rows = summarise(run, PLAN, info)
    assert best == "lr 0.001"
    assert "50.0% from the target 8" in rows["lr 0.002"]["left_out"]
    assert rows["lr 0.01"]["left_out"] == "no valid cell"
    assert (rows["lr 0.001"]["fvu"], rows["lr 0.001"]["changes"]) == (0.2, {"train.lr": 1e-3})
    best, _ = summarise(run, PLAN.patched({"direction": "higher"}), info)
    assert best == "baseline"
    best, _ = summarise(run, PLAN, {name: entry(None, 8) for name in names})
    assert best is None


def test_arms_of_a_grid_are_arms_of_any_run() -> None:
    run = sweep_run({"sae.d_sae": [32, 128]}, BASE)
    sizes = [arm_settings(BASE, run, arm).sae.d_sae for arm in run.arms]
    assert sizes == [64, 32, 128]
