"""Trackers: the seam with one of our own, and the packages themselves where they are installed."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from saelab.errors import SettingError
from saelab.progress import trackers
from saelab.progress.run import launch_progress, log_progress
from saelab.progress.trackers import TRACKERS, Tracker, open_tracker

ABOUT = {"run": "run_3", "title": "A run", "study": "small"}
CELL = {"arm": "baseline", "seed": 5, "level": 16.0}
LINES = (
    {"stage": "train", **CELL, "step": 0, "steps": 20, "tokens": 0},
    {"stage": "train", **CELL, "step": 10, "values": {"loss": 0.5, "l0": None}},
    {"stage": "train", **CELL, "seed": 6, "step": 10, "values": {"loss": 0.75}},
    {"stage": "done", **CELL, "step": 20, "values": {"fvu": 0.25}, "failure": ""},
    {"stage": "verdict", "done": 0, "total": 1},
)
NAME, OTHER = "baseline/seed5-l0_16", "baseline/seed6-l0_16"


class Kept(Tracker):
    """Keeps in memory what it is told."""

    said: list[tuple[str, int, dict[str, float]]]
    closed = 0

    def log(self, cell: str, step: int, values: Mapping[str, float]) -> None:
        self.said.append((cell, step, dict(values)))

    def close(self) -> None:
        type(self).closed += 1


class Broken(Tracker):
    def log(self, cell: str, step: int, values: Mapping[str, float]) -> None:
        raise OSError("its disk is full")


def test_a_new_tracker_is_one_class_and_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(TRACKERS, "kept", Kept)
    Kept.said, Kept.closed = [], 0
    with launch_progress(tmp_path, ABOUT, "kept"):
        for line in LINES:
            log_progress(line)
    assert Kept.said == [
        (NAME, 10, {"loss": 0.5}),
        (OTHER, 10, {"loss": 0.75}),
        (NAME, 20, {"fvu": 0.25}),
    ]
    assert Kept.closed == 1


def test_one_that_fails_is_left_and_the_run_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    with launch_progress(tmp_path, ABOUT, "broken") as run:
        for line in LINES:
            log_progress(line)
    assert run.state.outcome == "complete"
    told_once = capsys.readouterr().err
    assert told_once == "Broken failed (its disk is full): the run goes on without it\n"


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch, name: str, package: str
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest, **named):
        if wanted == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(wanted, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingError, match=r"pip install 'saelab\[tracking\]'"):
        open_tracker(name, tmp_path, ABOUT)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- with the packages themselves


def needs(name: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not found, reason=f"{name} is not installed (extra tracking)")


#: Tells LINES to a tracker in a process of its own, with no key and no terminal.
SCRIPT = f"""
import sys
from pathlib import Path
from saelab.progress.run import launch_progress, log_progress
with launch_progress(Path(sys.argv[2]), {ABOUT!r}, sys.argv[1]):
    for line in {LINES!r}:
        log_progress(line)
"""


def told_apart(tracker: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(trackers.__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("WANDB", "TRACKIO", "HF_"))}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, tracker, str(folder)],
        env=kept | {"PYTHONPATH": path, "HOME": str(folder.parent)} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs("tensorboard")
def test_tensorboard_reads_back_what_was_told(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with launch_progress(tmp_path, ABOUT, "tensorboard"):
        for line in LINES:
            log_progress(line)
    found = {}
    for cell in (NAME, OTHER):
        events = EventAccumulator(str(tmp_path / "tensorboard" / cell))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[cell, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    assert found == {
        (NAME, "loss"): [(10, 0.5)],
        (NAME, "fvu"): [(20, 0.25)],
        (OTHER, "loss"): [(10, 0.75)],
    }


@needs("wandb")
def test_wandb_works_offline_and_in_silence(tmp_path: Path) -> None:
    ended = told_apart("wandb", tmp_path / "run_3")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), ended.stderr
    (folder,) = (tmp_path / "run_3" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    assert f"{NAME}/loss".encode() in content and f"{NAME}/fvu".encode() in content


@needs("trackio")
def test_trackio_keeps_it_on_this_machine(tmp_path: Path) -> None:
    ended = told_apart("trackio", tmp_path / "run_3", TRACKIO_DIR=str(tmp_path / "kept"))
    assert ended.returncode == 0, ended.stderr
    import sqlite3

    (file,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert (f"run_3/{NAME}", 10, {"loss": 0.5}) in found
