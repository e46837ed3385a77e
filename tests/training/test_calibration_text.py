"""The last step of a training: L0 is brought to its target on text that no metric reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.activations.store import FolderWriter, MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training import calibration_text
from saelab.training.calibration_text import FARTHEST, NEAR, CalibrationText
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


def cell(seed: int = SEED, **changes: Any) -> Cell:
    data = {"d_sae": D_SAE, "initial_l0": 8, "precision": "float32"}
    data |= {"controllers": [{"kind": "l0_target", "target": TARGET}]}
    training = TrainConfig(tokens=STEPS * SIZE, batch_size=SIZE, lr=3e-3, decay=0.4)
    return Cell("cell", SAEConfig.parse(data | changes), training, TEXT.shard(0).rows()[0], seed)


def trained(one: Cell) -> Cell:
    layout = "contexts" if one.sae.needs_contexts else "rows"
    assert not train([one], batches(TEXT, SEED, SIZE, layout))
    return one


def tensors(one: Cell) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.state().tensors.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ."""
    assert before.keys() == after.keys()
    return {
        n for n, x in before.items() if not torch.equal(x.nan_to_num(-1), after[n].nan_to_num(-1))
    }


def l0_on(sae: SAE, text: MemorySource) -> float:
    return measure_reconstruction(sae, CoreData(text, None)).l0


BATCHTOPK: dict[str, Any] = {
    "activation": {"kind": "batchtopk", "k": int(TARGET)},
    "controllers": [],
    "losses": ["reconstruction"],
    "initial_l0": None,
}
#: Settings of an SAE -> the tensors that settling may move.
SETTLED: list[tuple[dict[str, Any], str]] = [
    ({}, "sae/own/b_enc"),
    ({"activation": "jumprelu", "losses": ["reconstruction", "l0"]}, "log_threshold"),
    (CONTEXTS, "log_theta"),
    (BATCHTOPK, "ema"),
]
NAMES = ["relu", "jumprelu", "tied_threshold", "batchtopk"]


@pytest.mark.parametrize(("changes", "moved"), SETTLED, ids=NAMES)
def test_l0_is_hit_on_other_text_by_moving_the_thresholds_alone(
    changes: dict[str, Any], moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text differs from that of the training, so that L0 is off before."""
    monkeypatch.setattr(calibration_text, "MOST_ROWS", 1.0)
    monkeypatch.setattr(calibration_text, "FARTHEST", 0.2)
    calibration, other = (source(part, 0.13, (600,)) for part in ("calibration", "evaluation"))
    one = trained(cell(**changes))
    before, l0, drawn = tensors(one), l0_on(one.sae, other), torch.get_rng_state()
    distance = one.scalar_distance()
    one.settle(CalibrationText(calibration))
    assert one.settled is not None
    assert 0.01 < abs(l0 / TARGET - 1) < 0.2
    assert one.settled.after == pytest.approx(TARGET, rel=2 * NEAR)
    assert l0_on(one.sae, calibration) == pytest.approx(TARGET, rel=0.003)
    assert l0_on(one.sae, other) == pytest.approx(TARGET, rel=0.01)
    assert (one.settled.amount > 0) == (one.settled.before > TARGET)
    names = changed(before, tensors(one))
    assert len(names) == 1 and next(iter(names)).endswith(moved)
    assert torch.equal(drawn, torch.get_rng_state())
    assert one.scalar_distance() == distance  # how far training moved a scalar is not touched


def test_settling_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "FARTHEST", 0.2)
    text = CalibrationText(source("calibration", 0.13, (600,)))
    one = trained(cell())
    one.settle(text)
    before = tensors(one)
    one.settle(text)
    assert not changed(before, tensors(one))


def test_the_same_seed_and_text_give_the_same_bits_and_another_text_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration_text, "FARTHEST", 0.2)
    ended = []
    for part in ("a", "a", "b"):
        one = trained(cell())
        one.settle(CalibrationText(source(part, 0.13)))
        ended.append(tensors(one))
    assert not changed(ended[0], ended[1]) and changed(ended[0], ended[2])


UNSETTLED: list[dict[str, Any]] = [
    {"activation": {"kind": "topk", "k": 5}, "losses": ["reconstruction"], "controllers": []},
    {"controllers": [], "losses": ["reconstruction", {"kind": "l1", "coefficient": 0.05}]},
    {"encoder_bias": False, "initial_l0": None},
]


@pytest.mark.parametrize("changes", UNSETTLED, ids=["topk", "no target", "no bias"])
def test_where_no_threshold_or_target_is_nothing_is_read(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(CalibrationText, "measure_l0", refuse)
    one = cell(**({"initial_l0": None} | changes))
    one.sae.eval()
    before = tensors(one)
    one.settle(CalibrationText(source("calibration")))
    assert one.settled is None and not changed(before, tensors(one))


def test_an_sae_that_is_far_from_its_target_is_left_there() -> None:
    one = trained(cell())
    one.sae.b_enc.data.sub_(0.5)
    before = tensors(one)
    text = source("calibration")
    assert abs(l0_on(one.sae, text) / TARGET - 1) > FARTHEST
    one.settle(CalibrationText(text))
    assert one.settled is None and not changed(before, tensors(one))


@pytest.mark.parametrize("changes", [{}, CONTEXTS], ids=["rows", "contexts"])
def test_all_of_the_text_or_every_nth_row_of_it_is_read(changes: dict[str, Any]) -> None:
    text, one = source("calibration"), cell(**changes).sae
    one.eval()
    reader = CalibrationText(text)
    whole = torch.cat([text.shard(i).rows()[0] for i in range(text.n_shards)])
    assert torch.equal(torch.cat([x for x, _ in reader._blocks(one, 1)]), whole)
    assert reader.measure_l0(one) == pytest.approx(l0_on(one, text), rel=1e-6)
    some = torch.cat([x for x, _ in reader._blocks(one, 7)])
    if one.needs_contexts:
        masks = torch.cat([text.shard(i).mask for i in range(text.n_shards)])
        assert len(some) == int(masks[::7].sum())
    else:
        assert torch.equal(some, whole[::7])


def test_a_short_run_reads_a_share_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    blocks = CalibrationText._blocks

    def counted(self: CalibrationText, sae: SAE, every: int) -> Any:
        for x, starts in blocks(self, sae, every):
            read.append(len(x))
            yield x, starts

    monkeypatch.setattr(CalibrationText, "_blocks", counted)
    one = cell(activation="jumprelu", losses=["reconstruction", "l0"])
    one.sae.eval()
    text = source("calibration")
    monkeypatch.setattr(calibration_text, "FARTHEST", 100.0)
    CalibrationText(text).settle(one.sae, training_rows=2000)
    assert 250 < sum(read[:2]) <= 300  # of 2,000 rows


def test_shards_of_a_folder_are_read_as_those_in_memory(tmp_path: Path) -> None:
    text = source("calibration")
    writer = FolderWriter(tmp_path, text.header)
    for i in range(text.n_shards):
        writer.add(text.shard(i))
    stored, sae = writer.finish(), cell().sae
    sae.eval()
    for every in (1, 5):
        here, there = (CalibrationText(s).measure_l0(sae, every) for s in (text, stored))
        assert here == there


def correction(one: Cell) -> float:
    (controller,) = one.sae.controller_parts()
    return controller.correction


DENSER = 0.16  # share of active directions, a third more than in the training text


@pytest.mark.parametrize("changes", [made for made, _ in SETTLED[:3]], ids=NAMES[:3])
def test_text_of_another_kind_is_aimed_at_while_training(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "RATIO_ROWS", 0.2)
    text, other = (source(part, DENSER, (600,)) for part in ("calibration", "evaluation"))
    plain, aimed = cell(**changes), cell(**changes)
    aimed.aim_at(CalibrationText(text))
    for one in (plain, aimed):
        trained(one).settle(CalibrationText(text))
    assert plain.settled is None and l0_on(plain.sae, other) > 1.1 * TARGET
    assert aimed.settled is not None
    assert l0_on(aimed.sae, other) == pytest.approx(TARGET, rel=0.02)
    assert -0.5 < correction(aimed) < -0.1


def test_text_of_the_same_kind_changes_no_bit_of_the_training() -> None:
    plain, aimed = cell(), cell()
    text = source("calibration", shards=(600,))
    aimed.aim_at(CalibrationText(text))
    drawn = torch.get_rng_state()
    states = [tensors(trained(one)) for one in (plain, aimed)]
    assert abs(l0_on(aimed.sae, text) / TARGET - 1) < FARTHEST
    assert not changed(*states) and torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize("share", [0.4, 0.55, 0.7])
def test_a_cell_that_goes_on_aims_as_one_that_was_not_stopped(share: float) -> None:
    text, stop = CalibrationText(source("calibration", DENSER)), int(share * STEPS)
    whole, first, second = cell(), cell(), cell()
    every = [batch for batch, _ in zip(batches(TEXT, SEED, SIZE), range(STEPS), strict=False)]
    for one in (whole, first, second):
        one.aim_at(text)
    train([whole], every)
    train([first], every[:stop])
    second.restore(first.state())
    second.sae.train()
    train([second], every[stop:])
    assert second.done and not changed(tensors(whole), tensors(second))
    assert correction(whole) < -0.1
