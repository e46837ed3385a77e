"""A cell in training whose checkpoints have a twin at a URL goes on on another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flaky import flaky_store

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.storage.remote import Remote
from saelab.training import loop, resume
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.training.resume import (
    ResumableCell,
    remove_checkpoints,
    restore_cell,
    train_with_checkpoints,
)

SIZE, STEPS, D = 16, 18, 6


class Lost(Exception):
    """The machine is gone."""


@pytest.fixture(scope="module")
def source() -> MemorySource:
    x = torch.randn(40, 8, D, generator=torch_stream(1, "rows at a url"))
    return MemorySource([Shard(x, torch.ones(40, 8, dtype=torch.bool))], {})


def kept(source: MemorySource, folder: Path, twin: Remote | None) -> ResumableCell:
    config = SAEConfig.parse({"d_sae": 32, "precision": "float32"})
    training = TrainConfig(tokens=SIZE * STEPS, batch_size=SIZE)
    sample = source.shard(0).rows()[0]
    return restore_cell(lambda: Cell("a", config, training, sample, 3), folder, twin)


def trained(
    source: MemorySource, member: ResumableCell, until: int = STEPS
) -> dict[str, torch.Tensor]:
    def on_step(steps: int, living: list[Cell]) -> None:
        if living[0].steps_done >= until < STEPS:
            raise Lost

    train_with_checkpoints([member], lambda start: batches(source, 3, SIZE, "rows", start), on_step)
    return member.cell.sae.state_dict()


def test_another_machine_goes_on_from_the_twin(
    source: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LONGEST_TURN", 3)
    wanted = trained(source, kept(source, tmp_path / "whole" / "a", None))
    monkeypatch.setenv(resume.INTERVAL_VARIABLE, "0")
    flaky_store(monkeypatch)
    twin = Remote("flaky://bucket/resume/a")
    with pytest.raises(Lost):
        trained(source, kept(source, tmp_path / "one" / "a", twin), until=9)
    assert {name.partition(".")[2] for name in twin.sizes()} == {"json", "safetensors"}
    assert len(twin.sizes()) <= 2 * resume.CHECKPOINTS_PER_CELL
    other = kept(source, tmp_path / "other" / "a", twin)
    assert 0 < other.cell.steps_done <= 9
    found = trained(source, other)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    remove_checkpoints(tmp_path / "other" / "a", twin)
    assert twin.sizes() == {} and not (tmp_path / "other" / "a").exists()
