"""Arms that take what another arm of the same launch ended with, and arms that follow contexts."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from projects import BASELINE, Project

from saelab import checkpoint
from saelab.errors import SettingError
from saelab.study.plan import (
    Arm,
    FromArm,
    Run,
    first_wave,
    later_arms,
    resolve,
    resolve_with_placeholders,
)
from saelab.training.curves import read_curve

PLAN = """\
study = "small"
base = "configs/small.toml"
target_l0 = 16
levels = []
seeds = 2
"""
LEARNED = 'Arm("learned", {"sae.scaling": {"kind": "variance", "temperature": "learned"}})'
FOUND = (
    'Arm("found", {"sae.scaling": {"kind": "variance", "tau": FromArm("learned", "tau")}}, '
    '"fixed at what was learned")'
)
TIED = """\
def tied(**settings):
    return {
        "sae.activation": {"kind": "tied_threshold", **settings},
        "sae.losses": [{"kind": "reconstruction"}, {"kind": "l0"}],
        "sae.controllers": [{"kind": "l0_target", "target": 16, "start": 1e-4}],
        "sae.initial_l0": 16,
    }

TIME = {"learned": ["theta", "beta", "gamma", "rho", "T"], "context": 32}
"""
MOVING = 'Arm("A2", tied(**TIME), primary=True)'
PERMUTED = 'Arm("permuted", tied(trace="permuted", **TIME))'


def test_waves_of_a_table() -> None:
    found = FromArm("a", "tau")
    arms = [Arm("a"), Arm("b", {"x": [{"tau": found}], "y": (1, 2)}), Arm("c", {"z": 3})]
    run = Run("waves", arms)
    assert [arm.name for arm in later_arms(run)] == ["b"]
    assert [arm.name for arm in first_wave(run).arms] == ["a", "c"]
    done = resolve(run, lambda f: f.arm + f.name)
    assert done.arms[1].changes == {"x": [{"tau": "atau"}], "y": (1, 2)}
    assert not later_arms(done) and not later_arms(resolve_with_placeholders(run))
    with pytest.raises(SettingError, match="first wave"):
        resolve(Run("waves", [Arm("b", {"x": FromArm("b", "tau")})]), lambda f: 0)


def test_an_arm_is_fixed_at_what_another_learned(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "p", (BASELINE, LEARNED, FOUND), plan=PLAN)
    project.replace("experiment.py", "import Arm, Run", "import Arm, FromArm, Run")
    ended = project.call()
    assert ended.code == 0, ended.err
    means = {name: group["means"] for name, group in project.info().items()}
    assert means["found"]["tau"] == pytest.approx(means["learned"]["tau"], rel=1e-6)
    assert means["learned"]["tau"] != pytest.approx(0.5, abs=1e-4)
    files = (cell.with_name("curves.parquet") for cell in project.finished_cells())
    curves = [read_curve(file, "tau") for file in files if file.exists()]  # controls have none
    moving = [taus for taus in curves if len(set(taus)) > 1]
    assert len(moving) == 2 and all(len(taus) > 50 for taus in moving)
    assert all(taus[0] == pytest.approx(0.5, abs=0.02) for taus in moving)
    kept = project.weights()
    assert project.again().code == 0 and project.weights() == kept  # all of it from the cache


def test_a_k_on_a_schedule_ends_where_another_k_ended(tmp_path: Path) -> None:
    """Not at the plan's L0, which the k that follows the data does not know."""
    moving = '{"sae.activation": {"kind": "topk", "k": "k"}, "sae.controllers": [%s]}'
    rows = '{"kind": "rounded_k", "over": "rows", "start": 60, "k_min": 20}'
    schedule = '{"kind": "annealed_k", "start": 60, "end": FromArm("adaptive", "k")}'
    arms = (f'Arm("adaptive", {moving % rows})', f'Arm("annealed", {moving % schedule})')
    project = Project.make(tmp_path / "p", (BASELINE, *arms), plan=PLAN)
    project.replace("experiment.py", "import Arm, Run", "import Arm, FromArm, Run")
    ended = project.call()
    assert ended.code == 0, ended.err
    means = {name: group["means"] for name, group in project.info().items()}
    found = means["adaptive"]["k"]
    assert found >= 20 and abs(found - 60) > 1
    assert means["annealed"]["l0"] == pytest.approx(found, rel=0.05)
    assert means["annealed"]["verdict.fvu"] == "refused"  # the baseline's L0 is another one


def test_the_second_wave_counts_towards_the_limit_before_the_first_is_trained(
    tmp_path: Path,
) -> None:
    plan = PLAN.replace("seeds = 2", "seeds = 3\nseeds_other = 3")
    project = Project.make(tmp_path / "p", (BASELINE, LEARNED, FOUND), plan=plan)
    project.replace("experiment.py", "import Arm, Run", "import Arm, FromArm, Run")

    def seconds(specs: list, *_: object) -> float:
        return 1000.0 * len(specs)

    with patch("saelab.launch.launch.training_seconds", seconds):  # 6 cells, 3 of the twin, then 3
        ended = project.call()
    assert ended.code == 2 and "'3:20:00'" in ended.last and "over the limit" in ended.last
    assert not project.finished_cells()


def test_a_value_that_nobody_logs(tmp_path: Path) -> None:
    wrong = FOUND.replace('"tau")', '"taau")')
    project = Project.make(tmp_path / "p", (BASELINE, LEARNED, wrong), plan=PLAN)
    project.replace("experiment.py", "import Arm, Run", "import Arm, FromArm, Run")
    ended = project.call()
    assert ended.code == 2 and "taau" in ended.last and "learned" in ended.last


def test_thresholds_that_follow_the_context(tmp_path: Path) -> None:
    """Trained on whole contexts, evaluated and spliced along them."""
    arms = (BASELINE, MOVING, PERMUTED)
    changes = '{"layout": "contexts"}'
    project = Project.make(tmp_path / "p", arms, TIED, changes, PLAN)
    ended = project.call()
    assert ended.code == 0, ended.err
    info = project.info()
    for name in ("A2", "permuted"):
        means = info[name]["means"]
        assert means["fvu"] < 0.7 and means["loss_recovered"] > 0.3
        assert means["theta"] > 0 and means["beta"] != 0
    cell = next((tmp_path / "p" / "run_1" / "cells" / "A2").iterdir())
    assert checkpoint.load(cell)[0].needs_contexts
    shuffled = Project.make(tmp_path / "q", arms, TIED, "{}", PLAN).call()
    assert shuffled.code == 2 and "layout = 'contexts'" in shuffled.last
