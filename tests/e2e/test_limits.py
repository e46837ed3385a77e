"""Limits of the machine, set for real: disk, memory, file handles, locks, the clock, numbers."""

from __future__ import annotations

import errno
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from projects import BASELINE, RATE, Ended, Project, environment, wait_for
from safetensors.torch import load_file, save_file

from saelab.errors import SourceError
from saelab.runtime.exhaustion import ExhaustedError, as_usage_error
from saelab.storage.atomic import read_json, sha256, write_sealed
from saelab.storage.lock import lock_folder

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux has them")


def told(ended: Ended, *words: str, code: int = 2) -> None:
    """One sentence at the end of stderr that holds the words."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.last, ended.last


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make_smallest(tmp_path_factory.mktemp("limits") / "project")
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


# ---------------------------------------------------------------- disk


@LINUX
def test_a_limit_on_file_sizes_is_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, unlimited[1]))  # the first shard is larger
    try:
        ended = project.call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    told(ended, "shard-00000.safetensors", "the disk is full")
    assert not list(project.folder.rglob("*.tmp"))
    assert project.call().code == 0


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of its own, where this user may mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@LINUX
@pytest.mark.parametrize(
    ("size", "workers"),
    [("900k", 0), ("4m", 1)],  # full in the harvest, and among the cells, which a worker writes
)
def test_a_full_disk_is_told_and_room_lets_the_same_command_go_on(
    tmp_path: Path, finished: Project, size: str, workers: int
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        project = Project.make_smallest(disk / "project")
        told(project.call(workers=workers), "the disk is full", "free some space")
        assert not (project.folder / "run_1" / "final_info.json").exists()
        assert not list(project.folder.rglob("*.tmp"))
        grow = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(grow, check=True)
        assert project.call().code == 0
        assert project.info() == finished.info()


@LINUX
def test_a_read_only_file_system_is_told_before_training(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "8m"):
        project = Project.make_smallest(disk / "project")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        told(project.call(), "can't be written", "another folder")


# ---------------------------------------------------------------- memory


def test_a_launch_beyond_its_budget_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.make_smallest(tmp_path / "project")
    monkeypatch.setenv("SAELAB_MEMORY", "100 MB")
    ended = project.call()
    told(ended, "memory that is needed", "0.10 GB are free", "harvest.batch", "SAELAB_MEMORY")
    assert "needs about" in ended.err  # stated first
    assert not list(project.folder.glob(".saelab/activations/*"))
    monkeypatch.setenv("SAELAB_MEMORY", "much")
    told(project.call(), "SAELAB_MEMORY = 'much'", "8GB")


def needed(project: Project, workers: int) -> int:
    """Bytes that the two arms need."""
    from saelab.preflight.cost import launch_needs
    from saelab.study.plan import Arm, Run, cells, read_base, read_plan
    from saelab.study.task import GROUP

    root = project.folder
    base, plan = read_base(root / "configs/small.toml"), read_plan(root / "plan.toml")
    specs = cells(plan, base, Run("r", [Arm("baseline"), Arm("rate", {"train.lr": 2e-3})]))
    return launch_needs(base, specs, workers, GROUP).memory


@LINUX
def test_fewer_workers_are_taken_where_memory_is_short(tmp_path: Path, finished: Project) -> None:
    project = Project.make_smallest(tmp_path / "project")
    between = (needed(project, 0) + needed(project, 1)) // 2
    with patch.dict(os.environ, {"SAELAB_MEMORY": str(between)}):
        ended = project.call(workers=1)
    assert ended.code == 0, ended.err
    assert "0 workers instead of 1, which fits the memory here" in ended.err
    assert project.info() == finished.info() and project.weights() == finished.weights()


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of the first version with a limit, where this user may make one."""
    root = Path("/sys/fs/cgroup/memory")
    own = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
           if "memory" in line.split(":")[1]]  # fmt: skip
    if not own or not root.is_dir():
        pytest.skip("no memory control group of the first version")
    place = root / own[0].strip("/") / f"saelab-test-{os.getpid()}"
    try:
        place.mkdir()
        (place / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        with pytest.MonkeyPatch.context():
            place.exists() and place.rmdir()
        pytest.skip(f"no control group can be made here ({error})")
    try:
        yield place
    finally:
        wait_for(lambda: removed(place), "the last process to leave the group", 30)


def removed(group: Path) -> bool:
    """False while a process that has ended has not yet left it."""
    try:
        group.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@LINUX
def test_a_control_group_that_is_too_small_is_told(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    with memory_group(needed(project, 0) * 9 // 10) as group:

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        told(project.call_forked(join), "memory that is needed", "GB are free here")


#: A loss term that takes 1 GiB of address space for a moment, in the middle of training.
GREEDY = """
from typing import Literal

import torch

from saelab import register
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class GreedyConfig(PartConfig):
    kind: Literal["greedy"] = "greedy"

    def build(self, dims: Dims) -> "Greedy":
        return Greedy()


class Greedy(LossTerm):
    def loss(self, p: Pass):
        if p.step == 8:
            torch.empty(2**30, dtype=torch.uint8)
        return 0.0 * p.recon.sum()


register("loss", GreedyConfig)
"""


@LINUX
def test_memory_that_runs_out_all_the_same_leaves_nothing_half_done(
    tmp_path: Path, finished: Project
) -> None:
    """The address space ends in the middle of the launch, whose statement is overruled: it leaves
    half of what one of its steps takes, which is enough for everything else, as all libraries are
    loaded and warm in this process. No run looks complete, and the same command finishes it."""
    project = Project.make_smallest(tmp_path / "project")
    project.table((BASELINE, 'Arm("greedy", {"sae.losses+": {"kind": "greedy"}})'), GREEDY)

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**29
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    told(project.call_forked(limit, SAELAB_MEMORY="64GB"), "memory is used up", "goes on")
    assert any(project.folder.glob(".saelab/activations/*/*/header.json"))
    assert not (project.folder / "run_1" / "final_info.json").exists()
    ended = project.call()
    assert ended.code == 0, ended.err
    of_baseline = {name: h for name, h in project.weights().items() if "baseline" in name}
    assert of_baseline and of_baseline.items() <= finished.weights().items()


def test_a_failed_allocation_is_one_sentence() -> None:
    for raised in (MemoryError(), RuntimeError("std::bad_alloc"), OSError(errno.ENOMEM, "")):
        with pytest.raises(ExhaustedError, match="memory is used up"), as_usage_error():
            raise raised
    with pytest.raises(ExhaustedError, match="memory is used up"), as_usage_error():
        try:
            raise RuntimeError("can't allocate memory")
        except RuntimeError as error:
            raise SourceError("a model can't be loaded") from error
    for other in (ZeroDivisionError(), SourceError("a model can't be loaded")):
        with pytest.raises(type(other)), as_usage_error():
            raise other


# ---------------------------------------------------------------- file handles


@LINUX
@pytest.mark.parametrize(("handles", "harvested"), [(2, False), (12, True)])
def test_too_few_file_handles_are_told(tmp_path: Path, handles: int, harvested: bool) -> None:
    """Handles that are left: too few to read the model, and enough until workers are started."""
    project = Project.make_smallest(tmp_path / "project")

    def limit() -> None:
        used = {int(handle.name) for handle in Path("/proc/self/fd").iterdir()}
        free = (number for number in itertools.count() if number not in used)
        most = next(itertools.islice(free, handles, None))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    ended = project.call_forked(limit, workers=2)
    told(ended, "no more files can be opened", "ulimit -n")
    assert any(project.folder.glob(".saelab/activations/*/*/header.json")) == harvested


# ---------------------------------------------------------------- two launches


@LINUX
def test_a_second_launch_into_the_same_folder_is_told_who_has_it(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    first = project.forked(lambda own: own.call())
    try:
        lock = project.folder / ".run_1.lock"
        wait_for(lambda: lock.is_file() and bool(lock.read_bytes()), "the first launch's lock")
        os.kill(first, signal.SIGSTOP)  # it stays as it is while the second one looks
        told(project.call(), "run_1 is in use", f"process {first} on ", "wait for it")
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert lock.is_file()  # of the killed one: it locks nothing any more
    with lock_folder(project.folder / "run_1", "is tested"):
        pass
    assert not lock.exists()


def test_a_harvest_that_another_process_makes_is_told(tmp_path: Path, finished: Project) -> None:
    project = finished.copied(tmp_path / "project")
    header = sorted(project.folder.glob(".saelab/activations/*/*/header.json"))[0]
    header.unlink()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom saelab.storage.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), 'is harvesting these activations'):\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(header.parent)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        told(project.again(), f"process {other.pid} on ", "is harvesting these activations")
    finally:
        other.kill()
        other.wait()
    ended = project.call()
    assert ended.code == 0, ended.err
    assert project.info() == finished.info()


# ---------------------------------------------------------------- the clock


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, finished: Project) -> None:
    project = Project.make_smallest(tmp_path / "project")
    hours = iter(range(10**6))
    now = time.time()
    real = time.gmtime

    def earlier() -> float:
        return now - 3600 * next(hours)

    with patch("time.time", earlier), patch("time.gmtime", lambda *_: real(earlier())):
        assert project.call().code == 0
        for file in project.folder.rglob("*"):
            os.utime(file, (0, 0), follow_symlinks=False)
        ended = project.again()
    assert ended.code == 0 and "to train" not in ended.err, ended.err
    assert project.info() == finished.info() and project.weights() == finished.weights()
    assert read_json(project.folder / "run_1/manifest.json")["seconds"] >= 0


# ---------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_not_finite_stops_its_cell_alone(tmp_path: Path, finished: Project) -> None:
    wild = 'Arm("wild", {"train.lr": 1e30})'
    project = Project.make_smallest(tmp_path / "project", BASELINE, RATE, wild)
    ended = project.call()
    assert ended.code == 0, ended.err
    summary = (project.folder / "run_1" / "summary.md").read_text()
    assert "wild" in summary and "not finite" in summary and "step" in summary
    ours, theirs = project.info(), finished.info()
    for arm in ("baseline", "rate"):
        assert ours[arm]["final_info_dict"]["fvu"] == theirs[arm]["final_info_dict"]["fvu"]
    assert all(value is None for value in ours["wild"]["final_info_dict"].get("fvu", [None]))


def test_nan_in_harvested_activations_names_step_and_cell(
    tmp_path: Path, finished: Project
) -> None:
    """A harvest checks what it stores, so the NaN is put there with a checksum of its own."""
    project = finished.copied(tmp_path / "project")
    headers = sorted(project.folder.glob(".saelab/activations/*/*/header.json"))
    header = max(headers, key=lambda file: read_json(file)["header"]["n_tokens"])
    record = read_json(header)
    file = header.with_name(record["shards"][0]["file"])
    tensors = load_file(file)
    tensors["x"][-1, -1, 3] = math.nan
    save_file(tensors, file)
    record["shards"][0] |= {"sha256": sha256(file), "bytes": file.stat().st_size}
    write_sealed(header, {name: value for name, value in record.items() if name != "digest"})
    ended = project.again()
    assert ended.code == 1 and "Traceback" not in ended.err, ended.err
    assert "baseline has no valid cell" in ended.last and "step" in ended.last, ended.last


def test_nan_in_a_foreign_folder_names_the_file(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    project.replace("configs/small.toml", "context = 32", "context = 32\nactivations = 'acts'")
    (project.folder / "acts").mkdir()
    for name in "abc":
        x = torch.randn(256, 8)
        x[7, 2] = math.inf if name == "b" else 0.0
        save_file({"x": x}, project.folder / "acts" / f"{name}.safetensors")
    told(project.call(), "b.safetensors", "not finite")
