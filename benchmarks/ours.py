"""Our side of the training benchmarks: the shared inputs, and the cells that start from them.

    x = (a D) s + noise,  a [N, 2d] with 1% of its entries in (0, 1),  D [2d, d] with unit rows,
    scaled so that E|x - mean|^2 = d: our input scale is then 1 and all sides see the same numbers.

All sides start with the same unit rows W_dec = W_enc and b_dec = mean x. TopK and BatchTopK have
their k. For the variants of BY_BIAS, the encoder bias of each latent is set so that it fires above
its 1 - L0 / F quantile, and the learning rate is 1e-6, so the codes of all sides have the same L0
and keep it. Data and weights are artificial: only the cost matters here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import timed
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from saelab.data.activations.stream import Batch
from saelab.data.probing.activations import ProbingData
from saelab.evals.probing import mean_codes
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

VARIANTS = ("topk", "batchtopk", "relu", "jumprelu", "gated", "matryoshka")
#: Variants that extend another one -> that one.
BASE_OF = {"gated": "jumprelu", "matryoshka": "batchtopk"}
#: Variants whose sparsity is set by a bias.
BY_BIAS = ("relu", "jumprelu", "gated")
#: So small that weights, and with them the sparsity, stay what they were set to.
RATE = 1e-6
N_BATCHES = 4


@dataclass(frozen=True)
class Shape:
    """d_in -> d_sae, rows per batch, and how often it is timed."""

    d_in: int
    d_sae: int
    rows: int
    turns: int = 5
    steps: int = 1
    settle: int = 0

    def __str__(self) -> str:
        return f"{self.d_in} -> {self.d_sae}, N {self.rows}"


@dataclass(frozen=True)
class Inputs:
    """The tensors that both sides train on; float32.

    Args:
        batches: [4, N, d].
        rows: unit rows [F, d].
        mean: [d].
        quantile: [F], of each latent's <x - mean, row>.
    """

    batches: Tensor
    rows: Tensor
    mean: Tensor
    quantile: Tensor

    def save(self, file: Path) -> None:
        save_file(dict(self.__dict__), file)


def l0_of(variant: str, k: int, d_sae: int) -> int:
    """Returns k; for variants of BY_BIAS at most 1% of F."""
    return min(k, d_sae // 100) if variant in BY_BIAS else k


def make_inputs(shape: Shape, l0: int, seed: int = 0) -> Inputs:
    """Makes batches and weights of a shape; `l0` determines the quantile."""
    draw = torch_stream(seed, "benchmark", shape.d_in, shape.d_sae, shape.rows)
    d, n = shape.d_in, N_BATCHES * shape.rows
    directions = normalize(torch.randn(2 * d, d, generator=draw), dim=1)
    chosen = torch.rand(n, 2 * d, generator=draw) < 0.01
    x = (chosen * torch.rand(n, 2 * d, generator=draw)) @ directions * 4
    x += 0.1 * torch.randn(n, d, generator=draw)
    x *= (d / (x - x.mean(0)).square().sum(1).mean()).sqrt()
    rows = normalize(torch.randn(shape.d_sae, d, generator=draw), dim=1)
    mean = x.mean(0)
    keep = max(1, round(l0 / shape.d_sae * n))
    parts = [((x - mean) @ part.T).T for part in rows.split(1024)]
    quantile = torch.cat([part.topk(keep + 1, dim=1).values[:, -1] for part in parts])
    return Inputs(x.view(N_BATCHES, shape.rows, d), rows, mean, quantile)


def sae_config(variant: str, d_sae: int, l0: int, precision: str) -> SAEConfig:
    """Returns the settings of the arms of experiment.py, which is what a user trains."""
    reconstruction: dict[str, Any] = {"kind": "reconstruction"}
    plain: dict[str, Any] = {"d_sae": d_sae, "precision": precision}
    if variant in ("topk", "batchtopk"):
        plain |= {
            "activation": {"kind": variant, "k": l0},
            "losses": [reconstruction, {"kind": "auxk"}],
            "controllers": [],
            "constraints": [{"kind": "unit_norm"}],
        }
    elif variant == "relu":
        plain |= {
            "activation": {"kind": "relu"},
            "losses": [reconstruction, {"kind": "l1"}],
            "controllers": [{"kind": "l0_target", "target": l0}],
        }
    elif variant in BASE_OF:
        plain |= {"preset": variant}
        plain |= {"activation": {"k": l0}} if variant == "matryoshka" else {}
        plain |= (
            {"controllers": [{"kind": "l0_target", "target": l0}]} if variant == "gated" else {}
        )
    else:
        plain |= {
            "activation": {"kind": "jumprelu"},
            "losses": [reconstruction, {"kind": "l0"}],
            "controllers": [{"kind": "l0_target", "target": l0, "start": 1e-4}],
            "constraints": [{"kind": "unit_norm"}],
        }
    return SAEConfig.parse(plain)


def cell(variant: str, inputs: Inputs, l0: int, precision: str, lr: float = RATE) -> Cell:
    """Builds a cell that starts from the shared weights."""
    batch_size = inputs.batches.shape[1]
    config = sae_config(variant, len(inputs.rows), l0, precision)
    train = TrainConfig(tokens=10_000 * batch_size, batch_size=batch_size, lr=lr)
    made = Cell(f"{variant}, {precision}", config, train, inputs.batches[0], seed=0)
    with torch.no_grad():
        made.sae.scale.fill_(1)
        made.sae.W_dec.copy_(inputs.rows)
        made.sae.W_enc.copy_(inputs.rows)
        made.sae.b_dec.copy_(inputs.mean)
        if variant in BY_BIAS:
            threshold: Any = made.sae.activation.threshold if variant == "jumprelu" else 0
            made.sae.b_enc.copy_(threshold - inputs.quantile)
    return made


class Runner:
    """A cell that is stepped through the shared batches; `l0` is the last step's."""

    def __init__(self, trained: Cell, inputs: Inputs) -> None:
        positions = torch.zeros(inputs.batches.shape[1], dtype=torch.int64)
        self.cell, self.l0 = trained, 0.0
        self.batches = [Batch(x, positions) for x in inputs.batches]

    def __call__(self, n: int) -> list[float]:
        """Returns the seconds of each of n steps."""
        found = []
        for _ in range(n):
            batch = self.batches[self.cell.steps_done % len(self.batches)]
            start = perf_counter()
            record = self.cell.step(batch)
            found.append(perf_counter() - start)
            self.l0 = record["l0"]
        return found


def gemm(inputs: Inputs, dtype: torch.dtype) -> Any:
    """Returns n -> seconds of each of n encoder products x W^T [N, F] in a precision."""
    x, w = inputs.batches[0].to(dtype), inputs.rows.to(dtype)

    return timed(lambda: torch.mm(x, w.T))


def one_row_each(sae: SAE, data: ProbingData) -> ProbingData:
    """Returns the same entries with one row for each text: its mean code."""
    entries = tuple(
        replace(
            entry,
            rows=mean_codes(sae, entry.rows, entry.offsets),
            offsets=torch.arange(len(entry.labels) + 1),
        )
        for entry in data.entries
    )
    return ProbingData(entries, data.header)
