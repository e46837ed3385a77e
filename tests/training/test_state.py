"""A cell goes on exactly from its state, whatever its parts keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.errors import DamageError
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell, train
from saelab.training.module_cell import ModuleCell
from saelab.training.optim import TrainConfig
from saelab.training.state import State, as_number, as_plain, module_state, restore_module

D_IN, D_SAE, SIZE, STEPS = 12, 48, 32, 24
UNIT = {"constraints": ["unit_norm"]}
OBSERVED = {"observers": [{"kind": "resampling", "every": 0.2, "patience": 64}]}

#: Parts with more state than their defaults have.
VARIANTS: dict[str, dict[str, Any]] = {
    "trace": UNIT
    | {"activation": {"kind": "tied_threshold", "beta": 0.1, "learned": ("theta", "beta", "rho")}},
    "permuted trace": UNIT
    | {"activation": {"kind": "tied_threshold", "beta": 0.1, "trace": "permuted"}},
    "learned schedule": {
        "scaling": {"kind": "variance", "temperature": "learned_schedule", "tau_end": 0.1}
    },
    "rounded k": {
        "activation": {"kind": "topk", "k": "k"},
        "controllers": [{"kind": "rounded_k", "over": "rows", "start": 20, "k_min": 2}],
        "losses": ["reconstruction", {"kind": "auxk", "dead_after": 64}],
    }
    | OBSERVED,
    "tied": {"tied": True, "activation": "topk", "controllers": [], "losses": ["reconstruction"]},
    **{
        f"balance {balance}": {
            "losses": [
                "reconstruction",
                "l1",
                {"kind": "similarity", "balance": balance, "warmup": 0.1, "window": 0.1, "k": 9}
                | more,
            ]
        }
        for balance, more in (
            ("descent", {}),
            ("uncertainty", {"statistics": "per_product"}),
            ("minimax", {"norm": "running"}),
            ("gradnorm", {}),
            ("frozen_random", {"chunk": 16, "chunks": 2}),
        )
    },
}


@pytest.fixture(scope="module")
def activations() -> MemorySource:
    stream, shards = torch_stream(0, "resumed activations"), []
    for _ in range(2):
        x = torch.randn(24, 16, D_IN, generator=stream) + 0.5
        shards.append(Shard(x, torch.ones(24, 16, dtype=torch.bool)))
    return MemorySource(shards, {})


TRAIN = TrainConfig(tokens=SIZE * STEPS, batch_size=SIZE, lr=3e-3)


def cell_of(source: MemorySource, **changes: Any) -> Cell:
    data = {"d_sae": D_SAE, "precision": "float32"} | changes
    sample = source.shard(0).rows()[0]
    return Cell("cell", SAEConfig.parse(data), TRAIN, sample, seed=3, snapshots=3)


def through_a_file(state: State) -> State:
    tensors = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    return State(tensors, json.loads(json.dumps(state.plain, allow_nan=False)))


def assert_same(one: State, other: State) -> None:
    assert one.plain == other.plain
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(
            tensor, other.tensors[name], rtol=0, atol=0, equal_nan=True, msg=name
        )


def trained_in_two(build: Any, source: MemorySource, layout: Any, cut: int) -> tuple[Cell, Cell]:
    """A cell trained at once, and one of the same that was restored after `cut` steps."""
    whole, first, second = (build() for _ in range(3))
    assert not train([whole], batches(source, 3, SIZE, layout))
    stream = batches(source, 3, SIZE, layout)
    for _ in range(cut):
        batch, position = next(stream)
        first.step(batch)
    second.restore(through_a_file(first.state()))
    assert not train([second], batches(source, 3, SIZE, layout, position))
    return whole, second


@pytest.mark.parametrize("cut", [1, 13, STEPS - 1])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_state_of_every_part(variant: str, cut: int, activations: MemorySource) -> None:
    layout = "contexts" if "trace" in variant else "rows"
    whole, cut_ = trained_in_two(
        lambda: cell_of(activations, **VARIANTS[variant]), activations, layout, cut
    )
    assert_same(whole.state(), cut_.state())
    assert whole.scalar_reach() == cut_.scalar_reach()


def test_a_state_is_not_that_of_another_cell(activations: MemorySource) -> None:
    state = cell_of(activations).state()
    wider = cell_of(activations, d_sae=2 * D_SAE)
    with pytest.raises(DamageError, match="does not fit"):
        wider.restore(state)
    with pytest.raises(DamageError, match="has no steps_done"):
        cell_of(activations).restore(State())


class Own(nn.Module):
    """A module of a user's own that keeps state in every way that is kept."""

    def __init__(self, d_in: int, d_sae: int, seed: int) -> None:
        super().__init__()
        start = 0.1 * torch.randn(d_in, d_sae, generator=torch_stream(seed, "own"))
        self.w = nn.Parameter(start)
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("silent", torch.zeros(d_sae), persistent=False)
        self.calls, self.total, self.last = 0, 0.0, torch.zeros(d_in)
        self.draw = torch.Generator().manual_seed(seed)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.get_buffer("mean")) @ self.w)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.w.T + self.get_buffer("mean")

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.get_buffer("mean").lerp_(x.mean(0), 1 / self.calls)
            self.get_buffer("silent").add_(1)
            self.last = x[-1].clone()
        noise = torch.rand((), generator=self.draw)
        found = (self.decode(self.encode(x)) - x - 1e-3 * self.last).square().mean()
        self.total += float(found.detach())
        silence = self.get_buffer("silent").mean()
        return found * (1 + noise + 1 / self.calls) + self.total * 1e-3 * self.w.sum() * silence


@pytest.mark.parametrize("cut", [1, 13])
def test_a_module_of_ones_own(cut: int, activations: MemorySource) -> None:
    sample = activations.shard(0).rows()[0]
    whole, cut_ = trained_in_two(
        lambda: ModuleCell("own", Own, D_SAE, TRAIN, sample, 3), activations, "rows", cut
    )
    assert whole.sae.calls == STEPS and whole.sae.total > 0
    assert_same(whole.state(), cut_.state())


def test_numbers_come_back_with_every_bit() -> None:
    for value in (0.1, float("inf"), -0.0, 5, True):
        back = as_number(json.loads(json.dumps(as_plain(value))))
        assert type(back) is type(value) and str(back) == str(value)
    assert str(as_number(as_plain(float("nan")))) == "nan"


def test_an_attribute_that_came_later_is_restored() -> None:
    one, fresh = Own(D_IN, D_SAE, 0), Own(D_IN, D_SAE, 0)
    one.later = torch.arange(3)
    one.grown = 7
    restore_module(fresh, module_state(one))
    assert torch.equal(fresh.later, one.later) and fresh.grown == 7
    assert fresh.later is not one.later
