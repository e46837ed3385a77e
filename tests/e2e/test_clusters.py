"""Cells trained by a Ray cluster or a Slurm queue (its stand-in on one machine) have the same bits.

`make test-clusters` installs the packages.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from projects import Ended, Project, environment, stop, wait_for

from saelab.launch.executors import ray

#: How the name of a Ray worker with one of our jobs begins: Ray gives it the name of the function.
TITLE = f"ray::{ray._run_task.__name__}"


def needs(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    reason = f"{package} is not installed: `make test-clusters` installs it"
    return pytest.mark.skipif(absent, reason=reason)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same launch without a cluster."""
    project = Project.make(tmp_path_factory.mktemp("here") / "project")
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


def started(project: Project, name: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "saelab", "run", "run_1", "--executor", name],
        cwd=project.folder,
        env=environment(SAELAB_WORKERS="2", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=600)
    return Ended(process.returncode, out, err)


def at_work(folder: Path) -> set[int]:
    """The Ray workers that are in the project's folder: those with a job."""
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            place = (process / "cwd").readlink()
        except OSError:  # it has ended
            continue
        if title.startswith(TITLE.encode()) and place == folder.resolve():
            found.add(int(process.name))
    return found


def same(one: Project, other: Project) -> bool:
    return one.info() == other.info() and one.weights() == other.weights()


@pytest.mark.slow
@needs("ray")
def test_a_worker_that_dies_in_a_cell_is_replaced_and_nothing_changes(
    tmp_path: Path, here: Project
) -> None:
    project = Project.make(tmp_path / "project")
    process = started(project, "ray", SAELAB_CHECKPOINT_SECONDS="0")
    killed: set[int] = set()
    try:
        for _ in range(2):
            in_cell = "a worker with a checkpoint"
            wait_for(lambda: in_training(project, killed), in_cell, launch=process)
            for victim in at_work(project.folder) - killed:  # the one that has written it too
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
        done = ended(process)
    finally:
        stop(process)
    assert len(killed) >= 2
    assert done.code == 0, done.err
    assert project.went_on() and same(project, here)


def in_training(project: Project, killed: set[int]) -> bool:
    checkpoints = any(project.folder.glob(".saelab/resume/*/*.json"))
    return checkpoints and bool(at_work(project.folder) - killed)


@pytest.mark.slow
@needs("ray")
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_to_a_launch_with_a_cluster(
    tmp_path: Path, here: Project, number: int, word: str
) -> None:
    project = Project.make(tmp_path / "project")
    process = started(project, "ray", SAELAB_CHECKPOINT_SECONDS="0")
    try:
        in_cell = "a worker with a checkpoint"
        wait_for(lambda: in_training(project, set()), in_cell, launch=process)
        process.send_signal(number)
        done = ended(process)
    finally:
        stop(process)
    assert done.code == 128 + number, done.err
    assert done.last == f"{word}: the same command goes on where it stopped"
    assert "Traceback" not in done.err
    wait_for(lambda: not at_work(project.folder), "the workers to end")
    assert any(project.folder.glob(".saelab/resume/*/*.json"))
    again = project.call()
    assert again.code == 0, again.err
    assert project.went_on() and same(project, here)


@pytest.mark.slow
@needs("submitit")
def test_a_queue(tmp_path: Path, here: Project) -> None:
    project = Project.make(tmp_path / "project")
    done = ended(started(project, "slurm", SAELAB_SLURM="cluster=local"))
    assert done.code == 0, done.err
    assert same(project, here)
    assert not list((project.folder / ".saelab" / "logs").glob("slurm-*"))
