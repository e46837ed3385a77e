"""Directories of dictionary_learning, each class against its equation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saes import D_IN, D_SAE, clear, rows, same
from torch import Tensor

from saelab import formats
from saelab.errors import SettingError, SourceError
from saelab.seeding import torch_stream

LINEAR = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,)}
LINEAR |= {"decoder.weight": (D_IN, D_SAE)}
MATRICES = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
THRESHOLD = {"k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(1.2)}
GROUPS = {"group_sizes": torch.tensor([8, D_SAE - 8])}
GATES = {name: (D_SAE,) for name in ("r_mag", "gate_bias", "mag_bias")}


def linear(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return x @ t["encoder.weight"].T + t["encoder.bias"]


def auto_encoder(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return linear(x - t["bias"], t).relu() * t["decoder.weight"].norm(dim=0)


def gated(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    y = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    return (y + t["gate_bias"] > 0) * (t["r_mag"].exp() * y + t["mag_bias"]).relu()


def topk(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    z = linear(x - t["b_dec"], t).relu()
    kept = z.topk(3, dim=1)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values)


def batchtopk(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    z = linear(x - t["b_dec"], t).relu()
    return z * (z > t["threshold"])


def matryoshka(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    z = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    return z * (z > t["threshold"])


def jumprelu(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    z = x @ t["W_enc"] + t["b_enc"]
    return (z * (z > t["threshold"])).relu()


#: Class -> shapes of random tensors, further tensors, code, and what is decoded with.
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor], Callable[..., Tensor], str, str]] = {
    "AutoEncoder": (LINEAR | {"bias": (D_IN,)}, {}, auto_encoder, "decoder.weight", "bias"),
    "AutoEncoderNew": (
        LINEAR | {"decoder.bias": (D_IN,)},
        {},
        lambda x, t: linear(x, t).relu(),
        "decoder.weight",
        "decoder.bias",
    ),
    "GatedAutoEncoder": (
        {n: s for n, s in LINEAR.items() if n != "encoder.bias"}
        | {"decoder_bias": (D_IN,), **GATES},
        {},
        gated,
        "decoder.weight",
        "decoder_bias",
    ),
    "AutoEncoderTopK": (LINEAR | {"b_dec": (D_IN,)}, THRESHOLD, topk, "decoder.weight", "b_dec"),
    "BatchTopKSAE": (LINEAR | {"b_dec": (D_IN,)}, THRESHOLD, batchtopk, "decoder.weight", "b_dec"),
    "MatryoshkaBatchTopKSAE": (MATRICES, THRESHOLD | GROUPS, matryoshka, "W_dec", "b_dec"),
    "JumpReluAutoEncoder": (MATRICES | {"threshold": (D_SAE,)}, {}, jumprelu, "W_dec", "b_dec"),
}


def save(folder: Path, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Writes a directory as a trainer leaves it; returns its tensors."""
    shapes, more, *_ = CASES[kind]
    stream = torch_stream(seed, "weights of dictionary_learning's tests")
    tensors = {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()} | more
    trainer = {"dict_class": kind, "lm_name": "EleutherAI/pythia-70m", "layer": 4}
    trainer |= {"submodule_name": "resid_post_layer_4", "activation_dim": D_IN}
    trainer |= {"k": 3} if "k" in more else {}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    torch.save(tensors, folder / "ae.pt")
    return tensors


@pytest.mark.parametrize("kind", list(CASES))
def test_each_class_is_read(kind: str, tmp_path: Path, global_random_seed: int) -> None:
    tensors = save(tmp_path, kind, global_random_seed)
    found = formats.load(tmp_path, "dictionary_learning")
    assert found.origin.hook_name == "blocks.4.hook_resid_post"
    assert found.origin.model == "EleutherAI/pythia-70m"
    _, _, encode, decoder, bias = CASES[kind]
    x = clear(found.sae, rows(global_random_seed))
    assert len(x) > 100
    f = encode(x, tensors)
    assert 0 < float((f > 0).float().mean()) < 1
    same(found.sae.encode(x), f)
    w_dec = tensors[decoder] if decoder == "W_dec" else tensors[decoder].T
    if kind == "AutoEncoder":  # its loader scales the rows to norm 1
        w_dec = w_dec / w_dec.norm(dim=1, keepdim=True)
    same(found.sae.decode(f), f @ w_dec + tensors[bias])


@pytest.mark.parametrize(
    ("trainer", "hook"),
    [
        ({"layer": 3}, "blocks.3.hook_resid_post"),
        ({"layer": 3, "submodule_name": "mlp_out_layer_3"}, ""),
        ({"layer": "3"}, ""),
        ({}, ""),
    ],
)
def test_the_layer_names_the_hook_where_no_module_is_named(
    trainer: dict[str, Any], hook: str, tmp_path: Path
) -> None:
    save(tmp_path, "AutoEncoder")
    config = {"trainer": {"dict_class": "AutoEncoder", **trainer}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert formats.load(tmp_path, "dictionary_learning").origin.hook_name == hook


def test_it_must_be_named(tmp_path: Path) -> None:
    save(tmp_path, "AutoEncoder")
    with pytest.raises(SourceError, match="--format dictionary_learning"):
        formats.load(tmp_path)


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    save(tmp_path, "AutoEncoder")
    mark = tmp_path / "mark"
    torch.save({"bias": Payload(mark)}, tmp_path / "ae.pt")
    with pytest.raises(SourceError, match="only tensors are unpickled"):
        formats.load(tmp_path, "dictionary_learning")
    assert not mark.exists()
    torch.load(tmp_path / "ae.pt", weights_only=False)
    assert mark.exists()  # so the test would have seen it


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04"])
def test_damaged_files_are_told(content: bytes, tmp_path: Path) -> None:
    save(tmp_path, "AutoEncoder")
    (tmp_path / "ae.pt").write_bytes(content)
    with pytest.raises(SourceError, match=r"ae\.pt"):
        formats.load(tmp_path, "dictionary_learning")


def test_other_contents_are_told(tmp_path: Path) -> None:
    tensors = save(tmp_path, "AutoEncoderTopK")
    config = json.loads((tmp_path / "config.json").read_text())

    def changed(**fields: Any) -> None:
        trainer = config["trainer"] | fields
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))

    changed(dict_class="CrossCoder")
    with pytest.raises(SettingError, match="CrossCoder"):
        formats.load(tmp_path, "dictionary_learning")
    changed(k=4)
    with pytest.raises(SettingError, match=r"k.*= 4"):
        formats.load(tmp_path, "dictionary_learning")
    changed()
    torch.save([1], tmp_path / "ae.pt")
    with pytest.raises(SourceError, match="not a state dict"):
        formats.load(tmp_path, "dictionary_learning")
    torch.save(tensors | {"W_skip": torch.eye(D_IN)}, tmp_path / "ae.pt")
    with pytest.raises(SourceError, match="W_skip"):
        formats.load(tmp_path, "dictionary_learning")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="trainer"):
        formats.load(tmp_path, "dictionary_learning")
