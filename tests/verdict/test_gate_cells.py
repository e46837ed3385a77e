"""The gate on cells that were made sick on purpose: facts measured as a launch measures them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Batch
from saelab.errors import CellFailure, SourceError
from saelab.evals.base import Row
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.evals.dictionary_matching import largest_cosines
from saelab.evals.measure import EvalData, evaluate
from saelab.launch import cell_facts
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.cell import Log
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.sample import initial_sample
from saelab.verdict.gate import gate

D, F, K, CONTEXT = 16, 64, 4, 8
CONFIG = SAEConfig.parse(
    {
        "d_sae": F,
        "activation": {"kind": "topk", "k": K},
        "losses": ["reconstruction"],
        "controllers": [],
        "constraints": ["unit_norm"],
    }
)
TRAIN = TrainConfig(tokens=64 * 150, batch_size=64, lr=4e-3)


def activations() -> Tensor:
    """[contexts, positions, d]: sparse sums of fixed directions."""
    draw = torch_stream(0, "test-gate-cells")
    directions = torch.randn(40, D, generator=draw)
    on = (torch.rand(256, CONTEXT, 40, generator=draw) < 0.1).float()
    return (on * torch.rand(on.shape, generator=draw)) @ directions


def source(x: Tensor, first_counts: bool = True) -> MemorySource:
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, 0] = first_counts
    return MemorySource([Shard(x, mask)], {})


def trained(config: SAEConfig = CONFIG, lr: float = 4e-3) -> Cell:
    x = activations().flatten(0, 1)
    cell = Cell("cell", config, TRAIN.patched({"lr": lr}), x, 3)
    for i in range(TRAIN.steps):
        cell.step(Batch(x[64 * i % 2048 :][:64], torch.zeros(64, dtype=torch.int64)))
    cell.sae.eval()
    return cell


def facts(cell: Cell, held_out: MemorySource | None = None) -> dict[str, Any]:
    """Of a trained cell, as `Worker` collects them."""
    data = CoreData(held_out or source(activations()), None)
    found = measure_reconstruction(cell.sae, data)
    return {
        "l0": found.l0,
        "explained_variance": 1 - found.fvu,
        "dead_share": found.dead_share,
        "target_l0": float(K),
        "d_sae": float(F),
        "d_in": float(D),
        "steps": cell.steps_done,
        "tokens": cell.tokens,
        "code_std": cell_facts.code_std(cell.sae, data),
        "centred": float(cell_facts.removes_mean(cell)),
        **cell_facts.input_facts(data.source),
        "largest_weight": cell_facts.largest_weight(cell.sae),
        **cell_facts._weights_facts(cell.sae, largest_cosines(cell.sae.W_dec)),
        **cell_facts._curve_facts(cell.log),
    }


def found_by(facts: dict[str, Any]) -> set[str]:
    return {finding.check for finding in gate(facts).findings}


@pytest.fixture(scope="module")
def healthy() -> Cell:
    return trained()


def edited(cell: Cell, **tensors: Tensor) -> Cell:
    """The cell with other weights."""
    other = Cell("cell", cell.sae.config, cell.config, activations().flatten(0, 1), 3)
    other.sae.load_state_dict(cell.sae.state_dict() | tensors)
    other.sae.eval()
    other.steps_done, other.tokens, other.log = cell.steps_done, cell.tokens, cell.log
    return other


def test_a_healthy_cell_is_not_found_at_fault(healthy: Cell) -> None:
    assert found_by(facts(healthy)) <= {"not_converged"}  # so short a run goes on improving
    assert facts(healthy)["code_std"] > 0


def test_zero_weights(healthy: Cell) -> None:
    zero = edited(healthy, W_dec=torch.zeros(F, D))
    assert gate(facts(zero)).outcome == "failed"  # it fired at its start, so training made it so
    zero.log = Log(TRAIN.steps)
    zero.log.append({"loss": 1.0, "l0": 0.0})
    result = gate(facts(zero))
    assert result.outcome == "invalid" and "weights_zero" in result.summary()


def test_a_constant_code() -> None:
    """Every latent's threshold is passed by its bias alone."""
    config = CONFIG.patched({"activation": {"kind": "relu"}})
    cell = Cell("cell", config, TRAIN, activations().flatten(0, 1), 3)
    cell.sae.W_enc.data.mul_(0)
    cell.sae.b_enc.data.fill_(0).index_fill_(0, torch.arange(K), 1.0)
    assert {"constant_code", "worse_than_mean"} <= found_by(facts(cell_of(cell)))


def cell_of(cell: Cell) -> Cell:
    """As if it had been trained."""
    cell.steps_done, cell.tokens = 1, 64
    cell.sae.eval()
    return cell


def test_a_code_that_never_fires() -> None:
    config = CONFIG.patched({"activation": {"kind": "relu"}})
    cell = Cell("cell", config, TRAIN, activations().flatten(0, 1), 3)
    cell.sae.b_enc.data.fill_(-1e6)
    result = gate(facts(cell_of(cell)))
    assert result.outcome == "failed" and "no_firing" in result.summary()


def test_a_dense_code() -> None:
    config = CONFIG.patched({"activation": {"kind": "relu"}})
    cell = Cell("cell", config, TRAIN, activations().flatten(0, 1), 3)
    cell.sae.b_enc.data.fill_(1e3)
    found = found_by(facts(cell_of(cell)))
    assert {"dense_code", "far_above_target", "wider_than_input", "worse_than_mean"} <= found


def test_dead_and_repeated_latents(healthy: Cell) -> None:
    rows = healthy.sae.W_dec.detach().clone()
    twins = edited(healthy, W_dec=rows.index_copy(0, torch.arange(32), rows[32:]))
    assert "near_duplicates" in found_by(facts(twins))
    bias = torch.zeros(F).index_fill(0, torch.arange(48), -1e6)
    assert "dead_latents" in found_by(facts(edited(healthy, b_enc=bias)))


def test_a_loss_with_a_spike_and_one_that_goes_on_falling() -> None:
    def facts_of(loss: np.ndarray) -> set[str]:
        log = Log(len(loss))
        for value in loss:
            log.append({"loss": float(value)})
        return found_by(cell_facts._curve_facts(log))

    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(2000)
    assert facts_of(noise) == set()
    spike = noise.copy()
    spike[1500:1510] *= 5
    assert facts_of(spike) == {"loss_spikes"}
    assert facts_of(noise * np.linspace(2, 1, 2000)) == {"not_converged"}


def test_a_diverging_arm() -> None:
    with pytest.raises(CellFailure) as failure:
        trained(lr=1e30)
    assert "nonfinite_training" in found_by({"nonfinite_step": failure.value.step})


def test_a_measurement_that_is_not_finite(healthy: Cell) -> None:
    """Its rows are missing, as is all in a cell's file that JSON can't hold; the gate is told."""
    assert cell_facts.not_finite(rows_of(healthy)) is None
    broken = edited(healthy, W_dec=healthy.sae.W_dec.detach() * 1e38)
    named = cell_facts.not_finite(rows_of(broken))
    assert named is not None and "fvu" in named
    result = gate({"not_finite": named})
    assert result.outcome == "invalid" and named in result.findings[0].sentence
    assert gate({"not_finite": named, "nonfinite_step": 3}).outcome == "failed"
    largest = {"largest_weight": cell_facts.largest_weight(broken.sae)}
    assert gate({"not_finite": named} | largest).outcome == "failed"


def test_rows_that_are_all_the_same_are_refused_before_an_arm_is_blamed() -> None:
    same = torch.ones(64, 1, D)
    with pytest.raises(SourceError, match="all 64 rows of the training activations are the same"):
        initial_sample(source(same, first_counts=True))
    with pytest.raises(SourceError, match="all 64 rows of the held-out activations are the same"):
        _ = CoreData(source(same, first_counts=True), None).rows


def rows_of(cell: Cell) -> list[Row]:
    return evaluate(cell.sae, EvalData(CoreData(source(activations()), None), None), ("core",))


def test_a_mean_that_dominates() -> None:
    x = activations() + 50
    assert cell_facts.input_facts(source(x))["mean_over_std"] > 3  # type: ignore[operator]
    uncentred = CONFIG.patched({"centre": False})
    cell = Cell("cell", uncentred, TRAIN, x.flatten(0, 1), 3)
    assert "large_mean" in found_by(facts(cell_of(cell), source(x)))
    with_mean = Cell("cell", CONFIG, TRAIN, x.flatten(0, 1), 3)
    assert "large_mean" not in found_by(facts(cell_of(with_mean), source(x)))


def test_a_first_position_that_holds_the_variance(healthy: Cell) -> None:
    x = activations()
    x[:, 0] += 30
    assert "bos_variance" in found_by(facts(healthy, source(x)))
    masked = cell_facts.input_facts(source(x, first_counts=False))
    assert masked["bos_masked"] == 1 and masked["bos_variance_share"] == 0
    assert "bos_variance" not in found_by(masked)


def test_the_code_of_an_sae_that_follows_contexts_is_asked_too() -> None:
    config = {"kind": "tied_threshold", "learned": ["theta", "beta"], "context": CONTEXT}
    sae = CONFIG.patched({"activation": config}).build(D)
    assert isinstance(sae, SAE) and sae.needs_contexts
    sae.initialise(activations().flatten(0, 1), 0)
    assert cell_facts.code_std(sae.eval(), CoreData(source(activations()), None)) > 0
