"""Code of the user's own: a loss term, a torch module, and cells that diverge."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import panel, picture, words
from projects import BASELINE, LONGER, PLAN, Project

from saelab.report.run_data import load
from saelab.storage.atomic import read_json

LOSS = """
from typing import Literal

from saelab import register
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass

STRENGTH = 0.5


class SquareConfig(PartConfig):
    kind: Literal["square"] = "square"
    weights: list[float] = [1.0]

    def build(self, dims: Dims) -> "Square":
        return Square(self)


class Square(LossTerm):
    def __init__(self, config: SquareConfig) -> None:
        super().__init__()
        self.weight = config.weights[0]

    def loss(self, p: Pass):
        return self.weight * penalty(p.code.values)


def penalty(values):
    return STRENGTH * values.square().mean()


register("loss", SquareConfig)
"""

MODULE = """
import torch
from torch import nn


class TopKSAE(nn.Module):
    def __init__(self, d_in: int, d_sae: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        rows = nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
        self.W_dec = nn.Parameter(rows.clone())
        self.encoder = nn.Linear(d_in, d_sae)
        with torch.no_grad():
            self.encoder.weight.copy_(rows)
            self.encoder.bias.zero_()
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def encode(self, x):
        values, latents = torch.relu(self.encoder(x - self.b_dec)).topk(16, dim=-1)
        return torch.zeros(len(x), self.d_sae).scatter(-1, latents, values)

    def decode(self, f):
        return f @ self.W_dec + self.b_dec

    def loss(self, x):
        return (self.decode(self.encode(x)) - x).square().sum(-1).mean()
"""

BROKEN = """
from typing import Literal

import torch

from saelab import register
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class BreaksConfig(PartConfig):
    kind: Literal["breaks"] = "breaks"
    at: int = 0

    def build(self, dims: Dims) -> "Breaks":
        return Breaks(self)


class Breaks(LossTerm):
    def __init__(self, config: BreaksConfig) -> None:
        super().__init__()
        self.at = config.at

    def loss(self, p: Pass):
        return p.recon.sum() * (float("nan") if p.step >= self.at else 0.0)


register("loss", BreaksConfig)
"""

GAIN = """
from typing import Literal

import torch
from torch import nn

from saelab import register
from saelab.parts.base import Dims, PartConfig, Scalar, Scaling, Stored


class GainConfig(PartConfig):
    kind: Literal["gain"] = "gain"
    start: float = 0.8
    lr: float | None = 1e-2

    def build(self, dims: Dims) -> "Gain":
        return Gain(self, dims)

    @property
    def logged(self):
        return {"gain": Scalar("factor of the encoder's input", unit="times")}


class Gain(Scaling):
    def __init__(self, config: GainConfig, dims: Dims) -> None:
        super().__init__()
        self.lr, self.dims = config.lr, dims
        self.gain = nn.Parameter(torch.tensor(config.start))

    def apply(self, centred):
        return centred * self.gain

    def fold(self):
        zeros = self.gain.new_zeros(self.dims.d_in)
        return self.gain.detach() + zeros, zeros

    def learned(self):
        return {"gain": self.gain}

    def stored(self):
        return {"gain": (Stored(self.gain),)}

    def scalars(self):
        return {"gain": float(self.gain.detach())}

    def facts(self, columns, travel):
        return {"gain.highest": float(columns["gain"].max()), "gain.travel": travel(self.gain)}

    def latent_columns(self):
        return {"parity": torch.arange(self.dims.d_sae) % 2}


register("scaling", GainConfig)
"""

WORDS = ("helps", "hurts", "equivalent", "cannot tell yet")
SQUARE = 'Arm("square", {"sae.losses+": {"kind": "square"}}, "a loss of our own", primary=True)'
OWN = 'Arm("own", {"train.lr": 1e-3}, "a module of our own", module=TopKSAE)'
TWO = PLAN.replace("seeds = 3", "seeds = 2")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained in a worker process, which must find loss and module again."""
    folder = tmp_path_factory.mktemp("own") / "project"
    project = Project.make(folder, (BASELINE, SQUARE, OWN), LOSS + MODULE, plan=TWO, base=LONGER)
    ended = project.launch(workers=1)
    assert ended.code == 0, ended.err
    assert "`saelab report run_1 --experiment experiment.py`" in ended.out  # SAEs with its loss
    return project


def test_an_own_loss_and_an_own_module_get_a_verdict(own: Project) -> None:
    info = own.info()
    for arm in ("square", "own"):
        assert info[arm]["means"]["verdict.fvu"] in WORDS, own.folder / "run_1" / "summary.md"
        assert info[arm]["means"]["l0"] == pytest.approx(16, rel=0.05)
        assert 0 < info[arm]["means"]["explained_variance"] < 1
        assert info[arm]["means"]["loss_recovered"] > 0.5


def test_an_own_loss_is_logged_under_its_name(own: Project) -> None:
    rows = pq.read_table(own.folder / "run_1" / "curves.parquet").to_pylist()
    assert {row["arm"] for row in rows if row["name"] == "loss.square"} == {"square"}


def test_an_own_module_is_kept_with_its_weights(own: Project) -> None:
    from safetensors.torch import load_file

    files = list((own.folder / "run_1" / "cells" / "own").rglob("*.safetensors"))
    assert len(files) == 2
    assert set(load_file(files[0])) == {"W_dec", "b_dec", "encoder.weight", "encoder.bias"}


def test_the_same_code_in_this_process_gives_the_same_bits(own: Project, tmp_path: Path) -> None:
    arms = (BASELINE, SQUARE, OWN)
    other = Project.make(tmp_path / "other", arms, LOSS + MODULE, plan=TWO, base=LONGER)
    ended = other.call()
    assert ended.code == 0, ended.err
    assert other.info() == own.info()


@pytest.mark.parametrize(
    ("old", "new", "retrained"),
    [
        ("return self.weight *", "return 2 * self.weight *", 3),
        ("STRENGTH = 0.5", "STRENGTH = 0.25", 3),
        ("values.square()", "values.abs()", 3),
        ("RUNS =", "# a remark\nRUNS =", 0),
    ],
)
def test_edited_code_trains_its_own_arm_again(
    own: Project, tmp_path: Path, old: str, new: str, retrained: int
) -> None:
    """The class, and what it uses beside it; never a weight of the code before."""
    project = Project(tmp_path / "project")
    shutil.copytree(own.folder, project.folder)
    project.table((BASELINE, SQUARE), LOSS)
    project.again()
    project.replace("experiment.py", old, new)
    ended = project.again()
    assert ended.code == 0, ended.err
    assert (f"{retrained} cells to train" in ended.err) == (retrained > 0)


def test_a_run_started_by_the_command_line_finds_own_code_too(tmp_path: Path) -> None:
    """There the main module is not experiment.py; even the baseline has the loss."""
    from projects import run

    changes = '{"sae.losses+": {"kind": "square"}}'
    project = Project.make(tmp_path / "p", (BASELINE,), LOSS, changes, plan=TWO)
    ended = run(project.folder, "-m", "saelab", "run", "run_1", variables={"SAELAB_WORKERS": "1"})
    assert ended.code == 0, ended.err
    assert project.info()["baseline"]["means"]["gate"]


def test_a_learned_scalar_of_an_own_part_shows_up_everywhere(tmp_path: Path) -> None:
    """It is declared in the part alone: no list outside names it."""
    arm = 'Arm("gained", {"sae.scaling": "gain"}, primary=True)'
    project = Project.make(tmp_path / "p", (BASELINE, arm), GAIN, plan=TWO)
    ended = project.call()
    assert ended.code == 0, ended.err
    folder = project.folder / "run_1"
    assert project.manifest()["scalars"]["gain"] == {
        "meaning": "factor of the encoder's input",
        "unit": "times",
    }
    run = load(folder)
    curves = run.curves["gain", "gained"]
    assert len(curves) == 2 and all(np.ptp(curve.values) > 0.01 for curve in curves.values())
    for metric in ("convergence", "drift", "moved", "sensitivity"):
        assert len(run.numbers(f"{metric}.gain")["gained"]) == 2, metric
    assert len(run.numbers("sensitivity.gain.fvu", "change=+10%")["gained"]) == 2
    info = project.info()["gained"]
    last = [curve.values[-1] for curve in curves.values()]
    assert info["means"]["gain"] == pytest.approx(np.mean(last), abs=0.01)
    assert {"convergence.gain", "sensitivity.gain"} <= set(info["final_info_dict"])
    assert "gain" not in project.info()["baseline"]["means"]
    (axes,) = picture(run, "scalars").axes
    assert axes.get_title(loc="left") == "gain" and axes.get_ylabel() == "gain (times)"
    assert "gain: factor of the encoder's input" in words(picture(run, "scalars"))
    assert panel(picture(run, "sensitivity"), "gain")
    facts = [c["facts"] for c in read_json(folder / "gate.json").values() if c["arm"] == "gained"]
    assert all(fact["gain.highest"] > 0.5 and fact["gain.travel"] > 0 for fact in facts)
    assert all("scalar_reach.gain" in fact for fact in facts)
    (file, *_) = sorted((folder / "cells" / "gained").rglob("latents.parquet"))
    assert pq.read_table(file, columns=["parity"])["parity"].to_pylist()[:4] == [0, 1, 0, 1]


# ---------------------------------------------------------------- cells that fail

NAN_FIRST = 'Arm("nan first", {"sae.losses+": {"kind": "breaks"}}, "never takes a step")'
NAN_LATER = 'Arm("nan later", {"sae.losses+": {"kind": "breaks", "at": 40}}, primary=True)'
TOO_FAST = 'Arm("too fast", {"train.lr": 1e6})'
FINE = 'Arm("fine", {"train.lr": 2e-3})'


def test_cells_that_diverge_do_not_stop_the_others(tmp_path: Path) -> None:
    arms = (BASELINE, NAN_FIRST, NAN_LATER, TOO_FAST, FINE)
    project = Project.make(tmp_path / "p", arms, BROKEN, plan=TWO)
    ended = project.call()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    info = project.info()
    for arm in ("baseline", "fine"):
        assert info[arm]["means"]["gate"] == "ok" or "warning" in info[arm]["means"]["gate"]
        assert info[arm]["means"]["fvu"] < 1
    for arm in ("nan first", "nan later", "too fast"):
        assert "failed" in info[arm]["means"]["gate"], info[arm]["means"]["gate"]
        assert "invalid" not in info[arm]["means"]["gate"]
        assert info[arm]["means"]["verdict.fvu"] != "helps"
    for arm in ("nan first", "nan later"):
        assert info[arm]["means"].get("fvu") is None
        assert "nonfinite_training" in info[arm]["means"]["gate"]
        assert set(info[arm]["final_info_dict"]["stability.nonfinite"]) == {1}
        assert "spikes" not in info[arm]["final_info_dict"]
    assert set(info["fine"]["final_info_dict"]["stability.nonfinite"]) == {0}
    assert info["fine"]["means"]["verdict.fvu"] in WORDS
    summary = (project.folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    assert "not finite at step 40" in summary
    assert "not finite at step 0" in summary


def test_others_have_the_bits_they_have_without_the_diverging_cells(tmp_path: Path) -> None:
    alone = Project.make(tmp_path / "alone", (BASELINE, FINE), plan=TWO)
    beside = Project.make(tmp_path / "beside", (BASELINE, NAN_LATER, FINE), BROKEN, plan=TWO)
    assert alone.call().code == beside.call().code == 0
    shared = {name: h for name, h in beside.weights().items() if not name.startswith("nan")}
    assert shared == alone.weights()


def test_a_baseline_that_always_diverges_ends_with_1_and_one_sentence(tmp_path: Path) -> None:
    changes = '{"sae.losses+": {"kind": "breaks", "at": 3}}'
    project = Project.make(tmp_path / "p", (BASELINE, FINE), BROKEN, changes, plan=TWO)
    ended = project.call()
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "baseline has no valid cell" in ended.last and "nonfinite_training" in ended.last
    means = project.info()["baseline"]["means"]
    assert means.get("fvu") is None and "failed" in means["gate"]
    assert (project.folder / "run_1" / "manifest.json").is_file()


def test_a_level_that_diverges_leaves_the_other_levels_of_its_arm(tmp_path: Path) -> None:
    """Cells of one arm and seed are trained in one job."""
    code = BROKEN.replace("p.step >= self.at", "p.sae.config.activation.k == 8")
    changes = '{"sae.losses+": {"kind": "breaks"}}'
    project = Project.make(tmp_path / "p", (BASELINE, FINE), code, changes, plan=TWO)
    ended = project.call()
    assert ended.code == 0, ended.err
    rows = pq.read_table(project.folder / "run_1" / "metrics.parquet").to_pylist()
    levels = {row["level"] for row in rows if (row["arm"], row["metric"]) == ("baseline", "fvu")}
    assert levels == {16}


def test_an_error_in_own_code_ends_with_its_name_and_no_complete_run(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "p", (BASELINE, SQUARE), LOSS, plan=TWO)
    project.replace("experiment.py", "STRENGTH * values", "STRENGHT * values")
    ended = project.call()
    assert ended.code == 1
    assert ended.last.startswith("NameError") and "STRENGHT" in ended.last
    assert [file.name for file in (project.folder / "run_1").iterdir()] == ["metrics.jsonl"]


def test_an_expected_failure_is_shown_and_not_punished(tmp_path: Path) -> None:
    arm = NAN_LATER.replace("primary=True", 'expected=["nonfinite_training"]')
    project = Project.make(tmp_path / "p", (BASELINE, arm, FINE), BROKEN, plan=TWO)
    ended = project.call()
    assert ended.code == 0, ended.err
    assert "(expected)" in project.info()["nan later"]["means"]["gate"]
