"""Published SAEs by their own layout, each against its equation; `test_peers` has SAELens' word."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import published_saes as published
import pytest
import torch
from published_saes import BY_NAME, D_IN, D_SAE, LAYOUTS, Layout, Tensors
from saes import clear, rows, same
from test_dictionary_learning import Payload

from saelab import formats
from saelab.errors import MismatchError, SettingError, SourceError, UsageError
from saelab.formats import Loaded
from saelab.sae import SAE

NAMES = [layout.name for layout in LAYOUTS]
ENCODERS = ("W_enc", "W_enc_2", "encoder.weight", "encoder_linear.weight")
BIASES = ("b_enc", "b_enc_2", "encoder.bias", "encoder_linear.bias", "latent_bias")
PICKLES = [name for name in NAMES if formats.TABLE[BY_NAME[name].format].by_name]


def load(layout: Layout, root: Path) -> Loaded:
    named = layout.format if formats.TABLE[layout.format].by_name else ""
    return formats.load(layout.path(root), named)


def refuse(layout: Layout, root: Path, match: str) -> None:
    """The SAE is refused in one sentence that contains `match`, without the net of last resort."""
    with pytest.raises(UsageError, match=match) as error:
        load(layout, root)
    assert "is not a readable SAE" not in str(error.value)


def equal(sae: SAE, layout: Layout, tensors: Tensors, seed: int) -> None:
    """The SAE computes the layout's equation, along the dense path and the sparse one."""
    x = clear(sae, rows(seed) / 2)
    assert len(x) > 100
    f, x_hat = layout.function(x, tensors)
    assert 0 < float((f > 0).float().mean()) < 1
    same(sae.encode(x), f)
    same(sae.complete(sae.decode(f), x), x_hat)
    for part, code in sae.codes(x):
        same(code.dense(), f[part])
        same(sae.complete(sae.decode_code(code), x[part]), x_hat[part])


@pytest.mark.parametrize("name", NAMES)
def test_each_layout_is_its_equation(name: str, tmp_path: Path, global_random_seed: int) -> None:
    layout = BY_NAME[name]
    tensors = layout.make(tmp_path, global_random_seed)
    loaded = load(layout, tmp_path)
    assert (loaded.origin.model, loaded.origin.hook_name) == (layout.model, layout.hook)
    assert loaded.about["format"] == layout.format
    assert bool(loaded.origin.peculiarities) == (layout.targets > 1)
    equal(loaded.sae, layout, tensors, global_random_seed)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_written_for_saelens_and_read_again(name: str, tmp_path: Path) -> None:
    layout = BY_NAME[name]
    tensors = layout.make(tmp_path, 0)
    sae = load(layout, tmp_path).sae
    if layout.targets > 1:
        with pytest.raises(SettingError, match="no SAE of several hook points"):
            formats.saver("saelens")(sae, tmp_path / "out", {})
        return
    formats.saver("saelens")(sae, tmp_path / "out", {})
    equal(formats.load(tmp_path / "out").sae, layout, tensors, 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_tensor_is_refused(name: str, tmp_path: Path) -> None:
    BY_NAME[name].make(tmp_path, 0, W_skip=torch.eye(D_IN))
    refuse(BY_NAME[name], tmp_path, "unknown tensor 'W_skip'")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    layout = BY_NAME[name]
    for missing in layout.shapes:
        if missing == "latents_mean_square":  # a count of training
            continue
        left = {n: t for n, t in layout.draw(0).items() if n != missing}
        layout.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        layout.write(layout.path(tmp_path), left)
        gemma_2 = layout.format.startswith("gemma_scope_2")
        shown = missing.replace("W_", "w_") if gemma_2 else missing
        refuse(layout, tmp_path, f"lacks '{shown}'")


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_floats_are_refused(name: str, tmp_path: Path) -> None:
    layout = BY_NAME[name]
    encoder = next(n for n in ENCODERS if n in layout.shapes)
    tensors = layout.draw(0)
    layout.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
    layout.write(layout.path(tmp_path), tensors | {encoder: tensors[encoder].long()})
    refuse(layout, tmp_path, "dtype int64")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    layout = BY_NAME[name]
    bias = next(n for n in BIASES if n in layout.shapes)
    layout.make(tmp_path, 0, **{bias: torch.randn(D_SAE + 1)})
    refuse(layout, tmp_path, r"b_enc has the shape \[25\]")


# ---- pickles and arrays -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_must_be_named_and_runs_no_code(name: str, tmp_path: Path) -> None:
    layout, mark = BY_NAME[name], tmp_path / "mark"
    layout.make(tmp_path, 0)
    for path in (layout.path(tmp_path), layout.path(tmp_path).parent):
        with pytest.raises(SourceError, match=f"--format {layout.format}"):
            formats.load(path)
    tensors: Any = layout.draw(0) | {"activation": Payload(mark)}
    torch.save(tensors, layout.path(tmp_path))
    refuse(layout, tmp_path, "only tensors are unpickled")
    assert not mark.exists()
    torch.load(layout.path(tmp_path), weights_only=False)
    assert mark.exists()  # so the test would have seen it


@pytest.mark.parametrize("name", PICKLES)
def test_a_folder_with_one_file_is_read_and_one_with_several_is_not(
    name: str, tmp_path: Path
) -> None:
    layout = BY_NAME[name]
    tensors = layout.make(tmp_path, 0)
    file = layout.path(tmp_path)
    equal(formats.load(file.parent, layout.format).sae, layout, tensors, 0)
    other = file.with_name(file.name.replace("8", "9").replace("11", "12").replace("L2", "L3"))
    assert other != file
    other.write_bytes(file.read_bytes())
    with pytest.raises(SourceError, match=f"several SAEs .*{re.escape(file.name)}"):
        formats.load(file.parent, layout.format)
    with pytest.raises(SourceError, match="another name, or does not exist"):
        formats.load(file.with_name("model.bin"), layout.format)


def test_arrays_of_objects_run_no_code(tmp_path: Path) -> None:
    layout, mark = BY_NAME["gemma_scope"], tmp_path / "mark"
    arrays = {name: t.numpy() for name, t in layout.draw(0).items()}
    layout.path(tmp_path).mkdir(parents=True)
    file = layout.path(tmp_path) / "params.npz"
    np.savez(file, **arrays | {"W_enc": np.array([Payload(mark)], dtype=object)})
    refuse(layout, tmp_path, "only numbers are read")
    assert not mark.exists()
    with np.load(file, allow_pickle=True) as data:
        data["W_enc"]
    assert mark.exists()  # so the test would have seen it
    np.savez(file, **arrays | {"W_enc": np.array(["a", "b"])})
    refuse(layout, tmp_path, "only numbers are read")


def test_damaged_and_swollen_archives_are_refused(tmp_path: Path) -> None:
    layout = BY_NAME["gemma_scope"]
    layout.make(tmp_path, 0)
    file = layout.path(tmp_path) / "params.npz"
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.npy", b"\0" * 10**7)
    refuse(layout, tmp_path, "unpacks to")
    layout.make(tmp_path, 0)
    with zipfile.ZipFile(file, "a") as archive:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
        with archive.open("vast.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(8))
    refuse(layout, tmp_path, "vast of shape .* has 8 bytes")
    for content in (b"", b"no archive", b"PK\x03\x04"):
        file.write_bytes(content)
        refuse(layout, tmp_path, "can't be read")


# ---- other architectures, by name ---------------------------------------------------------------


def test_gemma_scope_asks_the_path_for_what_the_file_does_not_say(tmp_path: Path) -> None:
    layout = BY_NAME["gemma_scope"]
    tensors = layout.draw(0)
    hub = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "0a1b"
    layout.write(hub / layout.inner, tensors)
    loaded = formats.load(hub / layout.inner)
    assert (loaded.origin.model, loaded.origin.hook_name) == (layout.model, layout.hook)
    layout.write(tmp_path / "mine", tensors)
    with pytest.raises(SourceError, match="only the path says"):
        formats.load(tmp_path / "mine")


def test_a_scaling_factor_that_is_used_is_refused(tmp_path: Path) -> None:
    layout = BY_NAME["gemma_scope"]
    tensors = layout.make(tmp_path, 0, scaling_factor=torch.ones(D_SAE))
    equal(load(layout, tmp_path).sae, layout, tensors, 0)
    layout.make(tmp_path, 0, scaling_factor=torch.full((D_SAE,), 1.5))
    refuse(layout, tmp_path, "scaling_factor")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"architecture": "topk"}, "architecture = 'topk'"),
        ({"type": "transcoder"}, "type = 'transcoder'"),
        ({"affine_connection": True}, "affine_connection"),
        ({"hf_hook_point_out": "model.layers.4.mlp.output"}, "hf_hook_point_out"),
        ({"width": D_SAE + 1}, "width"),
    ],
)
def test_gemma_scope_2_refuses(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    layout = BY_NAME["gemma_scope_2"]
    layout.make(tmp_path, 0)
    config = published.gemma_3_config(**fields)
    (layout.path(tmp_path) / "config.json").write_text(json.dumps(config))
    refuse(layout, tmp_path, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"type": "sae"}, "type = 'sae'"),
        ({"type": "crosscoder"}, "type = 'crosscoder'"),
        ({"hf_hook_point_out": None}, "hf_hook_point_out"),
        ({"affine_connection": True}, "lacks 'affine_skip_connection'"),
        ({"architecture": "topk"}, "architecture = 'topk'"),
        ({"width": D_SAE + 1}, "width"),
    ],
)
def test_a_transcoder_of_gemma_scope_2_is_refused(
    fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    layout = BY_NAME["gemma_scope_2-transcoder"]
    layout.make(tmp_path, 0)
    config = published.gemma_3_transcoder(4) | fields
    (layout.path(tmp_path) / "config.json").write_text(json.dumps(config))
    refuse(layout, tmp_path, match)


def test_a_skip_connection_that_config_json_does_not_name_is_refused(tmp_path: Path) -> None:
    layout = BY_NAME["gemma_scope_2-affine"]
    layout.make(tmp_path, 0)
    config = published.gemma_3_transcoder(4, affine_connection=False)
    (layout.path(tmp_path) / "config.json").write_text(json.dumps(config))
    refuse(layout, tmp_path, "unknown tensor 'affine_skip_connection'")


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_gemma_scope_2_refuses_other_kinds_by_their_folder(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2-270m-pt" / kind / "layer_5_width_16k_l0_big"
    published.write_gemma_2(None)(folder, BY_NAME["gemma_scope_2"].draw(0))
    with pytest.raises(SettingError, match=kind):
        formats.load(folder)


def test_files_of_layers_that_are_no_cross_layer_transcoder_are_refused(tmp_path: Path) -> None:
    layout = BY_NAME["gemma_scope_2_clt"]
    tensors = layout.make(tmp_path, 0)
    (where := layout.path(tmp_path).with_name("config.json")).write_text('{"type": "crosscoder"}')
    refuse(layout, tmp_path, "type = 'crosscoder'")
    where.write_text('{"type": "clt", "architecture": "topk"}')
    refuse(layout, tmp_path, "architecture = 'topk'")
    where.unlink()
    names = {name.lower(): t for name, t in tensors.items()}
    published.safetensors(layout.path(tmp_path), names)
    refuse(layout, tmp_path, "writes to layers before 2")
    published.safetensors(layout.path(tmp_path), names | {"w_dec": names["w_dec"][:, 0]})
    refuse(layout, tmp_path, r"W_dec has the shape \[24, 5\], not \[d_sae, targets, d_out\]")
    moved = tmp_path / "mine" / "params_layer_2.safetensors"
    layout.write(moved, tensors)
    with pytest.raises(SettingError, match="keep its repository's names"):
        formats.load(moved)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"act_fn": "topk"}, "act_fn = 'topk'"),
        ({"norm_activation": "token-wise"}, "norm_activation = 'token-wise'"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"sae_type": "lorsa"}, "sae_type = 'lorsa'"),
        ({"hook_point_out": "blocks.7.hook_mlp_out"}, "hook_point_out"),
        ({"dataset_average_activation_norm": {}}, "dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 0.0}}, "dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 2, "out": 3}}, "input and output"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold"),
        ({"d_model": D_IN + 1}, "d_model"),
        ({"d_sae": D_SAE + 1}, "d_sae"),
    ],
)
def test_llama_scope_refuses(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    layout = BY_NAME["llama_scope"]
    layout.make(tmp_path, 0)
    config = published.llama_config(**fields)
    (layout.path(tmp_path) / "hyperparams.json").write_text(json.dumps(config))
    refuse(layout, tmp_path, match)


def test_llama_scope_refuses_decoder_norms_on_which_its_tools_differ(tmp_path: Path) -> None:
    layout = BY_NAME["llama_scope"]
    decoder = layout.draw(0)["decoder.weight"] * 1.1
    tensors = layout.make(tmp_path, 0, **{"decoder.weight": decoder})
    refuse(layout, tmp_path, "sparsity_include_decoder_norm")
    config = published.llama_config(sparsity_include_decoder_norm=False)
    (layout.path(tmp_path) / "hyperparams.json").write_text(json.dumps(config))
    equal(load(layout, tmp_path).sae, layout, tensors, 0)


def test_llama_scope_without_a_decoder_bias_centred_or_folded(tmp_path: Path) -> None:
    layout = BY_NAME["llama_scope"]
    tensors = {name: t.float() for name, t in layout.make(tmp_path, 0).items()}
    where = layout.path(tmp_path) / "hyperparams.json"
    x = rows(0)
    where.write_text(json.dumps(published.llama_config(norm_activation="inference")))
    sae = load(layout, tmp_path).sae
    z, decode = published.linear(clear(sae, x), tensors)
    f = published.jump(z, published.JUMP)
    same(sae.encode(clear(sae, x)), f)
    same(sae.decode(f), decode(f))
    where.write_text(json.dumps(published.llama_config(apply_decoder_bias_to_pre_encoder=True)))
    sae, s = load(layout, tmp_path).sae, published.FACTOR
    z, _ = published.linear(s * clear(sae, x) - tensors["decoder.bias"], tensors)
    same(sae.encode(clear(sae, x)), published.jump(z, s * published.JUMP))
    del tensors["decoder.bias"]
    layout.write(layout.path(tmp_path), tensors)
    where.write_text(json.dumps(published.llama_config(use_decoder_bias=False)))
    sae = load(layout, tmp_path).sae
    assert not bool(sae.b_dec.any())
    equal(sae, layout, tensors | {"decoder.bias": torch.zeros(D_IN)}, 0)


def test_the_newer_layout_of_openmoss_is_refused_by_name(tmp_path: Path) -> None:
    layout = BY_NAME["llama_scope_r1"]
    layout.write(layout.path(tmp_path), {"W_E": torch.randn(D_IN, D_SAE), "b_E": torch.ones(D_SAE)})
    refuse(layout, tmp_path, "W_E, b_E.*newer layout of OpenMOSS")


def test_qwen_scope_asks_the_path_for_k(tmp_path: Path) -> None:
    layout = BY_NAME["qwen_scope"]
    tensors = layout.draw(0)
    layout.write(tmp_path / "layer11.sae.pt", tensors)
    with pytest.raises(SourceError, match="k is only in the name of the repository"):
        formats.load(tmp_path / "layer11.sae.pt", "qwen_scope")
    other = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W2K-L0_50"
    other.mkdir()
    layout.write(other / "layer11.sae.pt", tensors)
    with pytest.raises(SettingError, match="W2K"):
        formats.load(other, "qwen_scope")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"activation": "Identity"}, "activation = 'Identity'"),
        ({"activation": "TopK", "activation_state_dict": {}}, r"activation_state_dict\.k"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}},
            "postact_fn = 'Identity'",
        ),
        ({**published.TOPK, "activation.k": 4}, r"activation\.k = 4"),
    ],
)
def test_openai_refuses(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    published.write_openai(settings)(tmp_path / "8.pt", BY_NAME["openai"].draw(0))
    with pytest.raises(SettingError, match=match):
        formats.load(tmp_path, "openai")


def test_openai_without_settings_is_relu_at_an_unknown_place(tmp_path: Path) -> None:
    tensors = BY_NAME["openai"].draw(0)
    published.write_openai({})(tmp_path / "8.pt", tensors)
    loaded = formats.load(tmp_path, "openai")
    assert loaded.origin.hook_name == ""
    equal(loaded.sae, BY_NAME["openai"], tensors, 0)


def test_hook_z_compares_its_configuration(tmp_path: Path) -> None:
    layout = BY_NAME["hook_z"]
    layout.make(tmp_path, 0)
    (where,) = layout.path(tmp_path).parent.glob("*_cfg.json")
    config = json.loads(where.read_text())
    for field, value in (("act_size", 7), ("dict_size", 7), ("act_name", "blocks.2.hook_mlp_out")):
        where.write_text(json.dumps(config | {field: value}))
        refuse(layout, tmp_path, field)
    where.unlink()
    refuse(layout, tmp_path, "_cfg.json does not exist")


@pytest.mark.parametrize("name", ["layer_transcoder", "cross_layer_transcoder"])
def test_one_layer_is_read_from_a_folder_and_one_of_several_is_named(
    name: str, tmp_path: Path
) -> None:
    layout = BY_NAME[name]
    tensors = layout.make(tmp_path, 0)
    file = layout.path(tmp_path)
    equal(formats.load(file.parent).sae, layout, tensors, 0)
    other = file.with_name(file.name.replace("7", "8").replace("2", "3"))
    other.write_bytes(file.read_bytes())
    with pytest.raises(SourceError, match=f"several SAEs .*{re.escape(file.name)}"):
        formats.load(file.parent)


def test_a_layer_is_read_by_the_file_of_its_decoder_too(tmp_path: Path) -> None:
    layout = BY_NAME["cross_layer_transcoder"]
    tensors = layout.make(tmp_path, 0)
    decoder = layout.path(tmp_path).with_name("W_dec_2.safetensors")
    equal(formats.load(decoder).sae, layout, tensors, 0)
    published.safetensors(decoder, {"W_dec_2": tensors["W_dec_2"][:, 0]})
    refuse(layout, tmp_path, r"W_dec has the shape \[24, 5\], not \[d_sae, targets, d_out\]")
    decoder.unlink()
    refuse(layout, tmp_path, "W_dec_2.safetensors does not exist")


def test_one_layer_of_a_cross_layer_transcoder_is_not_evaluated_unasked(tmp_path: Path) -> None:
    layout = BY_NAME["cross_layer_transcoder"]
    layout.make(tmp_path, 0)
    origin = load(layout, tmp_path).origin
    with pytest.raises(MismatchError, match="outputs are parts of sums over layers"):
        origin.check(layout.model, layout.hook)


def test_a_transcoder_of_another_activation_is_refused(tmp_path: Path) -> None:
    layout = BY_NAME["layer_transcoder"]
    tensors = layout.draw(0)
    published.write_per_layer("activation: topk\n")(layout.path(tmp_path), tensors)
    refuse(layout, tmp_path, "activation = 'topk'")
    layout.path(tmp_path).with_name("config.yaml").write_bytes(b"\xff\xfe")
    refuse(layout, tmp_path, "config.yaml is not text")


@pytest.mark.parametrize("name", ["qwen_scope", "gemma_scope"])
def test_files_in_the_cache_of_the_hub_are_links(name: str, tmp_path: Path) -> None:
    layout = BY_NAME[name]
    tensors = layout.make(tmp_path / "download", 0)
    repo = tmp_path / f"models--{layout.repo.replace('/', '--')}"
    inner = layout.path(Path()).relative_to(layout.repo)
    for file in (tmp_path / "download").rglob("*.*"):
        if not file.is_file():
            continue
        link = repo / "snapshots" / "0a1b" / file.relative_to(tmp_path / "download" / layout.repo)
        link.parent.mkdir(parents=True)
        blob = repo / "blobs" / "c0ffee"
        blob.parent.mkdir()
        file.rename(blob)
        link.symlink_to(blob)
    named = layout.format if formats.TABLE[layout.format].by_name else ""
    loaded = formats.load(repo / "snapshots" / "0a1b" / inner, named)
    assert (loaded.origin.model, loaded.origin.hook_name) == (layout.model, layout.hook)
    equal(loaded.sae, layout, tensors, 0)


def test_temporal_saes_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "conf.yaml").write_text("sae: {}")
    (tmp_path / "latest_ckpt.safetensors").write_bytes(b"")
    with pytest.raises(SettingError, match="temporal"):
        formats.load(tmp_path)
