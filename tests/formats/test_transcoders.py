"""Transcoders as SAELens 6.54 and sparsify 1.3 write them, read and (SAELens) written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import READ, WRITTEN, pair_sample, pair_source
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab import formats
from saelab.data.activations.stream import batches
from saelab.errors import SettingError, SourceError
from saelab.formats.base import Plain
from saelab.formats.saelens_transcoders import ARCHITECTURES
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig

D_SAE = 20
HOOKS = "blocks.1.mlp.hook_in -> blocks.1.hook_mlp_out"
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def weights(architecture: str) -> dict[str, Tensor]:
    stream = torch_stream(0, "transcoder weights")
    shapes = {"W_enc": (READ, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, WRITTEN)}
    shapes |= {"b_dec": (WRITTEN,)}
    if "jumprelu" in architecture:
        shapes["threshold"] = (D_SAE,)
    if "skip" in architecture:
        shapes["W_skip"] = (WRITTEN, READ)
    return {name: torch.rand(shape, generator=stream) - 0.4 for name, shape in shapes.items()}


def saelens_forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """`Transcoder.forward` and its three relatives of SAELens 6.54."""
    z = x @ w["W_enc"] + w["b_enc"]
    f = torch.relu(z)
    if "threshold" in w:
        f = f * (z > w["threshold"])
    y = f @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].T if "W_skip" in w else y


def write(folder: Path, architecture: str, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    config = {"architecture": architecture, "d_in": READ, "d_sae": D_SAE, "d_out": WRITTEN}
    config |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
    config |= {"metadata": {"sae_lens_version": "6.54.0", **metadata}} | fields
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(
        {name: t.contiguous() for name, t in weights(architecture).items()},
        folder / "sae_weights.safetensors",
    )
    return folder


def whole(sae: SAE, x: Tensor) -> Tensor:
    return sae.complete(sae.decode(sae.encode(x)), x)


@every_architecture
def test_saelens_transcoders_are_read(architecture: str, tmp_path: Path) -> None:
    loaded = formats.load(write(tmp_path, architecture))
    x = torch.randn(30, READ, generator=torch_stream(1, "rows"))
    torch.testing.assert_close(
        whole(loaded.sae, x), saelens_forward(weights(architecture), x), rtol=1e-4, atol=1e-5
    )
    assert loaded.sae.dims.targets == (WRITTEN,) and loaded.origin.hook_name == HOOKS
    for block, code in loaded.sae.codes(x):
        y_hat = loaded.sae.complete(loaded.sae.decode_code(code), x[block])
        torch.testing.assert_close(y_hat, whole(loaded.sae, x)[block], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_out": WRITTEN + 1}, "d_out"),
        ({"d_in": READ + 1}, "d_in"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"hook_head_index_out": 1}, "hook_head_index_out"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        formats.load(write(tmp_path, "skip_transcoder", **fields))


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "transcoder")
    save_file(weights("skip_transcoder"), folder / "sae_weights.safetensors")
    with pytest.raises(SourceError, match="W_skip"):
        formats.load(folder)


def trained(**changes: Any) -> SAE:
    settings = {"d_sae": 32, "losses": ["reconstruction"], "controllers": []} | changes
    training = TrainConfig(tokens=30 * 32, batch_size=32, lr=3e-3)
    cell = Cell("cell", SAEConfig.parse(settings), training, pair_sample(), 1)
    assert not train([cell], batches(pair_source(), 1, 32))
    return cell.sae


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("relu", "transcoder"),
        ("jumprelu", "jumprelu_transcoder"),
        ({"kind": "batchtopk", "k": 4}, "jumprelu_transcoder"),
    ],
)
@pytest.mark.parametrize("scaling", [None, "variance"])
def test_ours_are_written(
    activation: Any, kind: str, skip: bool, scaling: str | None, tmp_path: Path
) -> None:
    sae = trained(activation=activation, skip=skip, scaling=scaling)
    formats.saver("saelens")(sae, tmp_path, {"hook_name": HOOKS, "model": "embedded"})
    config = json.loads((tmp_path / "cfg.json").read_text())
    name = kind.replace("transcoder", "skip_transcoder") if skip else kind
    assert config["architecture"] == name and config["d_out"] == WRITTEN
    assert config["apply_b_dec_to_input"] is False
    assert config["metadata"]["hook_name"] == "blocks.1.mlp.hook_in"
    assert config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    x = pair_sample().x[:50]
    wanted = whole(sae, x)
    found = saelens_forward(load_file(tmp_path / "sae_weights.safetensors"), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    again = formats.load(tmp_path)
    torch.testing.assert_close(whole(again.sae, x), wanted, rtol=1e-3, atol=2e-3)
    assert again.origin.hook_name == HOOKS


def test_forms_that_saelens_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no TopK transcoder"):
        formats.saver("saelens")(trained(activation={"kind": "topk", "k": 4}), tmp_path, {})
    sample = pair_sample((READ, 5), ())
    crosscoder = SAEConfig(d_sae=16).build(sample.d_in)
    crosscoder.initialise(sample.x, 1)
    with pytest.raises(SettingError, match="several hook points"):
        formats.saver("saelens")(crosscoder.eval(), tmp_path, {})


@pytest.mark.parametrize("skip", [False, True])
def test_sparsifys_transcoders_are_read(skip: bool, tmp_path: Path) -> None:
    stream = torch_stream(0, "sparsify weights")
    shapes = {"encoder.weight": (D_SAE, READ), "encoder.bias": (D_SAE,)}
    shapes |= {"W_dec": (D_SAE, READ), "b_dec": (READ,)} | (
        {"W_skip": (READ, READ)} if skip else {}
    )
    t = {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}
    folder = tmp_path / "layers.3.mlp"
    folder.mkdir()
    save_file(t, folder / "sae.safetensors")
    config = {"activation": "topk", "k": 3, "num_latents": D_SAE, "d_in": READ}
    config |= {"transcode": True, "skip_connection": skip}
    (folder / "cfg.json").write_text(json.dumps(config))
    loaded = formats.load(folder)
    x = torch.randn(30, READ, generator=stream)
    z = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
    top = z.topk(3, dim=1)
    f = torch.zeros_like(z).scatter(1, top.indices, top.values)
    y = f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].mT if skip else 0)
    torch.testing.assert_close(whole(loaded.sae, x), y, rtol=1e-4, atol=1e-4)
    assert loaded.origin.hook_name == "blocks.3.mlp.hook_in -> blocks.3.hook_mlp_out"


def test_a_skip_without_a_target_is_refused(tmp_path: Path) -> None:
    plain = Plain(*(torch.ones(3, 2), torch.ones(3), torch.ones(3, 2), torch.ones(2)))
    from dataclasses import replace

    with pytest.raises(SourceError, match="skip connection, but reconstructs its input"):
        replace(plain, W_skip=torch.ones(2, 2)).validate(tmp_path)
