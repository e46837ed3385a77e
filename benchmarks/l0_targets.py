"""Measures how far from its target the L0 of trained cells ends on held-out text.

    python benchmarks/l0_targets.py [--quick] [--seeds 2] [--levels 16 32 64] [--arms ReLU A1]
                                    [--tokens 500224] [--uncalibrated]

Arms of the shipped run table are trained on the embedded default at each level and seed, as a run
trains them, and L0 and FVU are measured on the held-out text. `off` is the mean over seeds of
L0 / target - 1, `worst` that of the seed that is farthest from the target, and `at the end` the
same as `off` for the training batches of the last tenth of the run. `on calibration` is the same
on the calibration text, which the controller has seen a part of, and `ratio` what it has corrected
for: L0 of that text over that of the batches. FVU is also given at exactly the target, moved along
the slope between the arm's levels.
"""

from __future__ import annotations

import argparse
import math
import subprocess
from collections.abc import Sequence
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
    calibration: CalibrationText | None
    on_calibration: CoreData | None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One trained cell: L0 / target - 1 on held-out text, in the last batches and on calibration
    text, the ratio that was corrected for (minus 1), and its FVU."""

    arm: str
    level: float
    seed: int
    off: float
    off_batches: float
    off_calibration: float
    ratio: float
    fvu: float


def main() -> None:
    options, commit = _options(), _commit()
    base = _base(options)
    prepared = prepare(base, cache_folder(Path()), base.model.device)
    core = CoreData(prepared.held_out, None, 1)
    calibration = CalibrationText(prepared.calibration) if prepared.calibration else None
    other = CoreData(prepared.calibration, None, 1) if prepared.calibration else None
    texts = Texts(train=prepared.train, core=core, calibration=calibration, on_calibration=other)
    cells: list[Ended] = []
    by_layout = _by_layout(base, options.arms)
    for seed in range(options.seeds):
        for layout, arms in by_layout.items():
            for cell in _train(texts, arms, options.levels, seed, layout):
                cells.append(cell)
                numbers = f"{cell.off:+.2%}, batches {cell.off_batches:+.2%}, FVU {cell.fvu:.4f}"
                numbers += f", on calibration {cell.off_calibration:+.2%}, ratio {cell.ratio:+.2%}"
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
    made.add_argument("--uncalibrated", action="store_true")
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
    changes |= {"evaluation.calibration_tokens": 0} if options.uncalibrated else {}
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
            calibration=texts.calibration,
        )
        for name, base in arms.items()
        for level in levels
    }
    members = [ResumableCell(cell, None) for cell in cells.values()]
    for failure in train_members(members, texts.train, seed, layout, lambda *_: None).values():
        raise failure
    ended: list[Ended] = []
    for (name, level), cell in cells.items():
        measured = measure_reconstruction(cell.sae, texts.core)
        other = texts.on_calibration
        on_calibration = measure_reconstruction(cell.sae, other).l0 if other else math.nan
        ended.append(
            Ended(
                arm=name,
                level=level,
                seed=seed,
                off=measured.l0 / level - 1,
                off_batches=cell.log.last("l0", END) / level - 1,
                off_calibration=on_calibration / level - 1,
                ratio=cell.log.last("sparsity.text_ratio") - 1,
                fvu=measured.fvu,
            )
        )
    return ended


OFF = ["off", "worst", "at the end", "on calibration", "ratio"]


def _table(cells: Sequence[Ended], options: argparse.Namespace) -> str:
    rows = []
    for arm in options.arms:
        means = {level: _means(cells, arm, level) for level in options.levels}
        for level, mean in means.items():
            numbers = [f"{x:+.2%}" for x in (mean[0], _worst(cells, arm, level), *mean[1:4])]
            moved = _at_target(level, means)
            last = [f"{mean[4]:.4f}", "-" if moved is None else f"{moved:.4f}"]
            rows.append([f"{arm}, {level:g}", *numbers, *last])
    return table(["arm, L0", *OFF, "FVU", "FVU at target"], rows)


def _worst(cells: Sequence[Ended], arm: str, level: float) -> float:
    """The L0's error of the seed that is farthest from the target."""
    return max((c.off for c in cells if (c.arm, c.level) == (arm, level)), key=abs)


def _means(cells: Sequence[Ended], arm: str, level: float) -> tuple[float, ...]:
    """Means over seeds of the numbers of `Ended`, in their order there."""
    chosen = [cell for cell in cells if (cell.arm, cell.level) == (arm, level)]
    numbers = [[c.off, c.off_batches, c.off_calibration, c.ratio, c.fvu] for c in chosen]
    return tuple(map(float, np.mean(numbers, axis=0)))


def _at_target(level: float, means: dict[float, Any]) -> float | None:
    """FVU at exactly the level, along the slope between the arm's nearest levels; None without."""
    points = sorted((math.log(l0 * (1 + m[0])), m[4]) for l0, m in means.items())
    if len(points) < 2:
        return None
    l0, fvu = np.array(points).T
    slope = np.gradient(fvu, l0)[list(sorted(means)).index(level)]
    off, fvu_here = means[level][0], means[level][4]
    return float(fvu_here - slope * math.log1p(off))


if __name__ == "__main__":
    run(main)
