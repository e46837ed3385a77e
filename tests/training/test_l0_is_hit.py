"""Arms of the shipped study end at their target L0, on training batches and on held-out text."""

from __future__ import annotations

import numpy as np
import pytest
from projects import ROOT

import saelab
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.launch.prepare import prepare
from saelab.storage.cache import cache_folder
from saelab.study.experiment_file import load_experiment
from saelab.study.plan import arm_settings
from saelab.training.loop import Cell
from saelab.training.resume import ResumableCell
from saelab.training.sample import initial_sample
from saelab.training.train import train_members

TARGET, SEED = 32.0, 0
#: The controller's error on the last tenth of the batches.
CONTROL = 0.012
#: Held-out text is other text than the batches: within 1.5% of them, for all arms alike.
TEXT, BETWEEN_ARMS = 0.02, 0.015


@pytest.mark.slow
def test_arms_end_at_their_target() -> None:
    run = load_experiment(ROOT / "experiment.py").RUNS["run_1"]
    jumprelu = load_experiment(ROOT / "experiment.py").RUNS["run_0"].arms[2]
    arms = [*(arm for arm in run.arms if arm.name in ("baseline", "A1")), jumprelu]
    none = {"evaluation.probing.entries": "none"}
    base = saelab.settings(ROOT / "configs" / "embedded.toml", none)
    data = prepare(base, cache_folder(ROOT), "cpu")
    sample, held_out = initial_sample(data.train), CoreData(data.held_out, None, 1)
    cells = []
    for arm in arms:
        settings = arm_settings(base, run, arm)
        cells.append(Cell(arm.name, settings.sae.at_l0(TARGET), settings.train, sample, SEED))
    members = [ResumableCell(cell, None) for cell in cells]
    assert not train_members(members, data.train, SEED, "rows", lambda *_: None)
    ended = np.array([measure_reconstruction(cell.sae, held_out).l0 for cell in cells])
    batches = np.array([cell.log.last("l0", 0.1) for cell in cells])
    assert np.abs(batches / TARGET - 1).max() < CONTROL, batches
    assert np.abs(ended / TARGET - 1).max() < TEXT, ended
    assert np.ptp(ended / TARGET) < BETWEEN_ARMS, ended
