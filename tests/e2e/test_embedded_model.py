"""The embedded language model: its card tells the truth, and its recipe resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.assets import EMBEDDED_MODEL
from saelab.data import language_model
from saelab.data.text import stdlib

SMALLEST_LEAD = 1.0  # nats per token over the bigram model; the card says 1.58


def recipe_json() -> dict:
    return json.loads((EMBEDDED_MODEL / "recipe.json").read_text())


def test_the_stored_model_beats_the_bigram_clearly() -> None:
    losses = recipe_json()["losses_nats_per_token"]
    assert losses["model"] < losses["bigram"] - SMALLEST_LEAD < losses["unigram"]


def test_the_stored_weights_have_the_loss_that_the_card_states() -> None:
    """On a sample of the held-out contexts; tied to the corpus that the card was measured on."""
    from saelab.data import language_model_recipe

    facts = recipe_json()
    if stdlib.manifest()["sha256"] != facts["corpus"]["sha256"]:
        pytest.skip("the card was measured on the standard library of another Python")
    model = language_model.load(language_model.ModelConfig())
    stream = language_model_recipe.token_stream(model.tokenizer, stdlib.texts("held_out"))  # type: ignore[arg-type]
    contexts = language_model_recipe.windows(
        stream, 128, language_model_recipe._token_id(model.tokenizer, language_model_recipe.BOS)
    )  # type: ignore[arg-type]
    sample = contexts[:: max(1, len(contexts) // 256)]
    loss = language_model_recipe.held_out_loss(model.model, sample)
    assert loss == pytest.approx(facts["losses_nats_per_token"]["model"], abs=0.1)


def test_the_model_is_small_and_safe() -> None:
    files = {file.name: file.stat().st_size for file in EMBEDDED_MODEL.iterdir() if file.is_file()}
    assert sum(files.values()) <= 12e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    weights = load_file(EMBEDDED_MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    assert config["model_type"] == "gpt_neox"
    assert config["hidden_size"] >= 192 and config["num_hidden_layers"] >= 4


def test_held_out_modules_depend_on_the_path_alone() -> None:
    assert stdlib.is_held_out("argparse.py") == (stdlib.path_hash("argparse.py") % 3 == 0)
    share = sum(m.held_out for m in stdlib.modules()) / len(stdlib.modules())
    assert 0.25 < share < 0.42
    families = {m.path.split("/")[0] for m in stdlib.modules()}
    assert not families & {"test", "site-packages", "encodings"}


@pytest.mark.slow
def test_training_goes_on_exactly_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    from saelab.data import language_model_recipe

    small = language_model_recipe.Recipe(
        tokens=8 * 4 * 128, batch=4, d_model=32, n_heads=2, n_layers=2
    )
    monkeypatch.setattr(language_model_recipe.stdlib, "texts", lambda split: _texts(split))
    language_model_recipe.train(tmp_path / "whole", small)

    take_step, taken = language_model_recipe._step, []

    def interrupted(*args):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(None)
        return take_step(*args)

    monkeypatch.setattr(language_model_recipe, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        language_model_recipe.train(tmp_path / "halves", small)
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    monkeypatch.setattr(language_model_recipe, "_step", take_step)
    language_model_recipe.train(tmp_path / "halves", small)

    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halves = load_file(tmp_path / "halves" / "model.safetensors")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert not (tmp_path / "halves" / ".resume").exists()


def _texts(split: str) -> list[str]:
    """A tenth of the library, so that tokeniser and losses take seconds."""
    return [m.text for m in stdlib.modules() if m.held_out == (split == "held_out")][::10]
