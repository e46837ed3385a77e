"""Counts the bytes that ranks hand to collectives in a step, and checks docs/parallel.md.

Every split runs in separate processes over gloo on this machine; bytes are counted, not timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from common import parser

from saelab.data.activations.stream import Batch
from saelab.distributed.ranks import Ranks, join_ranks, process_count
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

D_IN, D_SAE, ROWS, K, STEPS = 64, 1024, 128, 16, 3
SPLITS = ((1, 2), (2, 1), (1, 4), (4, 1), (2, 2))
CODES = {
    "relu": {"losses": ["reconstruction", "l1"], "initial_l0": K},
    "topk": {
        "activation": {"kind": "topk", "k": K},
        "losses": ["reconstruction"],
        "controllers": [],
    },
}


def formula(code: str, data: int, latents: int) -> int:
    """Returns the bytes per step and rank, by the formulas."""
    n, f = ROWS // data, D_SAE // latents
    total = 8
    if latents > 1:
        total += 4 * n * D_IN + 4 * D_IN + 32 + (4 * n * K if code == "topk" else 4)
    if data > 1:
        total += 4 * (2 * f * D_IN + f + D_IN) + 8 * f + 4 * len(CODES[code]["losses"])
    return total


def counted(ranks: Ranks, code: str) -> int:
    """Counts the bytes that this rank hands to collectives in one step."""
    sae = SAEConfig.parse({"d_sae": D_SAE, "precision": "float32", **CODES[code]})
    x = torch.randn(ROWS, D_IN, generator=torch_stream(0, "benchmark"))
    training = TrainConfig(tokens=ROWS * STEPS, batch_size=ROWS)
    cell = Cell(code, sae, training, x, 0, ranks=ranks)
    before = ranks.payload
    for _ in range(STEPS):
        cell.step(Batch(x, torch.zeros(ROWS, dtype=torch.int64)))
    return (ranks.payload - before) // STEPS


def worker(data: int, latents: int) -> None:
    with join_ranks(data, latents, "cpu") as ranks:
        found = {code: counted(ranks, code) for code in CODES}
        if ranks.first:
            print(json.dumps(found))


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    rows = []
    for data, latents in SPLITS[:2] if options.quick else SPLITS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={data * latents}", __file__]
        split = {"SPLIT": f"{data},{latents}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=os.environ | split, check=True, text=True, stdout=subprocess.PIPE
        )
        for code, bytes_ in json.loads(done.stdout.splitlines()[-1]).items():
            row = {"code": code, "data": data, "latents": latents, "counted": bytes_}
            rows.append(row | {"formula": formula(code, data, latents)})
    print(f"d {D_IN}, F {D_SAE}, {ROWS} rows, k {K}: bytes per step and rank")
    print(f"{'code':6s} {'data':>5s} {'latents':>8s} {'counted':>9s} {'formula':>9s}")
    for row in rows:
        print("{code:6s} {data:5d} {latents:8d} {counted:9d} {formula:9d}".format(**row))
    if any(row["counted"] != row["formula"] for row in rows):
        sys.exit("a formula does not say what is sent: mend docs/parallel.md")


if __name__ == "__main__":
    if process_count() > 1:
        worker(*map(int, os.environ["SPLIT"].split(",")))
    else:
        main()
