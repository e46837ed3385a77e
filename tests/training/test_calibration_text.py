"""L0 is calibrated on text that no metric reads: what is read, when, and what it changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_state import through_a_file
from torch import Tensor

from saelab.data.activations.store import FolderWriter, MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.parts.controllers.l0_target import L0Target
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training import calibration_text
from saelab.training.calibration_text import CalibrationText, calibration_steps
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig

D_IN, D_SAE, SIZE, STEPS, TARGET, SEED = 16, 64, 128, 400, 5.0, 3
CONTEXTS: dict[str, Any] = {
    "activation": {"kind": "tied_threshold", "beta": 0.1},
    "constraints": ["unit_norm"],
    "losses": ["reconstruction", "l0"],
}


def source(part: str, share: float = 0.12, shards: Sequence[int] = (60, 20)) -> MemorySource:
    """Sums of a few of 24 directions; another share of active ones is another text."""
    directions = torch.randn(24, D_IN, generator=torch_stream(0, "directions"))
    stream, made = torch_stream(0, part), []
    for contexts in shards:
        shape = (contexts, 32, 24)
        f = torch.rand(shape, generator=stream) * (torch.rand(shape, generator=stream) < share)
        mask = torch.rand(shape[:2], generator=stream) < 0.9
        noise = 0.1 * torch.randn(contexts, 32, D_IN, generator=stream)
        made.append(Shard(f @ directions + noise, mask))
    return MemorySource(made, {})


TEXT = source("training", shards=(200, 200))


def cell(calibration: MemorySource | None, seed: int = SEED, **changes: Any) -> Cell:
    data = {"d_sae": D_SAE, "initial_l0": 8, "precision": "float32"}
    data |= {"controllers": [{"kind": "l0_target", "target": TARGET}]}
    training = TrainConfig(tokens=STEPS * SIZE, batch_size=SIZE, lr=3e-3, decay=0.4)
    sample = TEXT.shard(0).rows()[0]
    text = None if calibration is None else CalibrationText(calibration)
    config = SAEConfig.parse(data | changes)
    return Cell("cell", config, training, sample, seed, calibration=text)


def trained(one: Cell) -> Cell:
    assert not train([one], batches(TEXT, SEED, SIZE))
    return one


def tensors(one: Cell) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.state().tensors.items()}


def equal(one: Cell, other: Cell) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(
        torch.equal(tensor.nan_to_num(-1.0), theirs[name].nan_to_num(-1.0))
        for name, tensor in mine.items()
        if tensor.is_floating_point()
    )


def l0_on(sae: SAE, text: MemorySource) -> float:
    return measure_reconstruction(sae, CoreData(text, None)).l0


def test_measurements_lie_in_the_second_half_and_closer_towards_the_end() -> None:
    for steps in (1, 2, 16, 256, 977, 30_000):
        after = list(calibration_steps(steps))
        assert after[0] >= max(1, steps // 2) and after[-1] <= steps
        assert list(calibration_steps(steps).values()) == list(range(len(after)))
    gaps = np.diff(list(calibration_steps(30_000)))
    assert (gaps[:-1] >= gaps[1:] - 1).all() and gaps[0] > 10 * gaps[-1]


@pytest.mark.parametrize("changes", [{}, CONTEXTS], ids=["rows", "contexts"])
def test_all_parts_together_read_the_text_once(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "MOST_ROWS", 1.0)
    text = source("calibration")
    sae, n, rows = cell(text, **changes).sae, 7, 10**6
    assert sae.needs_contexts == bool(changes)
    parts = [CalibrationText(text)._rows(sae, i, n, rows) for i in range(n)]
    read = torch.cat([x for x, _ in parts])
    whole = torch.cat([text.shard(i).rows()[0] for i in range(text.n_shards)])
    assert len(read) == len(whole)
    assert torch.equal(read[read[:, 0].argsort()], whole[whole[:, 0].argsort()])
    sizes = [len(x) for x, _ in parts]
    assert max(sizes) - min(sizes) < (150 if changes else 2)
    # the mean over parts is the L0 that a metric would be
    measured = [CalibrationText(text).measure_l0(sae, (i, n), 0, rows) for i in range(n)]
    assert sae.training
    sae.eval()
    read_in_order = [sizes[i * calibration_text._stride(n) % n] for i in range(n)]
    assert np.average(measured, weights=read_in_order) == pytest.approx(l0_on(sae, text), rel=1e-6)


def test_a_small_run_reads_a_share_of_the_text_that_is_spread_over_it() -> None:
    text = source("calibration")
    sae, n = cell(text).sae, 10
    parts = [CalibrationText(text)._rows(sae, i, n, 200)[0] for i in range(n)]
    assert [len(x) for x in parts] == [20] * n
    assert len(torch.cat(parts)[:, 0].unique()) == 200
    whole = torch.cat([text.shard(i).rows()[0] for i in range(text.n_shards)])
    places = [int((whole == row).all(1).nonzero()[0]) for row in parts[3]]
    assert np.ptp(np.diff(places)) <= 12 and places[-1] > 0.9 * len(whole)


def test_seeds_begin_at_different_parts() -> None:
    text = CalibrationText(source("calibration"))
    sae = cell(None).sae
    values = {
        seed: [text.measure_l0(sae, (i, 9), seed, 10**5) for i in range(9)] for seed in (0, 1)
    }
    assert values[0] != values[1] and sorted(values[0]) == sorted(values[1])


@pytest.mark.parametrize("changes", [{}, CONTEXTS], ids=["rows", "contexts"])
def test_a_measurement_changes_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the part ignores it, all bits are those of a run without calibration text."""
    monkeypatch.setattr(L0Target, "calibrate", lambda self, l0: None)
    observers = {"observers": [{"kind": "resampling", "every": 0.1, "patience": 500}]}
    with_text, without = (
        cell(text, **observers, **changes) for text in (source("calibration", 0.3), None)
    )
    before = torch.get_rng_state()
    layout = "contexts" if changes else "rows"
    assert not train([with_text, without], batches(TEXT, SEED, SIZE, layout))
    assert torch.equal(before, torch.get_rng_state())
    assert equal(with_text, without)


def test_parts_that_do_not_ask_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(CalibrationText, "measure_l0", refuse)
    topk: dict[str, Any] = {"activation": {"kind": "topk", "k": 5}, "initial_l0": None}
    trained(cell(source("calibration"), controllers=[], losses=["reconstruction"], **topk))
    with pytest.raises(AssertionError, match="measured"):
        trained(cell(source("calibration")))


def test_l0_ends_near_the_target_on_text_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both texts have an L0 of their own; only one of them can be at the target.

    In a run as short as this the controller itself is 1 to 2% off.
    """
    monkeypatch.setattr(calibration_text, "MOST_ROWS", 1.0)
    calibration, other = (source(part, 0.13, (600,)) for part in ("calibration", "evaluation"))
    alike = source("alike", shards=(600,))
    for seed in (1, 2):
        plain, ended = (trained(cell(text, seed)) for text in (None, calibration))
        off = {one: l0_on(one.sae, other) / TARGET - 1 for one in (plain, ended)}
        assert off[plain] > 0.03 and abs(off[ended]) < 0.025, off
        ratio = l0_on(ended.sae, other) / l0_on(ended.sae, alike)
        assert ended.log.last("sparsity.text_ratio") == pytest.approx(ratio, abs=0.02)


def test_the_same_seed_and_text_give_the_same_bits_and_another_text_others() -> None:
    one, same, other = (trained(cell(source(part, 0.13))) for part in ("a", "a", "b"))
    assert equal(one, same) and not equal(one, other)


@pytest.mark.parametrize("at", [199, 200, 333, 391])
def test_a_run_goes_on_bit_for_bit(at: int) -> None:
    text = source("calibration", 0.13)
    whole, first, second = cell(text), cell(text), cell(text)
    stream = [batch for (batch, _), _ in zip(batches(TEXT, SEED, SIZE), range(STEPS), strict=False)]
    for batch in stream:
        whole.step(batch)
    for batch in stream[:at]:
        first.step(batch)
    second.restore(through_a_file(first.state()))
    for batch in stream[at:]:
        second.step(batch)
    assert equal(whole, second)
    assert second.log.last("sparsity.text_ratio") != 1.0


def test_shards_of_a_folder_are_read_as_those_in_memory(tmp_path: Path) -> None:
    text = source("calibration")
    writer = FolderWriter(tmp_path, text.header)
    for i in range(text.n_shards):
        writer.add(text.shard(i))
    stored, sae = writer.finish(), cell(None).sae
    for i in range(5):
        here, there = (CalibrationText(s).measure_l0(sae, (i, 5), 1, 5000) for s in (text, stored))
        assert here == there
