"""A launch that trains beside its harvest: the same bits, the same errors, nothing left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from projects import BASE, BASELINE, RATE, TWO_SEEDS, Project, group_is_gone, wait_for

from saelab.data.activations.store import FolderSource

#: Eight shards of training activations.
SHARDS = "\n[harvest]\nshard_tokens = 1_100\noverlap = {0}\n"
#: The harvest of the training activations waits after each of the first three shards until a worker
#: has read it, so that the two are certainly at work together; then `{0}`. A worker does `{1}` once
#: it has read a shard.
TOGETHER = """\
import os, time
from pathlib import Path
from saelab.data.activations.store import FolderWriter
from saelab.data.activations.growing import GrowingSource
from saelab.errors import SourceError

def add(self, shard, add=FolderWriter.add):
    add(self, shard)
    if self.header["n_tokens"] > 5_000:
        while self.done <= 3 and not Path(f"read-{{self.done - 1}}").exists():
            time.sleep(0.01)
        if self.done >= 3:
            {0}

def read(self, i, shard=GrowingSource.shard):
    found = shard(self, i)
    Path(f"read-{{i}}").touch()
    {1}
    return found

FolderWriter.add, GrowingSource.shard = add, read
"""


def project(folder: Path, overlap: bool, harvester: str = "pass", worker: str = "pass") -> Project:
    code = TOGETHER.format(harvester, worker) if overlap else ""
    base = BASE + SHARDS.format(str(overlap).lower())
    return Project.make(folder, (BASELINE, RATE), code, plan=TWO_SEEDS, base=base)


def harvested(made: Project) -> list[Path]:
    """Complete folders of activations."""
    return [file.parent for file in made.folder.glob(".saelab/activations/*/*/header.json")]


def read(made: Project) -> set[str]:
    """Shards that a worker read while others were still to be made."""
    return {file.name for file in made.folder.glob("read-*")}


def finish(made: Project, whole: Project) -> None:
    """The same command, now undisturbed, ends with the bits of a launch without overlap."""
    made.table((BASELINE, RATE))
    ended = made.call()
    assert ended.code == 0, ended.err
    same(made, whole)


def same(made: Project, whole: Project) -> None:
    assert made.weights() == whole.weights()
    assert made.manifest()["cells"] == whole.manifest()["cells"]
    assert made.manifest()["data"] == whole.manifest()["data"]
    files = [p.folder / "run_1" / "final_info.json" for p in (made, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A launch whose harvest is complete before it trains."""
    made = project(tmp_path_factory.mktemp("whole") / "project", overlap=False)
    ended = made.call()
    assert ended.code == 0, ended.err
    assert {FolderSource.open(folder).n_shards for folder in harvested(made)} == {8, 2}
    return made


def test_a_launch_that_overlaps_has_the_keys_and_bits_of_one_that_does_not(
    tmp_path: Path, whole: Project
) -> None:
    made = project(tmp_path / "project", overlap=True)
    ended = made.call_forked(lambda: None, workers=2)
    assert ended.code == 0, ended.err
    assert {"read-0", "read-1", "read-2"} <= read(made)
    assert "both at once" in ended.err and "Traceback" not in ended.err
    same(made, whole)
    assert [f.parent.name for f in made.finished_cells()] == [
        f.parent.name for f in whole.finished_cells()
    ]
    made.table((BASELINE, RATE))
    assert "to train" not in made.again().err  # the cells are in the cache, under those keys


def test_without_workers_the_harvest_comes_first(tmp_path: Path, whole: Project) -> None:
    made = project(tmp_path / "project", overlap=True)
    finish(made, whole)


def test_an_error_in_the_harvest_ends_the_launch_with_its_sentence(
    tmp_path: Path, whole: Project
) -> None:
    made = project(tmp_path / "p", True, harvester='raise SourceError("no more text: add some")')
    ended = made.call_forked(lambda: None, workers=1)
    assert (ended.code, ended.last) == (2, "no more text: add some")
    assert "Traceback" not in ended.err
    assert read(made) == {"read-0", "read-1", "read-2"}  # and were waiting for the fourth
    assert not made.finished_cells() and not (made.folder / "run_1").exists()
    stored = sorted(made.folder.glob(".saelab/activations/*/*/shard-0000[0-2].safetensors"))
    before = [file.stat().st_mtime_ns for file in stored]
    finish(made, whole)
    assert [file.stat().st_mtime_ns for file in stored] == before  # these were not made again


def test_an_error_in_a_worker_ends_the_harvest(tmp_path: Path, whole: Project) -> None:
    failing = 'if i == 2: raise SourceError("no such shard: mend it")'
    made = project(tmp_path / "p", True, "time.sleep(1)", failing)
    ended = made.call_forked(lambda: None, workers=1)
    assert (ended.code, ended.last) == (2, "no such shard: mend it")
    assert len(harvested(made)) == 1  # what it is evaluated on
    finish(made, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are bound on Linux only")
def test_a_launch_killed_in_its_harvest_leaves_no_process_and_goes_on(
    tmp_path: Path, whole: Project
) -> None:
    made = project(tmp_path / "project", True, harvester="time.sleep(1000)")
    process = made.start(workers=1)
    try:
        wait_for(lambda: "read-2" in read(made), "a worker to read the third shard")
        process.kill()  # the parent alone
        wait_for(lambda: group_is_gone(process.pid), "the workers to end")
    finally:
        process.stop()
    assert len(harvested(made)) == 1  # what it is evaluated on
    finish(made, whole)
