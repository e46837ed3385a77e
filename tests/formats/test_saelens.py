"""SAELens directories: each part that folds comes back, each field is honoured or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from saes import (
    D_IN,
    D_SAE,
    clear,
    random_weights,
    rows,
    same,
    same_function,
    trained,
    trained_sae,
    write,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab import checkpoint, formats
from saelab.analysis.export import about, without_context
from saelab.checks.examples import Case, cases
from saelab.errors import SettingError, SourceError, UsageError
from saelab.formats.saelens_fields import RULES
from saelab.parts.activations.relu import ReLU
from saelab.parts.base import Activation, Dims, Refusal

ABOUT = {"model": "m/pythia", "hook_name": "blocks.3.hook_resid_post", "context": 128, "seed": 7}
WEIGHTS = "sae_weights.safetensors"
LINEAR = ("W_enc", "b_enc", "W_dec", "b_dec")

# ---- ours, written and read again ---------------------------------------------------------------


def exported(sae: Any, folder: Path) -> Any:
    formats.saver("saelens")(sae, folder, ABOUT)
    return formats.load(folder).sae


@pytest.mark.parametrize("scaling", [None, *cases(D_SAE, "scaling", first=True)], ids=str)
@pytest.mark.parametrize("case", cases(D_SAE, "activation"), ids=str)
def test_every_part_comes_back(
    case: Case, scaling: Case | None, tmp_path: Path, global_random_seed: int
) -> None:
    config = case.settings(D_SAE, scaling=scaling and scaling.part)
    if scaling and config.activation.build(Dims(D_IN, D_SAE)).uses_weights:
        with pytest.raises(SettingError, match="subtracts decoder rows"):
            config.build(D_IN)
        return
    sae = trained_sae(config, global_random_seed)
    form = sae.activation.export()
    if isinstance(form, Refusal):
        with pytest.raises(SettingError, match=re.escape(form.reason)):
            exported(sae, tmp_path)
        return
    unit = 1.0 if form.pursuit is None else float(sae.scale)
    same_function(exported(sae, tmp_path), sae, rows(global_random_seed + 1), unit)


@pytest.mark.parametrize(
    "config",
    [
        {"centre": False},
        {"encoder_bias": False},
        {"tied": True},
        {"activation": "jumprelu", "centre": False, "scaling": "whitening"},
        {"scaling": {"kind": "variance", "tying": "per_feature", "beta": 1.7, "theta": 0.3}},
        {"scaling": {"kind": "variance", "literal": True, "temperature": "learned"}},
        {
            "activation": {"kind": "topk", "k": "k"},
            "controllers": [{"kind": "annealed_k", "end": 4}],
        },
    ],
    ids=lambda config: ",".join(config),
)
def test_every_setting_comes_back(
    config: dict[str, Any], tmp_path: Path, global_random_seed: int
) -> None:
    sae = trained(global_random_seed, **config)
    same_function(exported(sae, tmp_path), sae, rows(global_random_seed + 1))


def test_an_sae_from_outside_can_be_written_again(tmp_path: Path, global_random_seed: int) -> None:
    names = (*LINEAR, "threshold")
    cfg = config("jumprelu", metadata={"context_size": 64, "dataset_path": "pile"})
    write(tmp_path / "a", cfg, WEIGHTS, random_weights(global_random_seed, *names))
    found = formats.load(tmp_path / "a")
    formats.saver("saelens")(found.sae, tmp_path / "b", about(found, tmp_path / "a"))
    same_function(formats.load(tmp_path / "b").sae, found.sae, rows(global_random_seed))
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    wanted = {"model_name": "gpt2", "context_size": 64, "dataset_path": "pile"}
    assert wanted.items() <= metadata.items()


@pytest.mark.parametrize("name", ["prepend_bos", "seqpos_slice", "revision"])
def test_what_sets_an_sae_apart_is_written_again(name: str, tmp_path: Path) -> None:
    kwargs = {"model_from_pretrained_kwargs": {"revision": "step1000"}}
    apart = {"prepend_bos": {name: False}, "seqpos_slice": {name: [5, None]}, "revision": kwargs}
    write(
        tmp_path / "a",
        config("standard", metadata=apart[name]),
        WEIGHTS,
        random_weights(0, *LINEAR),
    )
    found = formats.load(tmp_path / "a")
    formats.saver("saelens")(found.sae, tmp_path / "b", about(found, tmp_path / "a"))
    assert len(found.origin.peculiarities) == 1
    assert formats.load(tmp_path / "b").origin == found.origin
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert apart[name].items() <= metadata.items()


@pytest.mark.parametrize("about", [{}, {"model": "gpt2", "format": "sparsify"}])
def test_nothing_is_claimed_of_a_training_that_is_not_known(
    about: dict[str, Any], tmp_path: Path
) -> None:
    formats.saver("saelens")(trained(), tmp_path, about)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert metadata["prepend_bos"] is None and metadata["model_from_pretrained_kwargs"] == {}
    assert formats.load(tmp_path).origin.peculiarities == ()


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    sae = trained()
    with torch.no_grad():
        sae.W_dec[0, 0] = float("nan")
    with pytest.raises(SourceError, match="not finite"):
        exported(sae, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Halved(ReLU):
    """An activation that says nothing of its form."""

    export = Activation.export


def test_an_activation_without_export_is_refused(tmp_path: Path) -> None:
    sae = trained()
    sae.activation = Halved().eval()
    with pytest.raises(SettingError, match=r"Halved.*no export"):
        exported(sae, tmp_path)


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    sae = trained(scaling={"kind": "variance", "statistics": "batch"})
    with pytest.raises(SettingError, match="batch statistics"):
        exported(sae, tmp_path)


def test_an_adapting_threshold_is_refused_unless_without_its_trace(
    tmp_path: Path, global_random_seed: int
) -> None:
    adapting = {"kind": "tied_threshold", "beta": 0.5, "learned": ("theta", "beta")}
    sae = trained(global_random_seed, activation=adapting, constraints=["unit_norm"])
    with pytest.raises(SettingError, match="follows the context"):
        exported(sae, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    x, quiet = rows(global_random_seed + 1), without_context(sae)
    same_function(exported(quiet, tmp_path / "b"), quiet, x)
    each_alone = sae.encode(x, torch.arange(len(x) + 1))  # no row has a past: the trace is 0
    same(quiet.encode(x), each_alone)
    assert not torch.equal(sae.encode(x, torch.tensor([0, len(x)])), each_alone)


def test_what_is_written(tmp_path: Path) -> None:
    formats.saver("saelens")(trained(activation="jumprelu"), tmp_path, ABOUT)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu" and config["apply_b_dec_to_input"] is True
    metadata = config["metadata"]
    assert metadata["model_name"] == "m/pythia" and metadata["prepend_bos"] is True
    assert metadata["hook_name"] == "blocks.3.hook_resid_post" and metadata["hook_layer"] == 3
    assert metadata["context_size"] == 128 and metadata["saelab"] == {"seed": 7}
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items()}
    assert shapes == {
        "W_enc": [D_IN, D_SAE],
        "W_dec": [D_SAE, D_IN],
        "b_enc": [D_SAE],
        "b_dec": [D_IN],
        "threshold": [D_SAE],
    }


def test_batchtopk_is_written_as_jumprelu_with_its_threshold(tmp_path: Path) -> None:
    sae = trained(activation={"kind": "batchtopk", "k": 4})
    formats.saver("saelens")(sae, tmp_path, {})
    threshold = load_file(tmp_path / WEIGHTS)["threshold"]
    assert torch.equal(threshold, sae.activation.floor().expand(D_SAE))
    assert float(threshold[0]) > 0


# ---- directories in the documented layout -------------------------------------------------------


def config(architecture: str, **fields: Any) -> dict[str, Any]:
    """As SAELens 6 writes it."""
    metadata = {"sae_lens_version": "6.54.0", "model_name": "gpt2", "prepend_bos": True}
    return {
        **{"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"},
        **{"device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none"},
        **{"reshape_activations": "none", "metadata": metadata | fields.pop("metadata", {})},
        **fields,
    }


def relu(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])


def topk(x: Tensor, t: dict[str, Tensor], k: int = 3) -> Tensor:
    z = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    kept = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values.relu())


def abstopk(x: Tensor, t: dict[str, Tensor], k: int = 3) -> Tensor:
    z = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    latents = z.abs().topk(k, dim=1).indices
    return torch.zeros_like(z).scatter(1, latents, z.gather(1, latents))


def jumprelu(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    z = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    return z.relu() * (z > t["threshold"])


def gated(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    y = (x - t["b_dec"]) @ t["W_enc"]
    magnitude = torch.relu((x - t["b_dec"]) @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    return (y + t["b_gate"] > 0) * magnitude


def decoded(f: Tensor, t: dict[str, Tensor]) -> Tensor:
    return f @ t["W_dec"] + t["b_dec"]


GATED = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], Any]] = {
    "standard": (config("standard"), LINEAR, relu),
    "topk": (config("topk", k=3), LINEAR, topk),
    "abstopk": (config("abstopk", k=3), LINEAR, abstopk),
    "jumprelu": (config("jumprelu"), (*LINEAR, "threshold"), jumprelu),
    "gated": (config("gated"), GATED, gated),
}


def check(folder: Path, tensors: dict[str, Tensor], encode: Any, seed: int) -> None:
    """The directory's SAE against the reference, where no rounding switches a latent."""
    sae = formats.load(folder).sae
    x = clear(sae, rows(seed))
    assert len(x) > 100
    f = encode(x, tensors)
    assert 0 < float((f != 0).float().mean()) < 1
    same(sae.encode(x), f)
    same(sae.decode(f), decoded(f, tensors))


@pytest.mark.parametrize("name", list(CASES))
def test_each_architecture_is_read(name: str, tmp_path: Path, global_random_seed: int) -> None:
    cfg, names, encode = CASES[name]
    tensors = random_weights(global_random_seed, *names)
    write(tmp_path, cfg, WEIGHTS, tensors)
    check(tmp_path, tensors, encode, global_random_seed)


OLD = {"sae_lens_version": "3.9.0", "d_in": D_IN, "d_sae": D_SAE, "normalize_activations": "none"}


@pytest.mark.parametrize(
    "fields",
    [
        OLD | {"architecture": "standard", "activation_fn_str": "topk", "k": 3},
        OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        OLD | {"architecture": "topk", "activation_fn_kwargs": {"k": 3}},
        config("standard", activation_fn="topk", activation_fn_kwargs={"k": 3}),
        config("standard", activation_fn="topk", k=3),
        config("topk", activation_fn="relu", k=3, activation_fn_kwargs={"k": 3}),
    ],
)
def test_topk_is_read_however_it_is_said(
    tmp_path: Path, fields: dict[str, Any], global_random_seed: int
) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    write(tmp_path, fields, WEIGHTS, tensors)
    check(tmp_path, tensors, topk, global_random_seed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (OLD | {"activation_fn_str": "topk"}, "k = None: use a whole number"),
        (config("standard", activation_fn="topk"), "k = None: use a whole number"),
        (config("standard", k=3), "k = 3: belongs to a topk SAE"),
        (config("standard", activation_fn_kwargs={"k": 3}), "k = 3: belongs to a topk SAE"),
        (config("topk", k=3, activation_fn_kwargs={"k": 4}), "kwargs.k = 4: k is 3"),
        (config("jumprelu", activation_fn="topk", k=3), "does not fit architecture 'jumprelu'"),
        (config("topk", k=True), "k = True: use a whole number"),
        (config("topk", k=3.0), "k = 3.0: use a whole number"),
        (config("topk", k=D_SAE + 1), f"k = {D_SAE + 1}, but there are {D_SAE} latents"),
        (config("standard", apply_b_dec_to_input="false"), "'false': use true or false"),
        (config("topk", k=3, rescale_acts_by_decoder_norm=1), "= 1: use true or false"),
    ],
)
def test_contradictions_about_the_function_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    names = (*LINEAR, "threshold") if fields.get("architecture") == "jumprelu" else LINEAR
    write(tmp_path, fields, WEIGHTS, random_weights(0, *names))
    with pytest.raises(UsageError, match=message):
        formats.load(tmp_path)


@pytest.mark.parametrize("factor", [0, 0.0, -1.0, "2", True, None, 1e-39, 1e39, 10**400])
def test_factors_that_can_not_be_divided_by_are_refused(tmp_path: Path, factor: Any) -> None:
    """The weights are looked at once more after they are folded."""
    fields = config("standard", normalize_activations="expected_average_only_in")
    write(tmp_path, fields, WEIGHTS, random_weights(0, *LINEAR))
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(UsageError, match="not a positive|not finite|is not in|too large|not read"):
        formats.load(tmp_path)


def test_a_whitening_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    fields = config("standard", normalize_activations="covariance_whitening")
    write(tmp_path, fields, WEIGHTS, random_weights(0, *LINEAR))
    whitening = {"mean": torch.zeros(D_IN), "matrix": torch.eye(D_IN)}
    whitening["inverse_matrix"] = torch.full((D_IN, D_IN), torch.inf)
    save_file(whitening, tmp_path / "activation_whitening.safetensors")
    with pytest.raises(SourceError, match="holds a value that is not finite"):
        formats.load(tmp_path)


def test_our_own_folder_with_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    sae = trained(0)
    with torch.no_grad():
        sae.W_dec[3, 1] = torch.nan
    checkpoint.save(sae, tmp_path, {})
    with pytest.raises(SourceError, match="W_dec holds a value that is not finite: train it again"):
        formats.load(tmp_path)


def test_input_is_not_centred_where_it_says_so(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    write(tmp_path, config("standard", apply_b_dec_to_input=False), WEIGHTS, tensors)

    def encode(x: Tensor, t: dict[str, Tensor]) -> Tensor:
        return torch.relu(x @ t["W_enc"] + t["b_enc"])

    check(tmp_path, tensors, encode, global_random_seed)


def test_decoder_norms_are_folded(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    write(tmp_path, config("topk", k=3, rescale_acts_by_decoder_norm=True), WEIGHTS, tensors)
    norms = tensors["W_dec"].norm(dim=1)
    unit = tensors | {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms}
    unit["W_dec"] = tensors["W_dec"] / norms[:, None]
    check(tmp_path, unit, topk, global_random_seed)


def test_a_batchtopk_checkpoint_has_one_threshold(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    stored = tensors | {"topk_threshold": torch.tensor(1.5, dtype=torch.float64)}
    write(tmp_path, config("batchtopk", k=3.5, topk_threshold_lr=0.01), WEIGHTS, stored)
    tensors |= {"threshold": torch.full((D_SAE,), 1.5)}
    check(tmp_path, tensors, jumprelu, global_random_seed)


def test_old_logarithms_of_thresholds(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR, "log_threshold")
    write(tmp_path, config("jumprelu"), WEIGHTS, tensors)
    tensors["threshold"] = tensors["log_threshold"].exp()
    check(tmp_path, tensors, jumprelu, global_random_seed)


def test_a_negative_threshold_is_relu(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR, "threshold")
    tensors["threshold"] = -tensors["threshold"].abs()
    write(tmp_path, config("jumprelu"), WEIGHTS, tensors)
    check(tmp_path, tensors, relu, global_random_seed)


def test_the_scale_of_activations_is_folded(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    cfg = config("standard", normalize_activations="expected_average_only_in")
    write(tmp_path, cfg, WEIGHTS, tensors)
    with pytest.raises(SettingError, match=r"expected_average_only_in.*activation_scaler"):
        formats.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.3}')
    x, sae = rows(global_random_seed), formats.load(tmp_path).sae
    f = relu(0.3 * x, tensors)
    same(sae.encode(x), f)
    same(sae.decode(f), decoded(f, tensors) / 0.3)


@pytest.mark.parametrize("centre", [True, False])
def test_whitening_is_folded(centre: bool, tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    x = rows(global_random_seed)
    mean, matrix = x.mean(0), torch.linalg.qr(random_weights(9, *LINEAR)["W_enc"][:, :D_IN])[0]
    matrix = matrix * torch.linspace(0.5, 2, D_IN)
    inverse = torch.linalg.inv(matrix.double()).float()
    cfg = config("standard", normalize_activations="covariance_whitening")
    write(tmp_path, cfg | {"apply_b_dec_to_input": centre}, WEIGHTS, tensors)
    with pytest.raises(SettingError, match="activation_whitening"):
        formats.load(tmp_path)
    stored = {"mean": mean, "matrix": matrix.contiguous(), "inverse_matrix": inverse.contiguous()}
    save_file(stored, tmp_path / "activation_whitening.safetensors")
    white = (x - mean) @ matrix + (0 if centre else tensors["b_dec"])
    f = relu(white, tensors)
    sae = formats.load(tmp_path).sae
    same(sae.encode(x), f)
    same(sae.decode(f), decoded(f, tensors) @ inverse + mean)


def test_weights_are_rounded_to_the_named_dtype(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    write(tmp_path, config("standard", dtype="bfloat16"), WEIGHTS, tensors)
    rounded = {name: t.bfloat16().float() for name, t in tensors.items()}
    assert not torch.equal(rounded["W_enc"], tensors["W_enc"])
    check(tmp_path, rounded, relu, global_random_seed)


def old(**fields: Any) -> dict[str, Any]:
    """As SAELens before 6.0 wrote it: one flat dictionary with the whole training run."""
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "lr": 4e-4, "wandb_id": "x"}
    return {**sizes, "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small", **fields}


def test_old_directories(tmp_path: Path, global_random_seed: int) -> None:
    tensors = random_weights(global_random_seed, *LINEAR)
    ones = tensors | {"scaling_factor": torch.ones(D_SAE)}
    write(tmp_path / "relu", old(normalize_activations=False), WEIGHTS, ones)
    check(tmp_path / "relu", tensors, relu, global_random_seed)
    assert formats.load(tmp_path / "relu").origin.hook_name == "blocks.8.hook_resid_pre"
    kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    write(tmp_path / "topk", old(**kwargs), WEIGHTS, tensors)
    check(tmp_path / "topk", tensors, topk, global_random_seed)


# ---- every field --------------------------------------------------------------------------------

#: Field -> values with which an SAE is refused.
REFUSED: dict[str, list[Any]] = {
    "architecture": ["temporal"],
    "normalize_activations": ["sphere"],
    "reshape_activations": ["hook_z"],
    "activation_fn": ["tanh-relu"],
    "activation_fn_kwargs": [{"power": 2}],
    "finetuning_scaling_factor": [True],
    "use_error_term": [True],
    "d_out": [8],
    "d_in": [D_IN + 1],
    "d_sae": [D_SAE - 1],
    "dtype": ["int8"],
    "k": [0, "many", None],
    "model_from_pretrained_kwargs": [[1], {"center_writing_weights": True}, {"hf_model": "other"}],
    "hook_name_out": ["blocks.3.hook_mlp_out"],
    "hook_layer_out": [3],
    "hook_head_index_out": [0],
    "hf_hook_name_out": ["model.layers.3.mlp"],
    "hook_head_index": [0, 2],
}
#: Metadata that is told as a difference from the data, not refused: value, and a word of it.
DIFFERENCES: dict[str, tuple[Any, str]] = {
    "model_name": ("gpt2-xl", "gpt2-xl"),
    "hook_name": ("blocks.5.hook_resid_post", "blocks.5"),
    "prepend_bos": (False, "BOS"),
    "seqpos_slice": ([5, None], "positions"),
}
#: Honoured and tested above.
HONOURED = {"apply_b_dec_to_input", "rescale_acts_by_decoder_norm"}
#: Fields of a matching pursuit alone -> values with which one is refused.
OF_PURSUITS: dict[str, list[Any]] = {
    "max_iterations": [0, 2.5],
    "residual_threshold": [-1.0, "small"],
    "stop_on_duplicate_support": ["yes"],
    "normalize_activations": ["expected_average_only_in", "covariance_whitening"],
}


def test_the_table_and_these_tests_name_the_same_fields() -> None:
    tested = set(REFUSED) | set(DIFFERENCES) | HONOURED | set(OF_PURSUITS)
    assert {name for name, rule in RULES.items() if rule.kind != "nothing"} == tested


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in REFUSED for v in REFUSED[n]])
def test_a_field_that_cannot_be_honoured_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    fields = {"metadata": {name: value}} if "hook" in name or "model" in name else {name: value}
    architecture = value if name == "architecture" else "topk"
    fields.pop("architecture", None)
    cfg = config(architecture, **({"k": 3} | fields))
    write(tmp_path, cfg, WEIGHTS, random_weights(0, *LINEAR))
    with pytest.raises(SettingError) as told:
        formats.load(tmp_path)
    inner = next(iter(value)) if isinstance(value, dict) else name
    assert inner in told.value.setting and len(told.value.remedy) > 10


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in OF_PURSUITS for v in OF_PURSUITS[n]])
def test_a_field_of_a_pursuit_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    tensors = random_weights(0, "W_dec", "b_dec")
    write(tmp_path, config("matching_pursuit", **{name: value}), WEIGHTS, tensors)
    with pytest.raises(SettingError) as refused:
        formats.load(tmp_path)
    assert name in refused.value.setting and len(refused.value.remedy) > 10


@pytest.mark.parametrize("name", list(DIFFERENCES))
def test_another_place_is_told(name: str, tmp_path: Path) -> None:
    value, word = DIFFERENCES[name]
    tensors = random_weights(0, *LINEAR)
    write(tmp_path, config("standard", metadata={name: value}), WEIGHTS, tensors)
    differences = formats.load(tmp_path).origin.differences("hub/gpt2", "blocks.2.hook_resid_post")
    assert len(differences) == 1 and word in differences[0]


def test_what_changes_nothing_is_read(tmp_path: Path) -> None:
    nothing = {name: 7 for name, rule in RULES.items() if rule.kind == "nothing"}
    nothing |= {"sae_lens_version": "6.54.0", "device": "cuda"}
    harmless = {"fold_ln": True, "center_writing_weights": False, "torch_dtype": "bfloat16"}
    metadata = {"model_from_pretrained_kwargs": harmless, "made_up": 1, "hook_head_index": None}
    tensors = random_weights(0, *LINEAR)
    write(tmp_path, config("standard", metadata=metadata, **nothing), WEIGHTS, tensors)
    assert formats.load(tmp_path).origin.differences("gpt2", "blocks.2.hook_resid_post") == []


def test_old_directories_may_be_of_a_processed_model(tmp_path: Path) -> None:
    place = ("gpt2-small", "blocks.8.hook_resid_pre")
    write(tmp_path / "a", old(), WEIGHTS, random_weights(0, *LINEAR))
    (told,) = formats.load(tmp_path / "a").origin.differences(*place)
    assert "mean subtracted" in told
    found = formats.load(tmp_path / "a")
    formats.saver("saelens")(found.sae, tmp_path / "again", about(found, tmp_path / "a"))
    assert formats.load(tmp_path / "again").origin == found.origin
    cfg = old(model_from_pretrained_kwargs={"center_writing_weights": False})
    write(tmp_path / "b", cfg, WEIGHTS, random_weights(0, *LINEAR))
    assert formats.load(tmp_path / "b").origin.differences(*place) == []


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    write(tmp_path, config("standard", squash=True), WEIGHTS, random_weights(0, *LINEAR))
    with pytest.raises(SettingError, match="squash"):
        formats.load(tmp_path)


def test_a_scaling_factor_of_old_is_refused(tmp_path: Path) -> None:
    tensors = random_weights(0, *LINEAR) | {"scaling_factor": torch.full((D_SAE,), 2.0)}
    write(tmp_path, old(), WEIGHTS, tensors)
    with pytest.raises(SettingError, match="scaling_factor"):
        formats.load(tmp_path)


def test_heads_of_old_directories_are_refused(tmp_path: Path) -> None:
    cfg = old(hook_point="blocks.3.attn.hook_z")
    write(tmp_path, cfg, WEIGHTS, random_weights(0, *LINEAR))
    with pytest.raises(SettingError, match="reshape_activations"):
        formats.load(tmp_path)


BROKEN: dict[str, dict[str, Any]] = {
    "lacks a tensor": {"b_enc": None},
    "has one too many": {"b_out": torch.zeros(D_IN)},
    "has a wrong shape": {"b_enc": torch.zeros(D_SAE + 1)},
    "has no matrix": {"W_enc": torch.zeros(D_SAE)},
    "is not finite": {"W_dec": torch.full((D_SAE, D_IN), float("nan"))},
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_weights_are_told(case: str, tmp_path: Path) -> None:
    tensors = random_weights(0, *LINEAR) | BROKEN[case]
    there = {name: t for name, t in tensors.items() if t is not None}
    write(tmp_path, config("standard"), WEIGHTS, there)
    with pytest.raises(SourceError, match=re.escape(WEIGHTS)):
        formats.load(tmp_path)


def test_broken_gates_are_told(tmp_path: Path) -> None:
    tensors = random_weights(0, *GATED) | {"r_mag": torch.zeros(D_SAE + 1)}
    write(tmp_path, config("gated"), WEIGHTS, tensors)
    with pytest.raises(SourceError, match="shapes do not fit together"):
        formats.load(tmp_path)


def test_what_is_no_directory_of_an_sae_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    with pytest.raises(SourceError, match=r"does not exist"):
        formats.load(folder)
    folder.mkdir()
    with pytest.raises(SourceError, match=r"name the folder of a saved SAE"):
        formats.load(folder)
    (folder / "module.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"own module.*--arm"):
        formats.load(folder)
    (folder / "module.safetensors").unlink()
    (folder / "ae.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"pickles are not read"):
        formats.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(SourceError, match=r"cfg.json alone is not enough"):
        formats.load(folder)
    (folder / WEIGHTS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(SourceError, match=r"not valid JSON"):
        formats.load(folder)
    (folder / "cfg.json").write_text(json.dumps(config("standard")))
    with pytest.raises(SourceError, match=r"not a safetensors file"):
        formats.load(folder)
    with pytest.raises(SourceError, match=r"'sae'"):
        formats.load(tmp_path)
    with pytest.raises(UsageError, match=r"did you mean 'saelens'"):
        formats.load(folder, "sealens")
    with pytest.raises(UsageError, match=r"is not written"):
        formats.saver("sparsify")


def test_the_document_names_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for name, rule in RULES.items():
        if rule.kind != "nothing":
            assert re.search(rf"^\| .*`{name}`.* \| {rule.kind} ", text, re.M), name
