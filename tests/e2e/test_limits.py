"""Limits of the machine, set for real: disk, memory, file handles, locks, the clock, numbers."""

from __future__ import annotations

import errno
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
from projects import BASELINE, RATE, Ended, Project, environment, stop, wait_for
from safetensors.torch import load_file, save_file

from saelab.errors import SourceError
from saelab.runtime.exhaustion import ExhaustedError, as_usage_error
from saelab.storage.atomic import read_json, sha256, write_sealed
from saelab.storage.lock import lock_folder

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux has them")
TINY = "study = 'tiny'\nbase = 'configs/small.toml'\ntarget_l0 = 16\nlevels = []\nseeds = 2\n"
#: Settings that matter to no limit, as small as they can be.
SMALLER = {"tokens = 16_384": "tokens = 2_048", "d_sae = 256": "d_sae = 64"}
SMALLER |= {"tokens = 4_000": "tokens = 1_000", "loss_contexts = 8": "loss_contexts = 2"}


def told(ended: Ended, *words: str, code: int = 2) -> None:
    """One sentence at the end of stderr that holds the words."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.last, ended.last


def project_in(folder: Path, *arms: str) -> Project:
    project = Project.make(folder, arms or (BASELINE, RATE), plan=TINY)
    for old, new in SMALLER.items():
        project.replace("configs/small.toml", old, new)
    for name in ("train.txt", "held_out.txt"):
        file = project.folder / name
        file.write_text(file.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = project_in(tmp_path_factory.mktemp("limits") / "project")
    ended = project.call()
    assert ended.code == 0, ended.err
    return project


# ---------------------------------------------------------------- disk


@LINUX
def test_a_limit_on_file_sizes_is_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    project = project_in(tmp_path / "project")
    size = 600_000  # bytes; the first shard is larger

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    told(project.launch(preexec_fn=limit), "shard-00000.safetensors", "the disk is full")
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
@pytest.mark.parametrize("size", ["900k", "4m"])  # full in the harvest, and among the cells
def test_a_full_disk_is_told_and_room_lets_the_same_command_go_on(
    tmp_path: Path, finished: Project, size: str
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        project = project_in(disk / "project")
        told(project.launch(), "the disk is full", "free some space")
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
        project = project_in(disk / "project")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        told(project.launch(), "can't be written", "another folder")


# ---------------------------------------------------------------- memory


def test_a_launch_beyond_its_budget_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = project_in(tmp_path / "project")
    monkeypatch.setenv("SAELAB_MEMORY", "100 MB")
    ended = project.call()
    told(ended, "memory that is needed", "0.10 GB are free", "harvest.batch", "SAELAB_MEMORY")
    assert "needs about" in ended.err  # stated first
    assert not list(project.folder.glob(".saelab/activations/*"))
    monkeypatch.setenv("SAELAB_MEMORY", "much")
    told(project.call(), "SAELAB_MEMORY = 'much'", "8GB")


@LINUX
def test_fewer_workers_are_taken_where_memory_is_short(tmp_path: Path, finished: Project) -> None:
    from saelab.preflight.cost import launch_needs
    from saelab.study.plan import Arm, Run, cells, read_base, read_plan
    from saelab.study.task import GROUP

    project = project_in(tmp_path / "project")
    root = project.folder
    base, plan = read_base(root / "configs/small.toml"), read_plan(root / "plan.toml")
    specs = cells(plan, base, Run("r", [Arm("baseline"), Arm("rate", {"train.lr": 2e-3})]))
    two, one = (launch_needs(base, specs, n, GROUP).memory for n in (2, 1))
    with patch.dict(os.environ, {"SAELAB_MEMORY": str((one + two) // 2)}):
        ended = project.launch(workers=2)
    assert ended.code == 0, ended.err
    assert "1 worker instead of 2, which fits the memory here" in ended.err
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
        place.rmdir()


@LINUX
def test_a_control_group_that_is_too_small_is_told(tmp_path: Path) -> None:
    project = project_in(tmp_path / "project")
    with memory_group(450_000_000) as group:

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        told(project.launch(preexec_fn=join), "memory that is needed", "GB are free here")


@LINUX
def test_memory_that_runs_out_all_the_same_leaves_nothing_half_done(tmp_path: Path) -> None:
    """The address space ends in the middle of the launch, whose statement is overruled. Where a
    library ends the process by itself no sentence can be promised, but no run looks complete, and
    the same command finishes it."""
    code = (
        "import numpy, resource, saelab.launch.launch, scipy.stats, sklearn.metrics\n"
        # a BLAS that finds no memory when it is loaded waits for some for ever
        "scipy.linalg.inv(numpy.eye(64) @ numpy.eye(64))\n"
        "from saelab.launch.worker import load_experiment\n"
        "from saelab.launch.entry import main\n"
        "from pathlib import Path\n"
        "runs = load_experiment(Path('experiment.py').resolve()).RUNS\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 250_000_000,) * 2)\n"
        "main(runs, 'experiment.py')\n"
    )
    project = project_in(tmp_path / "project")
    done = subprocess.run(
        [sys.executable, "-c", code, "--out_dir=run_1"],
        cwd=project.folder,
        env=environment(SAELAB_WORKERS="0", SAELAB_MEMORY="64GB"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert ended.code != 0 and "Traceback" not in ended.err, ended.err
    if ended.code == 2:
        assert "memory is used up" in ended.last and "goes on" in ended.last
    assert not (project.folder / "run_1" / "final_info.json").exists()
    assert project.call().code == 0


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
@pytest.mark.parametrize("handles", [12, 20])
def test_too_few_file_handles_are_told(tmp_path: Path, handles: int) -> None:
    project = project_in(tmp_path / "project")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))

    ended = project.launch(workers=2, preexec_fn=limit)
    if ended.code == 0:
        pytest.skip(f"{handles} handles are enough here")
    told(ended, "no more files can be opened", "ulimit -n")


# ---------------------------------------------------------------- two launches


@LINUX
def test_a_second_launch_into_the_same_folder_is_told_who_has_it(tmp_path: Path) -> None:
    project = project_in(tmp_path / "project")
    first = project.start(workers=1)
    try:
        lock = project.folder / ".run_1.lock"
        wait_for(lambda: lock.is_file() and bool(lock.read_bytes()), "the first launch's lock")
        os.killpg(first.pid, signal.SIGSTOP)  # it stays as it is while the second one looks
        told(project.call(), "run_1 is in use", f"process {first.pid} on ", "wait for it")
        os.killpg(first.pid, signal.SIGCONT)
    finally:
        stop(first)
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
    project = project_in(tmp_path / "project")
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
    project = project_in(tmp_path / "project", BASELINE, RATE, wild)
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
    project = project_in(tmp_path / "project")
    project.replace("configs/small.toml", "context = 32", "context = 32\nactivations = 'acts'")
    (project.folder / "acts").mkdir()
    for name in "abc":
        x = torch.randn(256, 8)
        x[7, 2] = math.inf if name == "b" else 0.0
        save_file({"x": x}, project.folder / "acts" / f"{name}.safetensors")
    told(project.call(), "b.safetensors", "not finite")
