"""A model that predicts a text worse than counts of its tokens is warned of before training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny_models
import torch
from projects import BASE, BASELINE, RATE, Project
from torch import Tensor

import saelab
from saelab.data import language_model
from saelab.data.clean_loss import CleanLoss, measure_clean_loss
from saelab.launch import prepare as preparing
from saelab.seeding import torch_stream
from saelab.study.plan import BaseConfig


def test_both_losses_by_hand() -> None:
    model = tiny_models.tiny_neox(8, 16, 0.5)
    ids = torch.randint(2, 20, (4, 12), generator=torch_stream(0, "ids"))
    mask = torch.rand(ids.shape, generator=torch_stream(1, "mask")) < 0.7
    training = torch.tensor([5, 5, 5, 7], dtype=torch.int32)
    found = measure_clean_loss(model, training, ids, mask)
    assert found is not None
    counted = mask[:, 1:]
    assert (found.tokens, found.training_tokens) == (int(counted.sum()), 4)
    assert found.clean == pytest.approx(float(model.losses(ids)[counted].mean()), rel=1e-5)
    counts = {5: 4, 7: 2}  # add-one, over 4 tokens and a vocabulary of 20
    expected = [-math.log(counts.get(int(i), 1) / 24) for i in ids[:, 1:][counted]]
    assert found.unigram == pytest.approx(sum(expected) / len(expected))
    none = torch.zeros_like(mask)
    assert measure_clean_loss(model, training, ids, none) is None


def test_a_better_model_gives_no_warning_and_a_worse_one_a_sentence() -> None:
    losses = CleanLoss(clean=6.5, unigram=6.5, tokens=1016, training_tokens=65_536)
    assert losses.warning("m", "t") == ""
    for clean in (6.6, math.nan):
        bad = CleanLoss(clean=clean, unigram=6.5, tokens=1016, training_tokens=65_536)
        text = bad.warning("models/a", "held_out.txt")
        for part in ("models/a", "held_out.txt", f"{clean:.3f} nats", "6.500", "1,016", "65,536"):
            assert part in text
        assert "add-one" in text and "\n" not in text


def random_weights(folder: Path) -> Path:
    """The embedded model with random weights and its tokenizer."""
    model = language_model.load(language_model.ModelConfig())
    stream = torch_stream(0, "test weights")

    def drawn(weight: Tensor) -> Tensor:
        return 0.5 * torch.randn(weight.shape, generator=stream)

    with torch.no_grad():
        for weight in model.model.parameters():
            weight.copy_(drawn(weight))
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_a_launch_warns_of_random_weights_before_it_trains(tmp_path: Path) -> None:
    path = random_weights(tmp_path / "random")
    base = f'[model]\npath = "{path}"\n\n'
    project = Project.make(
        tmp_path / "project",
        (BASELINE, RATE),
        base=BASE.replace("[train_text]", base + "[train_text]"),
    )
    ended = project.call()
    assert ended.code == 0, ended.err
    (line,) = (line for line in ended.err.splitlines() if "worse than a unigram model" in line)
    assert str(path) in line and "held_out.txt" in line
    assert ended.err.index(line) < ended.err.index("to train (")
    stored = project.manifest()["clean_loss"]
    assert stored["clean"] > stored["unigram"] and f"{stored['clean']:.3f} nats" in line


def test_the_embedded_model_is_not_warned_of_and_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `saelab.train`, with a loss that reads the model's output too."""
    loads: list[str] = []
    load = language_model.load

    def counted(config: language_model.ModelConfig) -> language_model.LanguageModel:
        loads.append(config.path)
        return load(config)

    monkeypatch.setattr(language_model, "load", counted)
    changes = {
        **{"train.tokens": 4096, "train.batch_size": 128, "evaluation.tokens": 2000},
        **{"context": 32, "layout": "contexts", "sae.d_sae": 64, "sae.losses": ["kl"]},
        **{"sae.activation": {"kind": "topk", "k": 8}, "sae.controllers": []},
        **{"sae.initial_l0": None, "evaluation.calibration_tokens": 0},
    }
    base = BaseConfig().patched(changes)
    saelab.train(base, cache=tmp_path)
    assert len(loads) == 1
    assert "unigram" not in capsys.readouterr().err
    prepared = preparing.prepare(base, tmp_path / ".saelab", "cpu")
    assert prepared.clean_loss is not None and prepared.model is None
    assert prepared.clean_loss.clean < prepared.clean_loss.unigram - 1
    assert prepared.clean_loss.training_tokens >= 4096  # of the stored activations now
