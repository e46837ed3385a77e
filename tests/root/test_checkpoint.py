"""A saved SAE comes back bitwise; a changed byte is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab import checkpoint
from saelab.checks.examples import cases
from saelab.data.activations.stream import Batch
from saelab.errors import DamageError, SourceError
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

PROVENANCE: dict[str, Any] = {"model": "m", "hook_name": "blocks.1.hook_resid_post", "seed": 3}
CONFIGS: dict[str, dict[str, Any]] = {str(case): dict(case.settings(16)) for case in cases(16)} | {
    "relu": {},
    "batchtopk": {
        "activation": {"kind": "batchtopk", "k": 3},
        "scaling": {"kind": "variance", "tying": "per_feature"},
        "losses": ["reconstruction", "auxk", "scalar_prior"],
        "observers": ["resampling"],
    },
    "jumprelu": {"activation": "jumprelu", "losses": ["reconstruction", "l0"]},
    "tied": {"tied": True, "constraints": ["unit_norm"]},
    "tied_threshold": {
        "activation": {"kind": "tied_threshold", "temperature": "learned"},
        "losses": ["reconstruction", "l0"],
        "constraints": ["unit_norm"],
    },
}


def trained(kind: str, seed: int) -> SAE:
    x = torch.randn(64, 6, generator=torch_stream(seed, "checkpoint data"))
    config = SAEConfig.parse({"d_sae": 16, **CONFIGS[kind]})
    cell = Cell("c", config, TrainConfig(tokens=640, batch_size=64), x, seed)
    for _ in range(3):
        cell.step(Batch(x, torch.zeros(64, dtype=torch.int64)))
    return cell.sae.eval()


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_round_trip_is_bitwise(kind: str, tmp_path: Path, global_random_seed: int) -> None:
    sae = trained(kind, global_random_seed)
    checkpoint.save(sae, tmp_path / "new" / "folder", PROVENANCE)
    again, provenance = checkpoint.load(tmp_path / "new" / "folder")
    assert provenance == PROVENANCE and again.config == sae.config and not again.training
    before, after = sae.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.nan_to_num(nan=-7.5), after[name].nan_to_num(nan=-7.5)), name
    x = torch.randn(20, 6, generator=torch_stream(global_random_seed, "checkpoint check"))
    assert torch.equal(sae.encode(x), again.encode(x))
    assert torch.equal(sae.decode(sae.encode(x)), again.decode(again.encode(x)))


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.float64), None])
def test_training_state_of_another_version_does_not_matter(
    tmp_path: Path, state: torch.Tensor | None
) -> None:
    """An SAE is loaded to encode: a controller's state of another length, or none, is no damage."""
    sae = trained("relu", 0)
    controller = sae.controllers["l0_target"]
    if state is None:
        del controller._buffers["state"]
    else:
        controller.state = state
    controller.register_buffer("of_former_versions", torch.ones(2))
    checkpoint.save(sae, tmp_path, PROVENANCE)
    again, _ = checkpoint.load(tmp_path)
    x = torch.randn(20, 6, generator=torch_stream(0, "checkpoint check"))
    assert torch.equal(sae.encode(x), again.encode(x))
    fresh = sae.config.build(6).controllers["l0_target"]
    assert again.controllers["l0_target"].state.shape == fresh.state.shape


def test_a_weight_of_another_shape_is_damage(tmp_path: Path) -> None:
    sae = trained("relu", 0)
    sae.scale = torch.ones(3)
    checkpoint.save(sae, tmp_path, PROVENANCE)
    with pytest.raises(DamageError, match=r"scale is \(3,\)"):
        checkpoint.load(tmp_path)


def test_saving_changes_nothing(tmp_path: Path, global_random_seed: int) -> None:
    sae = trained("batchtopk", global_random_seed).train()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    checkpoint.save(sae, tmp_path, PROVENANCE)
    assert sae.training
    for name, tensor in sae.state_dict().items():  # NaN stands for 'not yet'
        assert torch.equal(before[name].nan_to_num(nan=-7.5), tensor.nan_to_num(nan=-7.5)), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae.json", "sae.safetensors"]


def test_same_sae_same_bytes(tmp_path: Path, global_random_seed: int) -> None:
    sae = trained("relu", global_random_seed)
    for name in ("a", "b"):
        checkpoint.save(sae, tmp_path / name, PROVENANCE)
    for file in ("sae.json", "sae.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.999])
def test_flipped_byte_in_the_tensors(place: float, tmp_path: Path, global_random_seed: int) -> None:
    checkpoint.save(trained("relu", global_random_seed), tmp_path, PROVENANCE)
    file = tmp_path / "sae.safetensors"
    flip(file, int(place * file.stat().st_size))
    with pytest.raises(DamageError, match=r"sae\.safetensors does not match its checksum"):
        checkpoint.load(tmp_path)


def test_flipped_bytes_in_the_settings(tmp_path: Path, global_random_seed: int) -> None:
    """A changed digit is still JSON: only the digest tells. White space may change."""
    checkpoint.save(trained("relu", global_random_seed), tmp_path, PROVENANCE)
    file = tmp_path / "sae.json"
    content = file.read_bytes()
    for at in range(global_random_seed % 5, len(content), 5):
        if chr(content[at]).isspace():
            continue
        flip(file, at)
        with pytest.raises((DamageError, SourceError)):
            checkpoint.load(tmp_path)
        file.write_bytes(content)
    checkpoint.load(tmp_path)


@pytest.mark.parametrize("length", [0, 100])
def test_truncated(length: int, tmp_path: Path, global_random_seed: int) -> None:
    checkpoint.save(trained("relu", global_random_seed), tmp_path, PROVENANCE)
    file = tmp_path / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(DamageError, match="checksum"):
        checkpoint.load(tmp_path)


def test_missing_files(tmp_path: Path, global_random_seed: int) -> None:
    with pytest.raises(SourceError, match=r"holds no sae\.json"):
        checkpoint.load(tmp_path)
    checkpoint.save(trained("relu", global_random_seed), tmp_path, PROVENANCE)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(DamageError):
        checkpoint.load(tmp_path)


def test_another_format(tmp_path: Path, global_random_seed: int) -> None:
    checkpoint.save(trained("relu", global_random_seed), tmp_path, PROVENANCE)
    record = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(SourceError, match="has format 99, this version reads 1"):
        checkpoint.load(tmp_path)
