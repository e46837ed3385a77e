"""Measures how far from its target the L0 of trained cells ends on held-out text.

    python benchmarks/l0_targets.py [--quick] [--seeds 2] [--levels 16 32 64] [--arms ReLU A1]
                                    [--tokens 500224]

Arms of the shipped run table are trained on the embedded default at each level and seed, as a run
trains them, and L0 and FVU are measured on the held-out text. `off` is the mean over seeds of
L0 / target - 1, `worst` that of the seed that is farthest from the target, `at the end` the same as
`off` for the training batches of the last tenth of the run, and `before` the same on the
calibration text before the thresholds were moved. `moved` is how far the FVU then moved, and
`along the frontier` how far it would have on the line between the arm's levels before. `time` is
the processor time of the settling over that of the reconstruction metrics on as much held-out text.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, Section, machine, parser, run, save, table

import saelab
from saelab.data.activations.store import Source
from saelab.data.activations.stream import Layout
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.launch.prepare import prepare
from saelab.runtime.allocator import keep_freed_memory
from saelab.runtime.torch_defaults import one_thread, standard_torch
from saelab.storage.cache import cache_folder
from saelab.study.experiment_file import load_experiment
from saelab.study.plan import BaseConfig, arm_settings, find_run
from saelab.training.calibration_text import CalibrationText
from saelab.training.loop import Cell
from saelab.training.resume import ResumableCell
from saelab.training.sample import initial_sample
from saelab.training.train import train_members

ROOT = HERE.parent
#: Name in the table -> run and arm of experiment.py.
ARMS = {
    "ReLU": ("run_1", "baseline"),
    "JumpReLU": ("run_0", "JumpReLU"),
    "A1": ("run_1", "A1"),
    "A2": ("run_4", "A2"),
    "A2 mean": ("run_4", "A2 mean"),
    "B": ("run_6", "B"),
    "B full": ("run_9", "B"),
}
#: Share of the run whose batches are the controller's last view.
END = 0.1


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Activations that cells are trained, calibrated and measured on."""

    train: Source
    core: CoreData
    calibration: CalibrationText


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One trained cell: its L0 and FVU on held-out text, before the thresholds were moved and
    after; L0 / target - 1 in the last batches and on calibration text before; and the processor
    seconds of the settling and of an evaluation of its reconstruction."""

    arm: str
    level: float
    seed: int
    l0: tuple[float, float]
    fvu: tuple[float, float]
    off_batches: float
    off_calibration: float
    seconds: tuple[float, float]

    @property
    def off(self) -> float:
        return self.l0[1] / self.level - 1


def main() -> None:
    options, commit = _options(), _commit()
    base = _base(options)
    prepared = prepare(base, cache_folder(Path()), base.model.device)
    core = CoreData(prepared.held_out, None, 1)
    assert prepared.calibration is not None
    texts = Texts(
        train=prepared.train, core=core, calibration=CalibrationText(prepared.calibration)
    )
    cells: list[Ended] = []
    by_layout = _by_layout(base, options.arms)
    for seed in range(options.seeds):
        for layout, arms in by_layout.items():
            for cell in _train(texts, arms, options.levels, seed, layout):
                cells.append(cell)
                numbers = f"{cell.off:+.2%}, batches {cell.off_batches:+.2%}, FVU {cell.fvu[1]:.4f}"
                numbers += f", before {cell.off_calibration:+.2%} (FVU {cell.fvu[0]:.4f})"
                print(f"{cell.arm}, L0 {cell.level:g}, seed {seed}: {numbers}", flush=True)
    where = f"commit {commit}, {machine(1)['cpu']}"
    title = f"{options.seeds} seeds, {base.train.tokens:,} tokens, {where}"
    section = Section(title, _table(cells, options), [asdict(cell) for cell in cells])
    save("l0_targets", options, [section.show()], None)


def _commit() -> str:
    """The commit of the source, with '-dirty' where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.stdout.strip() or "unknown"


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--tokens", type=int, default=None)
    made.add_argument("--levels", type=float, nargs="+", default=[16.0, 32.0, 64.0])
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = made.parse_args()
    if options.quick:
        options.seeds, options.levels, options.arms = 1, options.levels[:1], options.arms[:1]
    return options


def _base(options: argparse.Namespace) -> BaseConfig:
    small = {"train.tokens": 51_200} if options.quick else {}
    changes: dict[str, Any] = {"evaluation.probing.entries": "none"} | small
    changes |= {"train.tokens": options.tokens} if options.tokens else {}
    return saelab.settings(ROOT / "configs" / "embedded.toml", changes)


def _by_layout(base: BaseConfig, names: Sequence[str]) -> dict[Layout, dict[str, BaseConfig]]:
    """Settings of the arms, by the layout of the batches that they are trained on."""
    runs = load_experiment(ROOT / "experiment.py").RUNS
    arms: dict[Layout, dict[str, BaseConfig]] = {}
    for name in names:
        run_name, arm_name = ARMS[name]
        table = find_run(runs, run_name)
        arm = next(arm for arm in table.arms if arm.name == arm_name)
        settings = arm_settings(base, table, arm)
        arms.setdefault(settings.layout, {})[name] = settings
    return arms


@standard_torch()
@one_thread()
def _train(
    texts: Texts,
    arms: dict[str, BaseConfig],
    levels: Sequence[float],
    seed: int,
    layout: Layout,
) -> list[Ended]:
    """Trains all arms at all levels on the batches of one seed, and measures them."""
    keep_freed_memory()
    sample = initial_sample(texts.train)
    cells = {
        (name, level): Cell(
            f"{name} {level:g}",
            base.sae.at_l0(level),
            base.train,
            sample,
            seed,
        )
        for name, base in arms.items()
        for level in levels
    }
    members = [ResumableCell(cell, None) for cell in cells.values()]
    for failure in train_members(members, texts.train, seed, layout, lambda *_: None).values():
        raise failure
    ended: list[Ended] = []
    for (name, level), cell in cells.items():
        ended.append(_end(name, level, seed, cell, texts))
    return ended


def _end(name: str, level: float, seed: int, cell: Cell, texts: Texts) -> Ended:
    """Settles the L0 of a trained cell, and measures it before and after."""
    start = time.process_time()
    before = measure_reconstruction(cell.sae, texts.core)
    between = time.process_time()
    cell.settle(texts.calibration)
    seconds = time.process_time() - between, between - start
    after = measure_reconstruction(cell.sae, texts.core)
    off = math.nan if cell.settled is None else cell.settled.before / level - 1
    return Ended(
        arm=name,
        level=level,
        seed=seed,
        l0=(before.l0, after.l0),
        fvu=(before.fvu, after.fvu),
        off_batches=cell.log.last("l0", END) / level - 1,
        off_calibration=off,
        seconds=seconds,
    )


OFF = ["off", "worst", "at the end", "before"]


def _table(cells: Sequence[Ended], options: argparse.Namespace) -> str:
    rows = []
    for arm in options.arms:
        for level in options.levels:
            chosen = [cell for cell in cells if (cell.arm, cell.level) == (arm, level)]
            worst = max((cell.off for cell in chosen), key=abs)
            means = [_mean(cell.off for cell in chosen), worst]
            means += [
                _mean(getattr(c, f"off_{n}") for c in chosen) for n in ("batches", "calibration")
            ]
            moved = _mean(cell.fvu[1] - cell.fvu[0] for cell in chosen)
            along = _mean(_along_frontier(cell, cells) for cell in chosen)
            share = sum(c.seconds[0] for c in chosen) / sum(c.seconds[1] for c in chosen)
            fvu = [f"{_mean(cell.fvu[1] for cell in chosen):.4f}", f"{moved:+.5f}", f"{along:+.5f}"]
            rows.append([f"{arm}, {level:g}", *[f"{x:+.2%}" for x in means], *fvu, f"{share:.2f}"])
    return table(["arm, L0", *OFF, "FVU", "moved", "along the frontier", "time"], rows)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _along_frontier(cell: Ended, cells: Sequence[Ended]) -> float:
    """Change of the FVU on the arm's frontier of that seed, as it was before any thresholds were
    moved, from the cell's L0 before to that after; NaN where the arm has one level."""
    same = [other for other in cells if (other.arm, other.seed) == (cell.arm, cell.seed)]
    points = sorted((math.log(other.l0[0]), other.fvu[0]) for other in same)
    if len(points) < 2:
        return math.nan
    l0, fvu = np.array(points).T
    slope = np.gradient(fvu, l0)[int(np.abs(l0 - math.log(cell.l0[0])).argmin())]
    return float(slope * math.log(cell.l0[1] / cell.l0[0]))


if __name__ == "__main__":
    run(main)
