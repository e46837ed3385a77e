"""Tests whether one batched GEMM over several small cells is faster than one GEMM for each.

    python benchmarks/stacking.py [--quick] [--threads 1]

Times the selecting GEMM u W^T + b of S cells of one shape, as S calls and as one batched call, in
the precisions that a step may use. A launch trains cells in processes with one thread each, so the
run with one thread decides (docs/decisions/0007).
"""

from __future__ import annotations

import torch
from common import Contestant, Section, alternate, parser, ratio, run, save, table, timed

#: N, d, F, S. The width of the shipped studies, the embedded benchmark shape, a toy shape.
SHAPES = ((256, 192, 1536, 8), (256, 192, 3072, 8), (256, 64, 512, 8))


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    torch.set_num_threads(options.threads)
    turns, steps = (2, 3) if options.quick else (9, 10)
    shapes = SHAPES[-1:] if options.quick else SHAPES
    rows, raw = [], []
    for shape in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            separate, stacked = _contestants(shape, dtype)
            alternate([separate, stacked], turns, steps, settle=2)
            saving = ratio(separate.turns, stacked.turns)
            kind = str(dtype).removeprefix("torch.")
            times = [
                f"{sorted(c.samples)[len(c.samples) // 2] * 1e3:.3g}" for c in (separate, stacked)
            ]
            rows.append(["x".join(map(str, shape)), kind, *times, str(saving)])
            raw += [c.plain() | {"shape": shape, "dtype": kind} for c in (separate, stacked)]
    columns = ["N x d x F x cells", "precision", "separate ms", "stacked ms", "separate / stacked"]
    title = f"selecting GEMMs of {SHAPES[0][3]} cells, {options.threads} thread(s)"
    save("stacking", options, [Section(title, table(columns, rows), raw).show()], None)


def _contestants(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Contestant, Contestant]:
    n, d, d_sae, cells = shape
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(cells, n, d, generator=generator).to(dtype)
    w = torch.randn(cells, d_sae, d, generator=generator).to(dtype)
    b = torch.randn(cells, 1, d_sae, generator=generator).to(dtype)
    alone = [torch.addmm(b[i, 0], u[i], w[i].t()) for i in range(cells)]
    together = torch.baddbmm(b, u, w.transpose(1, 2))
    torch.testing.assert_close(torch.stack(alone), together, rtol=2e-2, atol=0.1)
    return (
        Contestant(
            "separate",
            timed(lambda: [torch.addmm(b[i, 0], u[i], w[i].t()) for i in range(cells)]),
        ),
        Contestant("stacked", timed(lambda: torch.baddbmm(b, u, w.transpose(1, 2)))),
    )


if __name__ == "__main__":
    run(main)
