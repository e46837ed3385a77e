"""A launch that is killed anywhere ends with the bits of one that was not.

The launch runs in copies of this process, without workers, so that a kill costs no start. Each kill
takes the whole process group; the next launch is the same command in the same folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from projects import BASE, BASELINE, PLAN, Project, reached

from saelab.seeding import numpy_stream
from saelab.storage.atomic import FAILPOINT
from saelab.training.resume import INTERVAL_VARIABLE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of a process are forks")

#: An arm with much running state: statistics, a learned temperature, resets, lifetimes, a penalty.
BUSY = """Arm("busy", {
    "sae.scaling": {"kind": "variance", "temperature": "learned"},
    "sae.losses+": {"kind": "similarity", "balance": "minimax", "k": 20},
    "sae.observers": [
        {"kind": "resampling", "every": 0.1, "patience": 1000},
        {"kind": "lifetimes", "base_steps": 5},
    ],
}, "much state", primary=True)"""

#: Names of files that are written for several things at once.
PLACES = {
    r".*/activations/.*/shard-.*": "*/activations/*/shard-*",
    r".*/activations/.*/(.*\.json)": r"*/activations/*/\1",
    r".*/resume/.*(\..*)": r"*/resume/*\1",
    r".*/pairs/.*": "*/pairs/*",
    r".*/cells/[0-9a-f]*/(.*)": r"*/cells/*/\1",
    r".*/run_1/(.*)": r"*/run_1/\1",
    r".*/run_1_.*(\..*)": r"*/run_1_*\1",
}


def make(folder: Path) -> Project:
    base = BASE.replace("tokens = 16_384", "tokens = 8_192")
    base = base.replace("[evaluation]", "[harvest]\nshard_tokens = 3_000\n\n[evaluation]")
    plan = PLAN.replace("seeds = 3", "seeds = 2")
    return Project.make(folder / "project", (BASELINE, BUSY), plan=plan, base=base)


def study(project: Project) -> None:
    """What is killed: the launch, then its pictures."""
    from saelab.report.figures.common import draw

    if not (project.folder / "run_1" / "final_info.json").exists():
        ended = project.call()
        assert ended.code == 0, ended.err
    draw({"run_1": "Killed"})


def traced(project: Project, trace: Path, pattern: str = "*", n: int = 0) -> int:
    """Starts it with a checkpoint after every round; gives the process's id."""
    trace.write_text("")
    variables = {FAILPOINT: f"{trace}:{pattern}:{n}", INTERVAL_VARIABLE: "0"}
    return project.forked(study, **variables)


def ended(process: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(project: Project) -> dict[str, bytes]:
    """All that a run leaves behind but for times and the number of its attempts. Of pictures only
    that they are there: what lays them out rounds differently from process to process."""
    run = project.folder / "run_1"
    found = {str(file.relative_to(run)): file for file in run.rglob("*") if file.is_file()}
    for name in ("manifest.json", "summary.md", "metrics.jsonl"):
        found.pop(name)
    pictures = {file.name: b"" for file in project.folder.glob("run_1_*.*")}
    return {name: file.read_bytes() for name, file in found.items()} | pictures


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[str]]:
    """Its content, and the files that it writes in their order."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    project = make(folder)
    assert ended(traced(project, folder / "trace")) == 0
    return content(project), (folder / "trace").read_text().splitlines()


def kinds(writes: list[str]) -> list[str]:
    """A pattern for each kind of file, in the order in which they are first written."""
    found = []
    for write in writes:
        hits = [
            re.sub(p, pattern, write) for p, pattern in PLACES.items() if re.fullmatch(p, write)
        ]
        found.append(hits[0] if hits else f"*/{Path(write).name}")
    return list(dict.fromkeys(found))


def assert_same(project: Project, wanted: dict[str, bytes]) -> None:
    found = content(project)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if found[name] != wanted[name]]
    assert not list((project.folder / ".saelab" / "resume").glob("*"))


def killed_at_files(folder: Path, patterns: list[str], wanted: dict[str, bytes]) -> int:
    """Kills launch after launch, each at the first file of one more kind, of which
    checkpoints are one; how many were killed."""
    project = make(folder)
    killed = 0
    for pattern in patterns:
        n = 2 if "resume" in pattern else 1
        killed += ended(traced(project, folder / "trace", pattern, n)) == -signal.SIGKILL
    assert ended(traced(project, folder / "trace")) == 0
    assert_same(project, wanted)
    assert project.went_on()
    return killed


def killed_at_moments(
    folder: Path, moments: int, writes: int, wanted: dict[str, bytes], draw: np.random.Generator
) -> int:
    """Kills launch after launch from outside, after a random number of writes and a little while;
    one that came through is begun anew. How many were killed."""
    project, trace = make(folder), folder / "trace"
    killed = 0
    while killed < moments:
        process = traced(project, trace)
        after, wait = int(draw.integers(0, writes // 3)), float(draw.uniform(0, 0.1))
        if reached(process, lambda n=after: trace.read_bytes().count(b"\n") >= n):
            time.sleep(wait)
            os.killpg(process, signal.SIGKILL)
            code = ended(process)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
        if (project.folder / "run_1_loss.png").exists():
            assert ended(traced(project, trace)) == 0
            assert_same(project, wanted)
            shutil.rmtree(project.folder)
            project = make(folder)
    assert ended(traced(project, trace)) == 0
    assert_same(project, wanted)
    return killed


FEW = ("*/shard-*", "*/resume/*.json", "*/cells/*/cell.json", "*/run_1/final_info.json")


def test_a_few_kills(
    tmp_path: Path, uninterrupted: tuple[dict[str, bytes], list[str]], global_random_seed: int
) -> None:
    wanted, writes = uninterrupted
    few = [kind for kind in kinds(writes) if any(one.split("*")[-1] in kind for one in FEW)]
    assert killed_at_files(tmp_path, few[:5], wanted) >= 4


@pytest.mark.slow
def test_a_kill_at_every_kind_of_file(
    tmp_path: Path, uninterrupted: tuple[dict[str, bytes], list[str]]
) -> None:
    wanted, writes = uninterrupted
    every = kinds(writes)
    assert len(every) >= 20
    killed = killed_at_files(tmp_path, every, wanted)
    print(f"{killed} kills at {len(every)} kinds of files")
    assert killed >= 20


@pytest.mark.slow
def test_kills_at_random_moments(
    tmp_path: Path, uninterrupted: tuple[dict[str, bytes], list[str]], global_random_seed: int
) -> None:
    wanted, writes = uninterrupted
    draw = numpy_stream(global_random_seed, "moments of kills")
    killed = killed_at_moments(tmp_path, 20, len(writes), wanted, draw)
    print(f"{killed} kills at random moments of {len(writes)} writes")
    assert killed == 20
