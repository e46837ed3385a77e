"""Measures the peak memory of one cell in training, ours and the peers', and the least possible.

    python benchmarks/memory.py [--quick] [--threads 2]

Every row is a separate process. It loads its code, reads the batches and starting weights into
memory, trains a tiny cell so that libraries and thread pools are loaded, and only then counts:

    peak   = highest resident memory over the steps - resident memory before the cell was built
    needed = 4 (P + 2 P + P) parameters, Adam's moments and gradients, P = 2 d F + F + d
           + 4 N d * 4       input, encoder input, reconstruction and its gradient, float32
           + N F * b         all pre-activations, b bytes each: 2 in bfloat16, 4 in float32

Linux only (the peak is VmHWM of /proc/self/status).
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import rss
import torch
from common import (
    PeerError,
    Peers,
    Section,
    Target,
    parser,
    run,
    save,
    scratch,
    table,
)
from ours import Inputs, Runner, Shape, cell, l0_of, make_inputs
from safetensors.torch import load_file
from train_step import ROSTER, K

from saelab.errors import SaelabError

SHAPES = (Shape(192, 3072, 2048), Shape(768, 12288, 2048))
VARIANTS = ("topk", "relu")
STEPS = 4
MB = 1e6


def main() -> None:
    options = _parser().parse_args()
    if options.child:
        print(json.dumps(_child(**json.loads(options.child))))
        return
    shapes, variants = (SHAPES[:1], VARIANTS[:1]) if options.quick else (SHAPES, VARIANTS)
    sections = []
    with scratch() as folder:
        for shape in shapes:
            for variant in variants:
                sections.append(measure(shape, variant, options, folder).show())
    save("memory", options, sections, _Versions(options))


def _parser() -> Any:
    made = parser("Peak memory of one cell in training.")
    made.add_argument("--child", help="used by this script for the processes that it measures")
    return made


class _Versions:
    """Reads the peers' versions in a short-lived process; none for --peers none."""

    def __init__(self, options: Namespace) -> None:
        self.options = options

    def versions(self) -> dict[str, str]:
        if self.options.peers == "none":
            return {}
        peers = Peers(Path(self.options.peers), 1)
        try:
            return peers.versions()
        finally:
            peers.close()


def measure(shape: Shape, variant: str, options: Namespace, folder: Path) -> Section:
    """One table: a shape and a variant."""
    l0 = l0_of(variant, K, shape.d_sae)
    file = folder / "inputs.safetensors"
    make_inputs(shape, l0).save(file)
    rows: list[dict[str, Any]] = []
    unavailable: dict[str, str] = {}
    for precision in ("auto", "float32"):
        found = _ours(variant, precision, l0, file, options.threads)
        width = 2 if found.pop("dtype") == "torch.bfloat16" else 4
        rows.append({"name": f"ours, {precision}", "needed": needed(shape, width), **found})
    if options.peers != "none":
        for name, peer, settings in ROSTER[variant]:
            try:
                found = _theirs(options, peer, variant, l0, settings, file)
            except PeerError as error:
                unavailable[name] = str(error)
                continue
            width = 2 if settings.get("autocast") else 4
            rows.append({"name": name, "needed": needed(shape, width), **found})
    for row in rows:
        row["used"] = row["peak"] - row["before"]
        row["share"] = row["used"] / row["needed"]
    cells = [
        [r["name"], f"{r['used'] / MB:,.0f}", f"{r['needed'] / MB:,.0f}", f"{r['share']:.2f}"]
        for r in rows
    ]
    return Section(
        f"{variant}, {shape}, L0 {l0}; MB above the process before training",
        table(["", "peak", "needed", "peak / needed"], cells),
        rows,
        [Target("peak / needed of ours, auto", rows[0]["share"], 1.3, at_least=False)],
        unavailable,
    )


def needed(shape: Shape, width: int) -> int:
    """Returns the bytes of the module's docstring; `width` is that of a pre-activation."""
    d, f, n = shape.d_in, shape.d_sae, shape.rows
    return 4 * 4 * (2 * d * f + f + d) + 4 * 4 * n * d + width * n * f


def _ours(variant: str, precision: str, l0: int, file: Path, threads: int) -> dict[str, Any]:
    given = {"variant": variant, "precision": precision, "l0": l0, "file": str(file)}
    command = [sys.executable, __file__, "--child", json.dumps(given | {"threads": threads})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SaelabError(f"our process failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(variant: str, precision: str, l0: int, file: str, threads: int) -> dict[str, Any]:
    """Measures in a separate process: bytes before and at the peak, and the dtype of selection."""
    from saelab.kernels import selection_dtype
    from saelab.runtime.allocator import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()  # as the workers of a launch do
    small = make_inputs(Shape(32, 256, 64), 4)
    Runner(cell(variant, small, 4, precision), small)(3)
    inputs = Inputs(**{key: value.clone() for key, value in load_file(file).items()})
    rss.reset_peak()  # the file's pages, which would be read while it counts, are now in memory
    before = rss.resident()
    Runner(cell(variant, inputs, l0, precision), inputs)(STEPS)
    dtype = selection_dtype(precision, torch.device("cpu"))  # type: ignore[arg-type]
    return {"before": before, "peak": rss.peak(), "dtype": str(dtype)}


def _theirs(
    options: Namespace, peer: str, variant: str, l0: int, settings: dict[str, Any], file: Path
) -> dict[str, Any]:
    peers = Peers(Path(options.peers), options.threads)
    try:
        peers.call("inputs", file=str(file))
        given = {"peer": peer, "variant": variant, "k": l0, "options": settings}
        return peers.call("training_peak", n=STEPS, **given)
    finally:
        peers.close()


if __name__ == "__main__":
    run(main)
