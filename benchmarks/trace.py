"""Measures what the trace of idea A2 adds to a training step.

    python benchmarks/trace.py [--quick] [--threads 1]

Compares the step of a tied threshold that follows contexts of 128 positions, with all scalars
learned, with the same step without a trace (beta fixed at 0) and with a dense float32 autograd step
of the same shape. Reports CPU seconds of the process, which other work on the machine affects less.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Contestant, added, alternate, parser, run, save
from ours import Inputs, Shape, cell, make_inputs
from penalty import L0, ROWS, TIMES, WIDTHS, dense, seconds

from saelab.data.activations.stream import Batch
from saelab.training.loop import Cell

CONTEXT = 128
#: What the trace may add to the dense step.
LIMIT = 0.15
STATIC: dict[str, Any] = {"kind": "tied_threshold", "learned": ["theta"]}
MOVING = STATIC | {"learned": ["theta", "beta", "gamma", "rho", "T"], "beta": -0.1}


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    sections = []
    for width in WIDTHS[:1] if options.quick else WIDTHS:
        shape = Shape(width, TIMES * width, ROWS)
        inputs = make_inputs(shape, L0)
        sides = [
            Contestant("dense autograd, float32", seconds(dense(inputs))),
            Contestant("ours without a trace", seconds(stepping(inputs, STATIC))),
            Contestant("ours with the trace", seconds(stepping(inputs, MOVING))),
        ]
        alternate(sides, 2 if options.quick else 7, steps=1, settle=1)
        title = f"{shape}, {options.threads} thread(s)"
        sections.append(added(title, sides, LIMIT).show())
    save("trace", options, sections, None)


def stepping(inputs: Inputs, activation: dict[str, Any]) -> Any:
    """Builds one step on the inputs as contexts, from the SAE's usual start at L0."""
    like = cell("jumprelu", inputs, L0, "float32")
    changes = {"activation": activation, "constraints": ["unit_norm"], "initial_l0": L0}
    config = like.sae.config.patched(changes)
    one = Cell("trace", config, like.config, inputs.batches[0], seed=0)
    x = inputs.batches[0]
    segments = torch.arange(len(x)) // CONTEXT
    batch = Batch(x, torch.arange(len(x)) % CONTEXT, None, segments)
    return lambda: one.step(batch)


if __name__ == "__main__":
    run(main)
