"""Measures how the cost of training grows with tokens, cells and latents, over a 16x range of each.

    python benchmarks/scaling.py [--quick] [--threads 1]

Each point is the time of `train` on a stream of artificial activations in memory; cells are built
before the clock starts. The exponent p of cost = c * size^p is the least-squares slope of log cost
over log size, on the medians; 1 is linear.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from common import Contestant, Section, Target, alternate, parser, quartiles, run, save, table
from ours import VARIANTS, Shape, make_inputs, sae_config

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.runtime.allocator import keep_freed_memory
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig

D_IN, D_SAE, ROWS, L0 = 192, 768, 256, 16
FACTORS = (1, 2, 4, 8, 16)
#: Steps of the shortest run.
STEPS = 32
#: An exponent above this would no longer be called linear. Our choice.
LINEAR = 1.05


def main() -> None:
    made = parser("Cost against tokens, cells and latents.")
    made.set_defaults(threads=1)
    made.add_argument("--variant", choices=VARIANTS, default="topk")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the workers of a launch do
    sections = [measure(axis, options).show() for axis in ("tokens", "cells", "latents")]
    save("scaling", options, sections, None)


def measure(axis: str, options: Namespace) -> Section:
    """Measures one table: a point for every factor along one axis."""
    steps = STEPS // 4 if options.quick else STEPS
    source = _source()
    points = []
    for factor in FACTORS:
        sizes = {"tokens": 1, "cells": 1, "latents": 1} | {axis: factor}
        once = _training(source, options.variant, steps, sizes)
        points.append(Contestant(_name(axis, factor, steps), once, work=factor))
    alternate(points, 1 if options.quick else 5, 1)
    medians = [quartiles(point.samples)[1] for point in points]
    power = exponent(FACTORS, medians)
    rows = []
    for point, factor, median in zip(points, FACTORS, medians, strict=True):
        low, _, high = quartiles(point.samples)
        share = median / medians[0] / factor
        rows.append([point.name, f"{median:.4g}", f"{low:.4g}-{high:.4g}", f"{share:.2f}"])
    fixed = f"{options.variant}, d {D_IN}, N {ROWS}, L0 {L0}, {options.threads} threads"
    return Section(
        f"cost against {axis}: {fixed}",
        table([axis, "s", "quartiles", "of linear"], rows),
        [point.plain() for point in points] + [{"axis": axis, "exponent": power}],
        [Target(f"exponent of the cost in {axis}", power, LINEAR, at_least=False)],
    )


def _name(axis: str, factor: int, steps: int) -> str:
    unit = {"tokens": steps * ROWS, "cells": 1, "latents": D_SAE}[axis]
    return f"{unit * factor:,}"


def _source() -> MemorySource:
    """Makes one shard of artificial rows, in contexts of one position."""
    x = make_inputs(Shape(D_IN, D_SAE, 4096), L0).batches.reshape(-1, 1, D_IN)
    return MemorySource([Shard(x, torch.ones(x.shape[:2], dtype=torch.bool))], {})


def _training(
    source: MemorySource, variant: str, steps: int, sizes: dict[str, int]
) -> Callable[[int], list[float]]:
    """Returns n -> seconds of each of n trainings."""
    sample = source.shard(0).rows()[0]
    tokens = steps * sizes["tokens"] * ROWS
    config = TrainConfig(tokens=tokens, batch_size=ROWS)
    sae = sae_config(variant, D_SAE * sizes["latents"], L0, "auto")

    def once() -> float:
        cells = [Cell(str(i), sae, config, sample, seed=0) for i in range(sizes["cells"])]
        start = perf_counter()
        train(cells, batches(source, 0, ROWS))
        return perf_counter() - start

    return lambda n: [once() for _ in range(n)]


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Returns the slope of log seconds over log size."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


if __name__ == "__main__":
    run(main)
