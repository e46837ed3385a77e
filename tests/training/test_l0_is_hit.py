"""Arms of the shipped study end at their target L0 on held-out text that nothing was set on."""

from __future__ import annotations

import pytest
from projects import ROOT

import saelab
from saelab.data.activations.stream import Layout
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.launch.prepare import prepare
from saelab.storage.cache import cache_folder
from saelab.study.experiment_file import load_experiment
from saelab.study.plan import arm_settings, find_run
from saelab.training.calibration_text import CalibrationText
from saelab.training.loop import Cell
from saelab.training.resume import ResumableCell
from saelab.training.sample import initial_sample
from saelab.training.train import train_members

TARGET, SEED = 32.0, 0
#: The promise, and before the last step: the controller's error and that of other text.
HIT, BEFORE = 0.005, 0.035
ARMS: dict[Layout, list[tuple[str, str]]] = {
    "rows": [("run_1", "baseline"), ("run_1", "A1"), ("run_0", "JumpReLU"), ("run_9", "B")],
    "contexts": [("run_4", "A2")],
}


@pytest.mark.slow
def test_arms_end_at_their_target() -> None:
    experiment = load_experiment(ROOT / "experiment.py")
    none = {"evaluation.probing.entries": "none"}
    base = saelab.settings(ROOT / "configs" / "embedded.toml", none)
    data = prepare(base, cache_folder(ROOT), "cpu")
    assert data.calibration is not None
    sample, held_out = initial_sample(data.train), CoreData(data.held_out, None, 1)
    text = CalibrationText(data.calibration)
    for layout, arms in ARMS.items():
        members = []
        for name, arm_name in arms:
            run = find_run(experiment.RUNS, name)
            arm = next(arm for arm in run.arms if arm.name == arm_name)
            settings = arm_settings(base, run, arm)
            cell = Cell(arm.name, settings.sae.at_l0(TARGET), settings.train, sample, SEED)
            members.append(ResumableCell(cell, None))
        assert not train_members(members, data.train, SEED, layout, lambda *_: None, text)
        for member in members:
            settled = member.cell.settled
            assert settled is not None and abs(settled.before / TARGET - 1) < BEFORE, settled
            assert abs(measure_reconstruction(member.cell.sae, held_out).l0 / TARGET - 1) < HIT
