"""Checkpoints of sparsify against a reference in ten lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saes import D_IN, D_SAE, clear, rows, same, write
from torch import Tensor

from saelab import formats
from saelab.errors import SettingError, SourceError
from saelab.seeding import torch_stream

WEIGHTS = "sae.safetensors"
SHAPES = {
    "encoder.weight": (D_SAE, D_IN),
    "encoder.bias": (D_SAE,),
    "W_dec": (D_SAE, D_IN),
    "b_dec": (D_IN,),
}


def config(**fields: Any) -> dict[str, Any]:
    """As its `save_to_disk` writes it."""
    given = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "k": 3}
    return given | {
        **{"num_latents": 0, "multi_topk": False, "skip_connection": False, "transcode": False},
        **{"d_in": D_IN, **fields},
    }


def weights(seed: int) -> dict[str, Tensor]:
    stream = torch_stream(seed, "weights of sparsify's tests")
    return {name: torch.randn(shape, generator=stream) for name, shape in SHAPES.items()}


def encoded(x: Tensor, t: dict[str, Tensor], k: int = 3) -> Tensor:
    z = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    kept = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_read(dtype: torch.dtype, tmp_path: Path, global_random_seed: int) -> None:
    stored = {name: t.to(dtype) for name, t in weights(global_random_seed).items()}
    own = {name: t.float() for name, t in stored.items()}
    folder = write(tmp_path / "run" / "layers.4", config(), WEIGHTS, stored)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    found = formats.load(folder)
    assert found.origin.hook_name == "blocks.4.hook_resid_post"
    assert found.origin.model == "EleutherAI/pythia-70m"
    assert found.about["format"] == "sparsify"
    x = clear(found.sae, rows(global_random_seed))
    f = encoded(x, own)
    same(found.sae.encode(x), f)
    same(found.sae.decode(f), f @ own["W_dec"] + own["b_dec"])


def test_signed_latents_are_the_largest_in_size(tmp_path: Path, global_random_seed: int) -> None:
    own = weights(global_random_seed)
    found = formats.load(write(tmp_path / "layers.3", config(signed=True), WEIGHTS, own))
    x = clear(found.sae, rows(global_random_seed + 1))
    z = (x - own["b_dec"]) @ own["encoder.weight"].T + own["encoder.bias"]
    latents = z.abs().topk(config()["k"], dim=1).indices
    f = torch.zeros_like(z).scatter(1, latents, z.gather(1, latents))
    assert bool((f < 0).any()) and len(x) > 100
    same(found.sae.encode(x), f)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("h.11", "blocks.11.hook_resid_post"),
        ("layers.3.mlp", "layers.3.mlp"),
        ("my sae", ""),
    ],
)
def test_the_folder_names_the_hook(name: str, hook: str, tmp_path: Path) -> None:
    folder = write(tmp_path / name, config(), WEIGHTS, weights(0))
    assert formats.load(folder).origin.hook_name == hook


def test_the_folder_of_a_seed_lies_in_that_of_the_hook(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "layers.3" / "seed1", config(), WEIGHTS, weights(0))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    origin = formats.load(folder).origin
    assert origin.hook_name == "blocks.3.hook_resid_post"
    assert origin.model == "EleutherAI/pythia-70m"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", "groupmax"),
        ("skip_connection", True),
        ("signed", "yes"),
        ("k", 0),
        ("k", True),
        ("num_latents", D_SAE + 1),
        ("d_in", D_IN + 1),
        ("squash", False),
    ],
)
def test_what_cannot_be_honoured_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, config(**{field: value}), WEIGHTS, weights(0))
    with pytest.raises(SettingError, match=field):
        formats.load(tmp_path)


def test_broken_weights_are_told(tmp_path: Path) -> None:
    write(tmp_path, config(), WEIGHTS, weights(0) | {"W_skip": torch.eye(D_IN)})
    with pytest.raises(SourceError, match="W_skip"):
        formats.load(tmp_path)
