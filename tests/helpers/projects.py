"""Small projects in a folder of their own, started the way a user starts them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from saelab.data.text import stdlib
from saelab.progress.journal import Tail
from saelab.runtime.signals import preserve_handlers
from saelab.storage.atomic import read_json, sha256

ROOT = Path(__file__).parents[2]
#: Variables of the caller that would change what a launch does.
OWN_VARIABLES = (
    "SAELAB_CACHE",
    "SAELAB_WORKERS",
    "SAELAB_PROGRESS",
    "SAELAB_CHECKPOINT_SECONDS",
)
#: Characters of standard-library source that small projects train on and are evaluated on.
CHARACTERS = {"train": 60_000, "held_out": 20_000}

EXPERIMENT = """\
from saelab.launch.entry import main
from saelab.study.plan import Arm, Run

{code}
RUNS = {{"run_1": Run("A small run", [{arms}], {changes})}}

if __name__ == "__main__":
    main(RUNS, __file__)
"""

BASELINE = 'Arm("baseline", comment="as the base says")'
RATE = 'Arm("rate", {"train.lr": 2e-3}, "half the learning rate", primary=True)'
SCALED = 'Arm("scaled", {"sae.scaling": {"kind": "variance", "tau": 0.5}}, "variance scaling")'
ARMS = (BASELINE, RATE, SCALED)

PLAN = """\
study = "small"
base = "configs/small.toml"
target_l0 = 16
levels = [8]
seeds = 3
seeds_other = 2
seeds_levels = 1
"""

#: TopK, so that every arm has the target L0 after however few steps.
BASE = """\
hook_name = "blocks.2.hook_resid_post"
context = 32

[train_text]
kind = "files"
path = "train.txt"

[eval_text]
kind = "files"
path = "held_out.txt"

[sae]
d_sae = 256
activation = { kind = "topk", k = 16 }
losses = [{ kind = "reconstruction" }, { kind = "auxk" }]
controllers = []
constraints = [{ kind = "unit_norm" }]

[train]
tokens = 8_192
batch_size = 128
lr = 4e-3

[evaluation]
tokens = 2_000
loss_contexts = 4
probing = { entries = "none" }
"""

#: Two seeds of every arm at the target L0.
TWO_SEEDS = """\
study = "small"
base = "configs/small.toml"
target_l0 = 16
levels = []
seeds = 2
"""
#: As small as they can be, for launches whose numbers do not matter: 16 steps.
SMALLEST = {
    "tokens = 8_192": "tokens = 2_048",
    "d_sae = 256": "d_sae = 64",
    "tokens = 2_000": "tokens = 1_000",
    "loss_contexts = 4": "loss_contexts = 2",
}


#: The same for twice as many steps, after which arms have settled near their L0.
LONGER = BASE.replace("tokens = 8_192", "tokens = 16_384")

#: Own code of an experiment.py: a loss term whose strength a file next to it decides.
HELPED_LOSS = """
from typing import Literal

import helper

from saelab import register
from saelab.parts.base import Dims, LossTerm, PartConfig, Pass


class SquareConfig(PartConfig):
    kind: Literal["square"] = "square"

    def build(self, dims: Dims) -> "Square":
        return Square()


class Square(LossTerm):
    def loss(self, p: Pass):
        return helper.STRENGTH * p.code.values.square().mean()


register("loss", SquareConfig)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of stderr, which names what, where and the remedy."""
        return (self.err.rstrip("\n").splitlines() or [""])[-1]


@dataclass(frozen=True)
class Copy:
    """A copy of this process that leads a process group of its own."""

    pid: int

    def kill(self) -> None:
        """Kills it alone and waits for it."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def stop(self) -> None:
        """Kills what is left of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            self.wait()


@dataclass(frozen=True)
class Project:
    """A folder with experiment.py, plan.toml, configs/small.toml and two text files."""

    folder: Path

    @classmethod
    def make(
        cls,
        folder: Path,
        arms: tuple[str, ...] = ARMS,
        code: str = "",
        changes: str = "{}",
        plan: str = PLAN,
        base: str = BASE,
    ) -> Project:
        (folder / "configs").mkdir(parents=True)
        project = cls(folder)
        project.write("plan.toml", plan)
        project.write("configs/small.toml", base)
        project.table(arms, code, changes)
        for split, size in CHARACTERS.items():
            project.write(f"{split}.txt", "\n".join(stdlib.texts(split))[:size])
        return project

    @classmethod
    def make_smallest(cls, folder: Path, *arms: str, plan: str = TWO_SEEDS) -> Project:
        base = BASE
        for old, new in SMALLEST.items():
            assert base.count(old) == 1, old
            base = base.replace(old, new)
        project = cls.make(folder, arms or (BASELINE, RATE), plan=plan, base=base)
        for name in ("train.txt", "held_out.txt"):
            project.write(name, (folder / name).read_text(encoding="utf-8")[:20_000])
        return project

    @classmethod
    def finished_baseline(cls, folder: Path) -> Project:
        """One complete run of the baseline."""
        project = cls.make_smallest(folder, BASELINE)
        ended = project.call()
        assert ended.code == 0, ended.err
        return project

    def first_cell(self) -> Path:
        """Folder of the first cell of run_1's baseline."""
        return min((self.folder / "run_1" / "cells" / "baseline").iterdir())

    def copied(self, folder: Path) -> Project:
        """The same in another folder, with all that it has made."""
        shutil.copytree(self.folder, folder)
        return Project(folder)

    def table(self, arms: tuple[str, ...], code: str = "", changes: str = "{}") -> None:
        """Writes experiment.py."""
        table = EXPERIMENT.format(arms=", ".join(arms), code=code, changes=changes)
        self.write("experiment.py", table)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def replace(self, name: str, old: str, new: str) -> None:
        """Edits one file."""
        text = (self.folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        self.write(name, text.replace(old, new))

    def launch(self, *arguments: str, workers: int = 1) -> Ended:
        """`python experiment.py --out_dir=run_1` in a process of its own, as a user starts it."""
        variables = {"SAELAB_WORKERS": str(workers)}
        given = arguments or ("--out_dir=run_1",)
        return run(self.folder, "experiment.py", *given, variables=variables)

    def start(self, workers: int, **variables: str) -> Copy:
        """The same in a copy of this process, not waited for; what it prints goes into the files
        `stdout` and `stderr` of the folder."""
        own = environment(SAELAB_WORKERS=str(workers), **variables)

        def started(project: Project) -> None:
            with (
                patch.dict(os.environ, own, clear=True),
                patch.object(sys, "argv", ["experiment.py", "--out_dir=run_1"]),
                (project.folder / "stdout").open("w") as out,
                (project.folder / "stderr").open("w") as err,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                as_if_fresh(),
            ):
                project.main()

        return Copy(self.forked(started))

    def main(self) -> None:
        """What experiment.py does when it is started. It is the main module here too, which workers
        import."""
        from saelab.launch.entry import main
        from saelab.study.experiment_file import load_experiment

        file = str(self.folder / "experiment.py")
        module = ModuleType("__main__")
        module.__file__ = file
        before, sys.modules["__main__"] = sys.modules["__main__"], module
        try:
            main(load_experiment(Path(file)).RUNS, file)
        finally:
            sys.modules["__main__"] = before

    def call(self, *arguments: str, workers: int = 0) -> Ended:
        """The same in this process, which saves the seconds that a new one takes to import; workers
        are processes of their own here too."""
        given = arguments or ("--out_dir=run_1",)
        return called(self.folder, self.main, *given, workers=str(workers))

    def call_forked(
        self, limit: Callable[[], object], *arguments: str, workers: int = 0, **variables: str
    ) -> Ended:
        """`call` in a copy of this process, to which `limit` first does what can't be undone, and
        of which nothing is left."""
        receiving, sending = os.pipe()

        def limited(project: Project) -> None:
            limit()
            ended = project.call(*arguments, workers=workers)
            os.write(sending, json.dumps(asdict(ended)).encode())  # a pipe holds 64 kB

        process = Copy(self.forked(limited, **variables))
        os.close(sending)
        with os.fdopen(receiving, "rb") as pipe:
            content = pipe.read()
        assert process.wait() == 0
        wait_for(lambda: group_is_gone(process.pid), "its workers to end")
        return Ended(**json.loads(content))

    def forked(self, function: Callable[[Project], object], **variables: str) -> int:
        """Calls the function in a copy of this process that leads a process group of its own, so
        that no import is waited for; it ends with 0 where the function returns, else with the
        code of its SystemExit. Gives its id."""
        child = os.fork()
        if child:
            return child
        os.setsid()
        code = 1
        try:
            renew_threads()
            with patch.dict(os.environ, variables), contextlib.chdir(self.folder):
                function(self)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception:  # pytest shows what is written to the file handle
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def again(self) -> Ended:
        """`call` after the run folder was deleted; the cache stays."""
        shutil.rmtree(self.folder / "run_1")
        return self.call()

    def info(self, run: str = "run_1") -> dict[str, Any]:
        return read_json(self.folder / run / "final_info.json")

    def manifest(self, run: str = "run_1") -> dict[str, Any]:
        return read_json(self.folder / run / "manifest.json")

    def weights(self, run: str = "run_1") -> dict[str, str]:
        """Cell -> hash of its weights."""
        cells = self.folder / run / "cells"
        files = sorted(cells.rglob("*.safetensors"))
        return {str(file.relative_to(cells).parent): sha256(file) for file in files}

    def went_on(self, run: str = "run_1") -> list[int]:
        """The steps of the checkpoints from which cells went on, over all launches of the run."""
        lines = Tail(self.folder / run / "metrics.jsonl").lines()
        return [line["from_step"] for line in lines if line.get("from_step")]

    def finished_cells(self) -> list[Path]:
        return sorted((self.folder / ".saelab" / "cells").glob("*/cell.json"))


def cli(folder: Path, *arguments: str) -> Ended:
    """`saelab ...` in this process, without workers."""
    from saelab.cli import main

    return called(folder, main, *arguments)


def run(
    folder: Path,
    *arguments: str,
    variables: dict[str, str] | None = None,
    timeout: float = 600,
    **started: Any,
) -> Ended:
    """`python ...` in a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(**(variables or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        **started,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def environment(**variables: str) -> dict[str, str]:
    """The caller's variables without our own; this checkout is what is imported.

    One thread each: tests run side by side, and threads that wait for each other on busy cores
    make a harvest many times slower.
    """
    kept = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    path = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return kept | own | variables


def called(
    folder: Path, function: Callable[[], object], *arguments: str, workers: str = "0"
) -> Ended:
    """A command's own function, with its arguments, folder, output and exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    resource_tracker.ensure_running()  # here: one that workers start would stay in the folder
    with (
        contextlib.chdir(folder),
        patch.object(sys, "argv", ["command", *arguments]),
        patch.dict(os.environ, {"SAELAB_WORKERS": workers}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        as_if_fresh(),
        preserve_handlers(),  # a process that a signal ends ignores further ones
    ):
        for name in ("SAELAB_CACHE", "SAELAB_PROGRESS"):
            os.environ.pop(name, None)
        try:
            function()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:  # as the interpreter would end
            traceback.print_exc()
            code = 1
    return Ended(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def as_if_fresh() -> Iterator[None]:
    """Forgets run tables read earlier; parts that one registers, and the files next to it that it
    imports, are gone afterwards."""
    from saelab.parts import TABLE

    before = {seam: dict(kinds) for seam, kinds in TABLE.items()}
    sys.modules.pop("saelab_experiment", None)
    here, places, loaded = Path.cwd(), list(sys.path), set(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = places
        for name in set(sys.modules) - loaded:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(here) and not name.startswith("saelab"):
                del sys.modules[name]
        for seam in list(TABLE):
            TABLE[seam] = before.get(seam, {})


def renew_threads() -> None:
    """After a fork torch replaces its pool of threads at first use, which fails where several
    threads use it first, as those that read a model's weights do: it is used here."""
    import torch

    torch.set_num_threads(1)


def wait_for(
    condition: Callable[[], bool],
    what: str,
    seconds: float = 300,
    *,
    launch: subprocess.Popen[Any] | None = None,
) -> None:
    """Waits for a condition; fails after `seconds`, or at once where the launch ends before it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        assert launch is None or launch.poll() is None, f"the launch ended before {what}"
        time.sleep(0.02)


def reached(process: int, there: Callable[[], bool]) -> bool:
    """Waits; False where the copy of this process, waited for, ended first, with 0."""
    while not there():
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    return True


def group_is_gone(group: int) -> bool:
    """Whether no process of the group runs. One that has ended and that the machine's first
    process has not yet asked about does not run."""
    if not Path("/proc/self/stat").exists():
        return not _has_members(group)
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its_group = file.read_text().rpartition(") ")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return False
    return True


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
