"""A launch that is killed goes on where it stopped and leaves no process behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from projects import (
    BASE,
    TWO_SEEDS,
    Project,
    environment,
    group_is_gone,
    reached,
    stop,
    wait_for,
)

from saelab.progress.watch import WatchedRun

#: Enough cells that a launch is still training when the first one is finished.
MANY = 'Arm("{0}", {{"train.lr": {1}e-3}})'
ARMS = ('Arm("baseline")', *(MANY.format(f"a{i}", i) for i in range(1, 4)))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are bound on Linux only")


def make(folder: Path, *arms: str) -> Project:
    """Eight cells, or those of the arms."""
    base = BASE.replace("d_sae = 256", "d_sae = 64")
    return Project.make(folder, arms or ARMS, plan=TWO_SEEDS, base=base)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make(tmp_path_factory.mktemp("whole") / "project")
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


def test_a_killed_launch_leaves_no_process_and_the_same_command_finishes_it(
    tmp_path: Path, uninterrupted: Project
) -> None:
    project = make(tmp_path / "project")
    process = project.start(workers=2)
    try:
        wait_for(lambda: bool(project.finished_cells()), "the first finished cell")
        process.kill()  # the parent alone
        wait_for(lambda: group_is_gone(process.pid), "the workers to end")
    finally:
        process.stop()
    done = len(project.finished_cells())
    assert 0 < done < len(uninterrupted.finished_cells())
    assert [file.name for file in (project.folder / "run_1").iterdir()] == ["metrics.jsonl"]
    killed = WatchedRun(project.folder / "run_1")
    assert killed.update() == "died"
    ended = project.call()
    assert ended.code == 0, ended.err
    assert "(0 in the cache)" not in ended.err
    assert killed.update() == "complete" and 0 < killed.state.cached <= done
    assert project.info() == uninterrupted.info()
    assert project.weights() == uninterrupted.weights()


def test_damaged_activations_are_told_and_harvested_again(
    tmp_path: Path, uninterrupted: Project
) -> None:
    project = make(tmp_path / "project", *ARMS[:2])
    project.replace(
        "configs/small.toml", "[evaluation]", "[harvest]\nshard_tokens = 4_000\n[evaluation]"
    )
    assert project.call().code == 0
    weights = project.weights()
    shard = sorted(project.folder.glob(".saelab/activations/*/*/shard-00001.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    shutil.rmtree(project.folder / ".saelab" / "cells")
    ended = project.again()
    assert ended.code == 0, ended.err
    assert f"{shard.name} does not match its checksum" in ended.err
    assert project.weights() == weights
    assert "checksum" not in project.again().err


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_while_cells_are_trained(
    number: int, code: int, word: str, tmp_path: Path, uninterrupted: Project
) -> None:
    """Workers leave checkpoints, nothing else is left, and the same command goes on from them."""
    project = make(tmp_path / "project")
    process = project.start(workers=1, SAELAB_CHECKPOINT_SECONDS="0")
    checkpoints = project.folder / ".saelab" / "resume"
    try:
        wait_for(lambda: any(checkpoints.glob("*/*.json")), "the first checkpoint")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: to all of them
        else:
            os.kill(process.pid, number)  # as a scheduler may: to the first alone
        assert process.wait() == code
        wait_for(lambda: group_is_gone(process.pid), "the workers to end")
    finally:
        process.stop()
    text = (project.folder / "stderr").read_text()
    assert "Traceback" not in text
    last = text.rstrip().splitlines()[-1]
    assert last == f"{word}: the same command goes on where it stopped"
    logs = (project.folder / ".saelab" / "logs").glob("worker-*.log")
    assert not [log for log in logs if "Traceback" in log.read_text()]
    assert [file.name for file in (project.folder / "run_1").iterdir()] == ["metrics.jsonl"]
    assert any(checkpoints.glob("*/*.json")) and not list(project.folder.rglob("*.tmp"))
    assert not project.went_on()
    ended = project.call()
    assert ended.code == 0, ended.err
    assert project.went_on() and not any(checkpoints.glob("*"))
    assert project.info() == uninterrupted.info()
    assert project.weights() == uninterrupted.weights()


#: A launch with one worker, whose job has something to say just after the parent was killed.
ORPHAN = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
from saelab.progress import Progress
from saelab.runtime.signals import defer_signals
from saelab.launch.executors import JobSet
from saelab.launch.executors.local import run_jobs

def work(job, advance, state):
    parent = os.getppid()
    with defer_signals():
        Path("working").touch()
        while os.getppid() == parent:
            time.sleep(0.01)
        time.sleep(0.2)  # its signal is there by now
        advance(1.0, {"stage": "train"})
        Path("said").touch()

if __name__ == "__main__":
    bar = nullcontext(Progress("", 1))
    run_jobs(JobSet(function=work, jobs=[0], workers=1, logs=Path("logs"), bar=bar))
"""


def test_a_worker_ends_that_has_something_to_say_to_a_parent_which_is_gone(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    process = subprocess.Popen(
        [sys.executable, "orphan.py"], cwd=tmp_path, env=environment(), start_new_session=True
    )
    try:
        wait_for((tmp_path / "working").exists, "the worker", launch=process)
        process.kill()
        process.wait()
        wait_for(lambda: group_is_gone(process.pid), "the worker to end")
    finally:
        stop(process)
    assert (tmp_path / "said").exists()  # the block went on to its end, as for a checkpoint


def test_a_signal_without_workers(tmp_path: Path, uninterrupted: Project) -> None:
    """In the middle of a harvest, of training, and between two cells."""
    project = make(tmp_path / "project")
    places = (".saelab/activations/*/*/partial.json", ".saelab/resume/*/*.json")
    for place in (*places, ".saelab/cells/*/sae.json"):
        process = project.forked(
            lambda own: sys.exit(own.call().code), SAELAB_CHECKPOINT_SECONDS="0"
        )
        assert reached(process, lambda found=place: any(project.folder.glob(found))), place
        os.kill(process, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 143
    ended = project.call()
    assert ended.code == 0, ended.err
    assert project.went_on()
    assert project.info() == uninterrupted.info()
    assert project.weights() == uninterrupted.weights()


def test_a_damaged_cell_is_named_and_made_again(tmp_path: Path, uninterrupted: Project) -> None:
    project = make(tmp_path / "project")
    shutil.copytree(uninterrupted.folder / ".saelab", project.folder / ".saelab")
    cells = [file for file in project.finished_cells() if (file.parent / "sae.json").exists()]
    names = ("sae.safetensors", "cell.json", "curves.parquet")
    for cell, name in zip(cells, names, strict=False):
        content = bytearray((cell.parent / name).read_bytes())
        content[len(content) // 2] ^= 1
        (cell.parent / name).unlink()
        (cell.parent / name).write_bytes(content)
    ended = project.call()
    assert ended.code == 0, ended.err
    for cell, name in zip(cells, names, strict=False):
        assert str(Path(cell.parent.name) / name) in ended.err
    assert ended.err.count("is made again now") == len(names)
    assert project.info() == uninterrupted.info()
    assert project.weights() == uninterrupted.weights()


def test_temporary_files_of_a_killed_writer_do_not_disturb(
    tmp_path: Path, uninterrupted: Project
) -> None:
    """A cell without its last file is not finished, whatever else lies there."""
    project = make(tmp_path / "project")
    project.call()
    victim = project.finished_cells()[0]
    victim.rename(victim.with_name(".cell.json.1.tmp"))
    ended = project.again()
    assert ended.code == 0, ended.err
    assert project.info() == uninterrupted.info()
