"""The verdict on real cells that differ in their seeds alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Batch
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.sae import SAEConfig
from saelab.seeding import numpy_stream, torch_stream
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig
from saelab.verdict.effect import estimate
from saelab.verdict.judge import Cells, Rules, choose_words, judge
from saelab.verdict.l0_adjustment import Matched

CELLS, DRAWS, D = 24, 4000, 16
CONFIG = SAEConfig.parse(
    {
        "d_sae": 64,
        "activation": {"kind": "topk", "k": 4},
        "losses": ["reconstruction"],
        "controllers": [],
        "constraints": ["unit_norm"],
    }
)
TRAIN = TrainConfig(tokens=64 * 100, batch_size=64, lr=4e-3)


def activations(rows: int, draw: torch.Generator) -> torch.Tensor:
    directions = torch.randn(40, D, generator=torch_stream(0, "test-verdict-cells"))
    on = (torch.rand(rows, 40, generator=draw) < 0.1).float()
    return (on * torch.rand(rows, 40, generator=draw)) @ directions


@pytest.fixture(scope="module")
def fvu() -> np.ndarray:
    """Of cells of different seeds, which also order the rows [CELLS]."""
    x = activations(2048, torch_stream(1, "test-verdict-cells"))
    held_out = activations(2048, torch_stream(2, "test-verdict-cells"))
    shard = Shard(held_out[:, None], torch.ones(len(held_out), 1, dtype=torch.bool))
    data = CoreData(MemorySource([shard], {}), None)
    found = []
    for seed in range(CELLS):
        order = torch.randint(len(x), (TRAIN.steps, 64), generator=torch_stream(seed, "order"))
        stream = ((Batch(x[rows], torch.zeros(64, dtype=torch.int64)), None) for rows in order)
        cell = Cell(f"seed {seed}", CONFIG, TRAIN, x, seed)
        assert not train([cell], stream)
        found.append(measure_reconstruction(cell.sae, data).fvu)
    return np.array(found)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_cells_of_different_seeds_are_told_apart_no_more_often_than_alpha(
    fvu: np.ndarray, n: int
) -> None:
    """Pairs of disjoint cells, drawn anew each time; no arm differs from the other."""
    stream = numpy_stream(n, "test-a-a")
    chosen = np.array([stream.permutation(CELLS)[: 2 * n] for _ in range(DRAWS)])
    effect = estimate(fvu[chosen[:, :n]], fvu[chosen[:, n:]], n)
    assert fvu.std() > 0
    low, high = effect.interval(0.05)
    word = choose_words(effect.mean, low, high, 0.0)
    share = float(np.isin(word, ["helps", "hurts"]).mean())
    assert share <= 0.05 + 3 * (0.05 * 0.95 / DRAWS) ** 0.5
    assert 0.93 <= float(((low <= 0) & (high >= 0)).mean()) <= 0.97


def test_the_same_cells_differ_by_exactly_nothing(fvu: np.ndarray) -> None:
    values = dict(enumerate(map(float, fvu[:8])))
    cells = Cells(matched=Matched(values=values))
    rules = Rules(primary="fvu", direction="lower", sesoi=0.005)
    (c,) = judge(rules, cells, {"twin": cells})
    assert (c.mean_diff, c.low, c.high, c.p, c.word) == (0.0, 0.0, 0.0, 1.0, "equivalent")
