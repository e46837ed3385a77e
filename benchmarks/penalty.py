"""Measures what the similarity penalty adds to a training step.

    python benchmarks/penalty.py [--quick] [--threads 1]

Compares our step with and without the penalty, at its default k and at its largest, with a dense
float32 autograd step of the same shape (ReLU, decoder-norm weighted L1, fused Adam; plain torch).
Reports CPU seconds of the process, which other work on the machine affects less. The penalty acts
from the first step; the data are artificial, because only the cost matters.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from common import Contestant, added, alternate, parser, run, save
from ours import Inputs, Shape, cell, make_inputs

from saelab.data.activations.stream import Batch
from saelab.training.loop import Cell

#: d, N and the overcompleteness of the requirement.
WIDTHS, ROWS, TIMES = (192, 768), 2048, 16
L0, K = 32, (100, 512)
#: What the penalty may add to the dense step.
LIMIT = 0.25


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    turns = 2 if options.quick else 7
    sections = []
    for width in WIDTHS[:1] if options.quick else WIDTHS:
        shape = Shape(width, TIMES * width, ROWS)
        inputs = make_inputs(shape, L0)
        sides = [Contestant("dense autograd, float32", seconds(dense(inputs)))]
        sides.append(
            Contestant("ours, float32", seconds(stepping(cell_with(inputs, None), inputs)))
        )
        for k in K:
            work = seconds(stepping(cell_with(inputs, k), inputs))
            sides.append(Contestant(f"ours with the penalty, k {k}", work))
        alternate(sides, turns, steps=1, settle=1)
        title = f"{shape}, {options.threads} thread(s)"
        sections.append(added(title, sides, LIMIT).show())
    save("penalty", options, sections, None)


def seconds(work: Callable[[], object]) -> Callable[[int], list[float]]:
    """Returns n -> the CPU seconds of the process for each of n calls."""

    def samples(n: int) -> list[float]:
        found = []
        for _ in range(n):
            start = process_time()
            work()
            found.append(process_time() - start)
        return found

    return samples


def cell_with(inputs: Inputs, k: int | None) -> Cell:
    """Builds the ReLU cell of the training benchmark, with the penalty if k is given."""
    one = cell("relu", inputs, L0, "float32")
    if k is None:
        return one
    penalty: dict[str, Any] = {"kind": "similarity", "k": k, "warmup": 0.0, "window": 1e-9}
    config = one.sae.config.patched({"losses+": penalty})
    other = Cell("penalised", config, one.config, inputs.batches[0], seed=0)
    with torch.no_grad():
        for name in ("scale", "W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(other.sae, name).copy_(getattr(one.sae, name))
    return other


def stepping(one: Cell, inputs: Inputs) -> Callable[[], object]:
    batch = Batch(inputs.batches[0], torch.zeros(ROWS, dtype=torch.int64))
    return lambda: one.step(batch)


def dense(inputs: Inputs) -> Callable[[], object]:
    """Builds the plain autograd step: all N x F pre-activations, codes and their gradients."""
    x = inputs.batches[0]
    w_enc, w_dec = (inputs.rows.clone().requires_grad_() for _ in range(2))
    b_enc, b_dec = (-inputs.quantile).requires_grad_(), inputs.mean.clone().requires_grad_()
    optimiser = torch.optim.Adam([w_enc, w_dec, b_enc, b_dec], lr=1e-6, fused=True)

    def step() -> None:
        f = torch.relu((x - b_dec) @ w_enc.T + b_enc)
        error = (f @ w_dec + b_dec - x).square().mean()
        loss = error + 1e-3 * (f * w_dec.norm(dim=1)).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


if __name__ == "__main__":
    run(main)
