"""Compares a launch of 9 cells with the work it must do: one harvest and 9 times the bare steps.

    python benchmarks/launch.py [--quick] [--tokens 128000]

The launch is `python experiment.py --out_dir=run_1` in a separate folder: three arms (ReLU, TopK,
JumpReLU), three seeds, the embedded language model, no probing, nothing cached. The bare work is
the same harvest alone and, for each arm, the steps of one cell alone on batches that are already in
memory, over the whole run, because the cost of a step changes with its L0. Everything runs on one
thread, as in a launch.

    bare          harvest + 3 x (steps of each arm), one core
    training      harvest + training of the cells, by the clocks of the launch
    whole launch  from the command to its end: the above, plus start-up, tokenising, the held-out
                  harvest, evaluation, controls, verdict and files
    all cached    the same command again without the run folder: only start-up, verdict and files
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import (
    HERE,
    Contestant,
    Section,
    alternate,
    parser,
    quartiles,
    run,
    save,
    scratch,
    table,
    target_of,
)

import saelab
from saelab.data import language_model
from saelab.data.activations.harvest import harvest
from saelab.data.activations.store import Source
from saelab.data.activations.stream import batches
from saelab.data.text.tokens import tokenize
from saelab.errors import SaelabError
from saelab.runtime.allocator import keep_freed_memory
from saelab.storage.atomic import read_json, write_text
from saelab.study.plan import BaseConfig
from saelab.training.loop import Cell

SEEDS = 3
EXPERIMENT = """\
from saelab.launch.entry import main
from saelab.study.plan import Arm, Run

ARMS = {arms!r}
RUNS = {{"run_1": Run("Three arms", [Arm(name, changes) for name, changes in ARMS.items()])}}

if __name__ == "__main__":
    main(RUNS, __file__)
"""
PLAN = f"""\
study = "benchmark"
base = "base.toml"
target_l0 = 32
levels = []
seeds = {SEEDS}
seeds_other = {SEEDS}
seeds_levels = 0
"""
BASE = """\
hook_name = "blocks.2.hook_resid_post"
context = 128

[model]
path = "embedded"

[train_text]
kind = "stdlib"
split = "train"

[eval_text]
kind = "stdlib"
split = "held_out"

[sae]
d_sae = {d_sae}

[train]
tokens = {tokens}
batch_size = 256
lr = 4e-3

[evaluation]
tokens = 4_064
loss_contexts = 8
probing = {{ entries = "none" }}
"""
#: The arms of experiment.py's run_0.
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "TopK": {
        "sae.activation": {"kind": "topk"},
        "sae.losses": [{"kind": "reconstruction"}, {"kind": "auxk"}],
        "sae.controllers": [],
        "sae.constraints": [{"kind": "unit_norm"}],
    },
    "JumpReLU": {
        "sae.activation": {"kind": "jumprelu"},
        "sae.losses": [{"kind": "reconstruction"}, {"kind": "l0"}],
        "sae.controllers": [{"kind": "l0_target", "start": 1e-4}],
        "sae.constraints": [{"kind": "unit_norm"}],
    },
}


@dataclass(frozen=True)
class Size:
    """Tokens of a cell, latents, and how often everything is timed."""

    tokens: int
    d_sae: int
    turns: int


def main() -> None:
    made = parser("A launch of 9 cells beside its bare parts.")
    made.add_argument(
        "--tokens", type=int, default=128_000, help="tokens of a cell, if not --quick"
    )
    options = made.parse_args()
    options.threads = 1  # a launch's workers have one thread each
    size = Size(10_240, 768, 1) if options.quick else Size(options.tokens, 1536, 2)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of a launch do
    with scratch() as folder:
        sections = [measure(size, folder).show()]
    save("launch", options, sections, None)


class Parts:
    """The parts that this benchmark measures; each call starts without a cache."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.folder = folder
        write_text(folder / "plan.toml", PLAN)
        write_text(folder / "base.toml", BASE.format(tokens=size.tokens, d_sae=size.d_sae))
        write_text(folder / "experiment.py", EXPERIMENT.format(arms=ARMS))
        self.base = saelab.settings(folder / "base.toml")
        self.model = language_model.load(self.base.model)
        self.source, _ = self._harvest()
        self.in_cells: list[float] = []

    def _harvest(self) -> tuple[Source, float]:
        """Harvests the training activations to disk; returns the seconds without tokenising."""
        base, place = self.base, self.folder / "activations"
        shutil.rmtree(place, ignore_errors=True)
        tokens = tokenize(base.train_text, self.model.tokenizer, base.context, base.train.tokens)
        start = perf_counter()
        made = harvest(self.model, tokens, base.hooks, base.harvest, place)
        return made[base.hook_text], perf_counter() - start

    def bare(self, n: int) -> list[float]:
        """Times one harvest, and the bare steps of each arm, once per seed."""
        found = []
        for _ in range(n):
            _, seconds = self._harvest()
            for changes in ARMS.values():
                seconds += SEEDS * self._steps(self.base.patched(changes))
            found.append(seconds)
        return found

    def _steps(self, arm: BaseConfig) -> float:
        """Returns the seconds of all steps of one cell, without making the batches."""
        rows, _ = self.source.shard(0).rows()
        cell = Cell("bare", arm.sae, arm.train, rows, seed=0)
        seconds = 0.0
        for batch, _ in batches(self.source, 0, arm.train.batch_size):
            if cell.done:
                break
            start = perf_counter()
            cell.step(batch)
            seconds += perf_counter() - start
        return seconds

    def launch(self, workers: int, n: int, keep: bool = False) -> list[float]:
        """Times the command from start to end; `keep` keeps the cache of the previous launch."""
        found = []
        for _ in range(n):
            for left in ("run_1",) if keep else ("run_1", ".saelab"):
                shutil.rmtree(self.folder / left, ignore_errors=True)
            start = perf_counter()
            self._command(workers)
            found.append(perf_counter() - start)
            if workers == 1 and not keep:
                files = sorted((self.folder / ".saelab" / "cells").glob("*/cell.json"))
                self.in_cells.append(sum(read_json(file).get("seconds", 0.0) for file in files))
        return found

    def _command(self, workers: int) -> None:
        path = os.pathsep.join([str(Path(saelab.__file__).parents[1]), str(HERE.parent)])
        own = {"SAELAB_WORKERS": str(workers), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        kept = {name: value for name, value in os.environ.items() if name != "SAELAB_CACHE"}
        command = [sys.executable, "experiment.py", "--out_dir=run_1"]
        done = subprocess.run(
            command, cwd=self.folder, env=kept | own, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SaelabError(f"the launch ended with code {done.returncode}: {last}")


def measure(size: Size, folder: Path) -> Section:
    parts = Parts(size, folder)
    cores = os.cpu_count() or 1
    only_harvest = Contestant("harvest", lambda n: [parts._harvest()[1] for _ in range(n)], "limit")
    bare = Contestant("bare: harvest + 9 x steps", parts.bare, "limit")
    one = Contestant("whole launch, 1 worker", lambda n: parts.launch(1, n))
    again = Contestant("all cached", lambda n: parts.launch(1, n, keep=True))
    contestants = [only_harvest, bare, one, again]
    if cores > 1:
        name = f"whole launch, {cores} workers"
        contestants.append(Contestant(name, lambda n: parts.launch(cores, n)))
    alternate(contestants, size.turns, 1, warm=False)
    clocks = zip(only_harvest.turns, parts.in_cells, strict=True)
    sums = [[harvested[0] + seconds] for harvested, seconds in clocks]
    training = Contestant("training: harvest + the cells' own clocks", one.run, turns=sums)
    rows = []
    for c in [*contestants[:2], training, *contestants[2:]]:
        low, middle, high = quartiles(c.samples)
        share = target_of("", c, bare, 0).value
        rows.append([c.name, f"{middle:.3g}", f"{low:.3g}-{high:.3g}", f"{share:.2f}"])
    steps = parts.base.train.steps
    return Section(
        f"launch of 9 cells: d 192, F {size.d_sae}, {size.tokens:,} tokens, {steps} steps a cell",
        table(["", "s", "quartiles", "x bare"], rows),
        [c.plain() for c in [*contestants, training]],
        [
            target_of("training / bare", training, bare, 1.1, at_least=False),
            target_of("whole launch, 1 worker / bare", one, bare, 1.1, at_least=False),
        ],
    )


if __name__ == "__main__":
    run(main)
