"""Measures the cost of reporting progress (metrics.jsonl, view) as a share of the training.

    python benchmarks/telling.py [--quick] [--threads 1]

A cell of the size of a shipped run is trained in turns of 16 steps, with a line at each hundredth
of its training, which is sent through a pipe with its lock as a worker does. Reports CPU seconds of
this thread: in the worker, of all calls that report; in the launch, of processing the same lines
(state, journal, bar). The view on a terminal is drawn twice a second in addition, on one core. The
data are artificial, because only the cost matters.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from common import Section, Target, parser, run, save, scratch, table
from ours import Shape, cell, make_inputs
from rich.console import Console

from saelab.data.activations.stream import Batch
from saelab.launch.executors.local import _PipeReporter, report_progress
from saelab.launch.progress_lines import POINTS, Reports
from saelab.progress import progress
from saelab.progress.run import RunProgress, launch_progress
from saelab.progress.view import REDRAWS
from saelab.runs.schema import CellId
from saelab.training.loop import LONGEST_TURN, Cell

SHAPE, L0 = Shape(128, 2048, 512), 32
#: Steps of a cell of the main job, of which the first are trained here.
WHOLE, TURNS = 8192, 64
#: Cells whose lines the launch has while the view is drawn.
CELLS = 8
LIMIT = 0.01


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    turns = 8 if options.quick else TURNS
    worker, training, lines = in_worker(turns)
    with scratch() as folder:
        launch, view = in_launch(folder, lines)
    cores = os.cpu_count() or 1
    shares = {
        "worker": worker / training,
        "launch": launch / training,
        "view on a terminal": view * REDRAWS / cores,
    }
    rows = [[name, f"{share:.4%}"] for name, share in shares.items()]
    text = table(["", "share of CPU time"], rows)
    of_one = f"{1e6 * worker / turns:.0f} us a turn in the worker, {1e3 * view:.1f} ms a drawing"
    title = f"{SHAPE}, {turns} turns of {LONGEST_TURN} steps, {len(lines)} messages: {of_one}"
    target = Target("all together, share of CPU time", sum(shares.values()), LIMIT, False)
    raw = [{"name": name, "share": share} for name, share in shares.items()]
    save("telling", options, [Section(title, text, raw, [target]).show()], None)


def in_worker(turns: int) -> tuple[float, float, list[tuple[float, Any]]]:
    """Returns the CPU seconds of the reports and of the training, and the messages sent."""
    inputs = make_inputs(SHAPE, L0)
    trained = cell("topk", inputs, L0, "bfloat16")
    trained.config = trained.config.patched({"tokens": WHOLE * SHAPE.rows})
    positions = torch.zeros(SHAPE.rows, dtype=torch.int64)
    batches = [Batch(x, positions) for x in inputs.batches]
    heard, said = multiprocessing.Pipe(duplex=False)
    words, messages = _PipeReporter(said, multiprocessing.Lock()), []
    spent, training = 0.0, 0.0
    reports = Reports([trained], [CellId("baseline", 1, float(L0))], words)
    for _ in range(turns):
        training += seconds(lambda: _turn(trained, batches))
        spent += seconds(lambda: reports.steps(LONGEST_TURN, [trained]))
        while heard.poll(0):
            messages.append(heard.recv())
    return spent, training, messages


def _turn(trained: Cell, batches: list[Batch]) -> None:
    for i in range(LONGEST_TURN):
        trained.step(batches[i % len(batches)])


def in_launch(folder: Path, messages: list[tuple[float, Any]]) -> tuple[float, float]:
    """Returns the CPU seconds of processing the messages, and of drawing the view once."""
    with (
        launch_progress(folder / "run_0", {"run": "run_0"}) as launch,
        progress("train and evaluate", POINTS * SHAPE.rows, "tokens") as bar,
    ):
        taken = seconds(lambda: [report_progress(bar, *message) for message in messages])
        last = [line for _, line in messages if line is not None][-1]
        for seed in range(CELLS):
            report_progress(bar, 0.0, last | {"seed": seed})
        drawn = min(seconds(lambda: draw(launch)) for _ in range(20))
    return taken, drawn


def draw(launch: RunProgress) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120)
    console.print(launch.render())


def seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


if __name__ == "__main__":
    run(main)
