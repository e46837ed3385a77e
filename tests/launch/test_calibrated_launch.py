"""Calibration text of a launch: it is held-out text, no metric reads it, and its digest counts."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from projects import ROOT

import saelab
from saelab import api
from saelab.data.activations.store import FolderSource, FolderWriter, Shard
from saelab.errors import SettingError, ShortTextError
from saelab.launch import waves
from saelab.launch.prepare import LaunchData, prepare
from saelab.preflight.cost import launch_needs
from saelab.preflight.launch_time import preparation_seconds
from saelab.storage.atomic import read_json
from saelab.study import calibration
from saelab.study.calibration import calibration_tokens, describe_calibration
from saelab.study.plan import BaseConfig
from saelab.training import calibration_text
from saelab.training.calibration_text import CalibrationText

CONTEXT = 32


def words(begin: int, end: int) -> str:
    """Text in which every number occurs once, so that no two contexts are alike."""
    return "\n".join(f"x_{i} = {i * 7919 % 100_003}" for i in range(begin, end)) + "\n"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseConfig:
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 500)
    (tmp_path / "train.txt").write_text(words(0, 1500))
    (tmp_path / "held_out.txt").write_text(words(20_000, 21_000))
    changes = {
        "context": CONTEXT,
        "train_text": {"kind": "files", "path": str(tmp_path / "train.txt")},
        "eval_text": {"kind": "files", "path": str(tmp_path / "held_out.txt")},
        "train": {"tokens": 4096, "batch_size": 64},
        "evaluation": {"tokens": 2000, "loss_contexts": 4, "probing": {"entries": "none"}},
        "sae.d_sae": 64,
    }
    return saelab.settings(ROOT / "configs" / "embedded.toml", changes)


def contexts(source: FolderSource) -> set[tuple[int, ...]]:
    shards = [source.shard(i).ids for i in range(source.n_shards)]
    return {tuple(row.tolist()) for ids in shards if ids is not None for row in ids}


def test_calibration_and_evaluation_share_no_context(base: BaseConfig, tmp_path: Path) -> None:
    data = prepare(base, tmp_path / "cache", "cpu")
    evaluated, calibrated = contexts(data.held_out), contexts(data.calibration)  # type: ignore[arg-type]
    assert len(evaluated) > 60 and len(calibrated) > 60 and not evaluated & calibrated
    assert data.calibration is not None and data.why_no_calibration == ""
    assert 2000 <= data.calibration.header["n_tokens"] < 2000 + CONTEXT
    assert data.held_out.digest != data.calibration.digest
    # fewer calibration tokens leave the evaluated contexts as they are, and are a prefix of more
    less = prepare(base.patched({"evaluation.calibration_tokens": 600}), tmp_path / "cache", "cpu")
    assert contexts(less.held_out) == evaluated  # type: ignore[arg-type]
    assert contexts(less.calibration) < calibrated  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"evaluation.calibration_tokens": 0}, "evaluation.calibration_tokens is 0"),
        ({"evaluation.tokens": 400}, "it needs 500 held-out tokens"),
        ({"evaluation.calibration_tokens": 90_000}, "less is held out than 90,000 tokens"),
    ],
)
def test_without_calibration_text_the_reason_is_given(
    base: BaseConfig, tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    data = prepare(base.patched(changes), tmp_path / "cache", "cpu")
    assert data.calibration is None and reason in data.why_no_calibration
    if calibration_tokens(base.patched(changes)) == 0:
        assert reason in describe_calibration(base.patched(changes), [])


def test_an_evaluation_alone_harvests_none(base: BaseConfig, tmp_path: Path) -> None:
    data = prepare(base, tmp_path / "cache", "cpu", to_train=False)
    assert data.calibration is None


def test_its_harvest_is_counted(base: BaseConfig) -> None:
    without = base.patched({"evaluation.calibration_tokens": 0})
    assert launch_needs(base, [], 1, 4).disk > launch_needs(without, [], 1, 4).disk
    assert preparation_seconds(base) > preparation_seconds(without)
    assert "2,000 held-out tokens that no metric reads" in describe_calibration(base, [base.sae])


def rewritten(source: FolderSource, folder: Path, factor: float) -> FolderSource:
    """The same contexts with other activations."""
    writer = FolderWriter(folder, source.header | {"factor": factor})
    for i in range(source.n_shards):
        shard = source.shard(i)
        writer.add(Shard(shard.x * factor, shard.mask, shard.ids, shard.documents))
    return writer.finish()


def swapped(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, folder: Path, changed: str, factor: float
) -> None:
    """Makes the module's launches see other activations in the place of one text's."""

    def prepared(*given: Any, **options: Any) -> LaunchData:
        data = prepare(*given, **options)
        place = folder / f"{changed} {factor}"
        setattr(data, changed, rewritten(getattr(data, changed), place, factor))
        return data

    monkeypatch.setattr(calibration_text, "FARTHEST", 100.0)  # of a run as short as this
    monkeypatch.setattr(calibration_text, "MOST_ROWS", 1.0)
    monkeypatch.setattr(module, "prepare", prepared)


@pytest.mark.parametrize("changed", ["held_out", "calibration"])
def test_only_the_calibration_text_reaches_the_weights(
    base: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Other evaluation text leaves the weights as they are, bit by bit."""
    saes = []
    for factor in (1.0, 1.5):
        swapped(monkeypatch, api, tmp_path, changed, factor)
        saes.append(saelab.train(base, seed=1, cache=tmp_path).state_dict())
    same = all(torch.equal(saes[0][n].nan_to_num(), saes[1][n].nan_to_num()) for n in saes[0])
    assert same == (changed == "held_out")


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["held_out", "calibration"])
def test_so_it_is_in_a_launch_and_both_texts_are_in_the_keys_of_cells(
    base: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    weights, cells = [], []
    monkeypatch.chdir(tmp_path)
    for factor in (1.0, 1.5):
        swapped(monkeypatch, waves, tmp_path, changed, factor)
        out, arms = tmp_path / f"run {factor}", {"rate": {"train.lr": 4e-3}}
        saelab.compare(base, arms, seeds=2, out_dir=out, target_l0=8, seeds_levels=0)
        files = sorted(out.rglob("sae.safetensors"))
        weights.append([file.read_bytes() for file in files])
        manifest = read_json(out / "manifest.json")
        cells.append(manifest["cells"])
        assert manifest["data"]["calibration"]["after"] == 2000
    assert len(weights[0]) == 4 and (weights[0] == weights[1]) == (changed == "held_out")
    assert all(cells[0][name] != cells[1][name] for name in cells[0])


def test_training_is_calibrated(
    base: BaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "FARTHEST", 100.0)
    monkeypatch.setattr(calibration_text, "MOST_ROWS", 1.0)
    base = base.patched({"sae.controllers": [{"kind": "l0_target", "target": 24}]})
    one = saelab.train(base, seed=1, cache=tmp_path)
    without = base.patched({"evaluation.calibration_tokens": 0})
    other = saelab.train(without, seed=1, cache=tmp_path)
    text = prepare(base, tmp_path, "cpu").calibration
    assert text is not None
    l0 = [CalibrationText(text).measure_l0(sae.eval()) for sae in (one, other)]
    assert l0[0] == pytest.approx(24, rel=0.01) and abs(l0[1] / 24 - 1) > 0.05


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(SettingError, match="calibration_tokens"):
        BaseConfig.parse({"evaluation": {"calibration_tokens": -1}})
    assert issubclass(ShortTextError, saelab.errors.UsageError)
