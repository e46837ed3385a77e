"""SAELens directories, as `sae_lens.SAE.load_from_disk` of 6.54 reads them.

    cfg.json                   architecture, sizes, how activations are prepared, metadata
    sae_weights.safetensors    W_enc [d_in, d_sae], W_dec [d_sae, d_in], b_dec [d_in], and

        standard, topk         b_enc [d_sae]
        jumprelu               b_enc, threshold [d_sae] (log_threshold in older checkpoints)
        gated                  b_gate, b_mag, r_mag [d_sae]
        batchtopk              b_enc, topk_threshold (one number; a training checkpoint)
        matching_pursuit       none of these, and no W_enc

    activation_scaler.json, activation_whitening.safetensors    of a training checkpoint

`RULES` (saelens_fields.py) says for every field whether it is honoured, changes nothing, or is
refused; docs/formats.md shows the table. A field of cfg.json that the table lacks is refused,
because it may change what the SAE computes; metadata that the table lacks is only descriptive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab.errors import SettingError, nearest
from saelab.formats import saelens_transcoders as transcoders
from saelab.formats.base import (
    MATRICES,
    Loaded,
    Plain,
    read_config,
    read_tensors,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.saelens_fields import (
    DESCRIBES,
    HARMLESS,
    OLD_NAMES,
    OTHER_WEIGHTS,
    RULES,
    SCALER,
    WHITENING,
)
from saelab.origin import Origin
from saelab.parts.base import Pursuit
from saelab.row_norm import RowNorm
from saelab.sae import SAE
from saelab.storage.atomic import write_atomically, write_json
from saelab.version import __version__

FILES = CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: The version whose layout is written. SAELens takes a cfg.json without a version of 6 or later for
#: an old flat one.
VERSION = "6.54.0"
#: Value of normalize_activations -> normalisation of each row.
ROW_NORMS: dict[str, RowNorm] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "norm",
}
#: That of a matching pursuit whose cfg.json does not name it.
RESIDUAL_THRESHOLD = 1e-2
DTYPES = {"float32", "float64", "float16", "bfloat16"}


def _as_current_form(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Returns fields, metadata, and whether it is a version before 6.0, which mixes them."""
    metadata = _entries(config, "metadata")
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 6:
        return {n: v for n, v in config.items() if n != "metadata"}, metadata, False
    flat = {OLD_NAMES.get(name, name): value for name, value in (config | metadata).items()}
    if "hook_z" in str(flat.get("hook_name", "")):
        flat.setdefault("reshape_activations", "hook_z")
    kinds = {True: "expected_average_only_in", False: "none", None: "none"}
    value = flat.get("normalize_activations")
    flat["normalize_activations"] = kinds[value] if value in (True, False, None) else value
    return flat, flat, True


def _entries(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a field that holds names and values itself; {} if it is missing.

    Raises: SettingError when it holds something else.
    """
    entries = values.get(name) or {}
    if not isinstance(entries, dict):
        raise SettingError(name, entries, "should hold names and values: save the SAE again")
    return entries


def _check(where: Path, values: Mapping[str, Any], all_known: bool) -> None:
    """Checks fields; with `all_known` each of them must be in `RULES`.

    Raises: SettingError for a field that is refused or unknown.
    """
    for name, value in values.items():
        rule = RULES.get(name)
        if rule is None and all_known:
            remedy = f"is unknown to this reader of SAELens {VERSION}{nearest(name, RULES)}: "
            remedy += "delete it if it does not change what the SAE computes"
            raise SettingError(f"{where}: {name}", value, remedy)
        if rule is not None and not rule.accepts(value):
            raise SettingError(f"{where}: {name}", value, rule.reason)
    for name, value in _entries(values, "activation_fn_kwargs").items():
        if name != "k":
            setting = f"{where}: activation_fn_kwargs.{name}"
            remedy = "is unknown and may change the activation: only k is read"
            raise SettingError(setting, value, remedy)
    for name, value in _entries(values, "model_from_pretrained_kwargs").items():
        if name == "center_writing_weights" and value:
            remedy = "the SAE belongs to a model whose activations had their mean subtracted"
            raise SettingError(f"{where}: {name}", value, f"{remedy}; no such model is run here")
        accepted = name in HARMLESS or name in OTHER_WEIGHTS or name == "center_writing_weights"
        if not accepted and value:
            remedy = "is unknown and may change the model's activations: train on the plain model"
            raise SettingError(f"{where}: model_from_pretrained_kwargs.{name}", value, remedy)


def _round_to_dtype(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path
) -> dict[str, Tensor]:
    """Rounds the tensors to their dtype, as SAELens does when it loads them; returns float32.

    Raises: SettingError for a dtype that SAELens does not have.
    """
    name = str(fields.get("dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise SettingError(f"{where}: dtype", name, f"use one of {', '.join(sorted(DTYPES))}")
    return {key: tensor.to(getattr(torch, name)).float() for key, tensor in tensors.items()}


def _with_topk(fields: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Returns the fields of a TopK SAE in the current form, however they say it; others unchanged.

    Raises: SettingError for a k of two values, or one that the architecture does not use.
    """
    architecture = str(fields.get("architecture", "standard"))
    named = fields.get("activation_fn") == "topk"
    nested = _entries(fields, "activation_fn_kwargs").get("k")
    k = fields.get("k") if fields.get("k") is not None else nested
    if named and architecture not in ("standard", "topk"):
        remedy = f"does not fit architecture {architecture!r}: save the SAE again"
        raise SettingError(f"{where}: activation_fn", "topk", remedy)
    if architecture == "standard" and not named:
        if k is not None:
            remedy = "belongs to a topk SAE: set architecture to 'topk', or leave k out"
            raise SettingError(f"{where}: k", k, remedy)
        return dict(fields)
    if nested is not None and nested != k:
        raise SettingError(f"{where}: activation_fn_kwargs.k", nested, f"k is {k}: leave one out")
    return {**fields, "architecture": "topk" if named else architecture, "k": k}


def _switch(fields: Mapping[str, Any], name: str, default: bool, where: Path) -> bool:
    """Returns a field that is true or false.

    Raises: SettingError when it is anything else; a text such as "false" would count as true.
    """
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise SettingError(f"{where}: {name}", value, "use true or false")
    return value


# ---- reading ------------------------------------------------------------------------------------


def load(folder: Path) -> Loaded:
    """Loads an SAELens directory.

    Raises: SourceError when the files are not those of an SAE; SettingError for a field that is
        refused.
    """
    where = folder / CONFIG
    fields, metadata, old = _as_current_form(read_config(where))
    kind = str(fields.get("architecture", ""))
    _check(where, transcoders.without_fields(kind, fields), all_known=not old)
    _check(where, transcoders.without_fields(kind, metadata), all_known=False)
    fields = _with_topk(fields, where)
    architecture = str(fields.get("architecture", "standard"))
    if architecture not in READERS:
        remedy = f"only these kinds are read: {', '.join(READERS)}"
        raise SettingError(f"{where}: architecture", architecture, remedy)
    tensors = _drop_unused_factor(read_tensors(folder / WEIGHTS), folder)
    tensors = _round_to_dtype(tensors, fields, where)
    with shape_errors_as_source_error(folder / WEIGHTS):
        plain = READERS[architecture](tensors, fields, folder / WEIGHTS)
    if not plain.target and plain.pursuit is None:
        plain = replace(plain, centre=_switch(fields, "apply_b_dec_to_input", True, where))
    plain = plain.validate(folder / WEIGHTS)
    for name, size in (("d_in", plain.d_in), ("d_sae", plain.d_sae)):
        if fields.get(name, size) != size:
            raise SettingError(f"{where}: {name}", fields[name], f"the weights have {size}")
    about = {"context": metadata.get("context_size"), "dataset": metadata.get("dataset_path")}
    about["saelens"] = {name: metadata.get(name) for name in metadata if name in DESCRIBES}
    plain = _fold_normalisation(plain, fields, folder).validate(folder / WEIGHTS)
    return Loaded(plain.build(), _origin(metadata, old), about)


def _drop_unused_factor(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Removes the scaling factor that old files hold even if it is not used.

    Raises: SettingError when it is used: when it is not all 1.
    """
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        where = f"{folder / WEIGHTS}: scaling_factor"
        raise SettingError(where, "not all 1", RULES["finetuning_scaling_factor"].reason)
    return tensors


def _from_linear(tensors: Mapping[str, Tensor], bias: str = "b_enc") -> Plain:
    w_enc = tensors["W_enc"].mT
    return Plain(w_enc, tensors[bias], tensors["W_dec"], tensors["b_dec"])


def _read_standard(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    return _from_linear(take(tensors, MATRICES, where))


def _read_topk(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    k = fields.get("k")
    if type(k) is not int or k < 1:
        raise SettingError(f"{where.parent / CONFIG}: k", k, "use a whole number of at least 1")
    plain = _from_linear(take(tensors, MATRICES, where))
    return replace(_fold_decoder_norms(plain, fields, where), k=k)


def _read_abstopk(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    return replace(_read_topk(tensors, fields, where), signed=True)


def _read_jumprelu(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    logarithm = "log_threshold" in tensors
    name = "log_threshold" if logarithm else "threshold"
    tensors = take(tensors, (*MATRICES, name), where)
    threshold = tensors[name].exp() if logarithm else tensors[name]
    return replace(_from_linear(tensors), threshold=threshold)


def _read_batchtopk(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    tensors = take(tensors, (*MATRICES, "topk_threshold"), where)
    plain = _fold_decoder_norms(_from_linear(tensors), fields, where)
    return replace(plain, threshold=tensors["topk_threshold"].expand(plain.d_sae))


def _read_gated(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    tensors = take(tensors, names, where)
    plain = _from_linear(tensors, "b_mag")
    return plain.with_gate(tensors["r_mag"].exp(), tensors["b_gate"], tensors["b_mag"])


def _read_pursuit(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], where: Path) -> Plain:
    tensors, config = take(tensors, ("W_dec", "b_dec"), where), where.parent / CONFIG
    kind = fields.get("normalize_activations", "none")
    if kind not in ROW_NORMS:
        remedy = "can't be folded into a matching pursuit, which has no encoder: train without it"
        raise SettingError(f"{config}: normalize_activations", kind, remedy)
    centred = _switch(fields, "apply_b_dec_to_input", True, config)
    w_dec, b_dec = tensors["W_dec"], tensors["b_dec"] * centred  # not added where not subtracted
    steps = fields.get("max_iterations")
    steps = w_dec.shape[1] if steps is None else steps
    if type(steps) is not int or steps < 1:
        remedy = "use a whole number of at least 1, or null for d_in"
        raise SettingError(f"{config}: max_iterations", steps, remedy)
    threshold = fields.get("residual_threshold", RESIDUAL_THRESHOLD)
    if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
        remedy = "use a number of at least 0"
        raise SettingError(f"{config}: residual_threshold", threshold, remedy)
    stops = _switch(fields, "stop_on_duplicate_support", True, config)
    plain = Plain(w_dec, w_dec.new_zeros(len(w_dec)), w_dec, b_dec)
    return replace(plain, pursuit=Pursuit(steps, float(threshold), stops))


def _fold_decoder_norms(plain: Plain, fields: Mapping[str, Any], where: Path) -> Plain:
    name = "rescale_acts_by_decoder_norm"
    return plain.with_unit_decoder() if _switch(fields, name, False, where) else plain


#: Architecture -> function that reads its tensors.
READERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], Path], Plain]] = {
    "standard": _read_standard,
    "topk": _read_topk,
    "abstopk": _read_abstopk,
    "jumprelu": _read_jumprelu,
    "gated": _read_gated,
    "batchtopk": _read_batchtopk,
    "matryoshka_batchtopk": _read_batchtopk,
    "matching_pursuit": _read_pursuit,
    **dict.fromkeys(transcoders.ARCHITECTURES, transcoders.read),
}


def _fold_normalisation(plain: Plain, fields: Mapping[str, Any], folder: Path) -> Plain:
    """Folds the normalisation of activations into the weights.

    A normalisation by each row's own statistics can't be folded and stays as `Plain.row_norm`.

    Raises: SettingError when it is unknown or lacks its statistics.
    """
    kind = fields.get("normalize_activations", "none")
    setting = f"{folder / CONFIG}: normalize_activations"
    if kind == "expected_average_only_in":
        scaler = read_config(folder / SCALER) if _has(folder, SCALER) else {}
        factor = scaler.get("scaling_factor")
        if factor is None:
            remedy = f"its factor is not in {SCALER}: fold it in SAELens before saving"
            raise SettingError(setting, kind, f"{remedy} (fold_activation_norm_scaling_factor)")
        if type(factor) not in (int, float) or not 0 < factor < math.inf:
            remedy = "is not a positive number: save the SAE again"
            raise SettingError(f"{folder / SCALER}: scaling_factor", factor, remedy)
        return plain.without_scaling(float(factor))
    if kind == "covariance_whitening":
        if not _has(folder, WHITENING):
            remedy = f"there is no {WHITENING}: fold it in SAELens before saving"
            raise SettingError(setting, kind, f"{remedy} (fold_activation_whitening)")
        names = ("mean", "matrix", "inverse_matrix")
        tensors = take(read_tensors(folder / WHITENING), names, folder / WHITENING)
        return plain.without_whitening(*(tensors[name].float() for name in names))
    if kind in ROW_NORMS:
        return replace(plain, row_norm=ROW_NORMS[kind])
    raise SettingError(setting, kind, "is unknown: fold it in SAELens before saving")


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _origin(metadata: Mapping[str, Any], old: bool) -> Origin:
    return Origin(
        str(metadata.get("model_name") or ""),
        transcoders.hooks(metadata),
        tuple(dict.fromkeys(_peculiarities(metadata, old))),
    )


def _peculiarities(metadata: Mapping[str, Any], old: bool) -> Iterator[str]:
    """Yields what sets the SAE apart from all activations that can be harvested here."""
    original = _entries(_entries(metadata, "saelab"), "saelens")  # written again by saelab
    if original:
        yield from _peculiarities(original, _as_current_form(original)[2])
    if old and "model_from_pretrained_kwargs" not in metadata:
        # github.com/decoderesearch/SAELens/pull/279: models have come unprocessed only since then
        yield (
            "does not say how its model was loaded, and before September 2024 SAELens trained on "
            "models whose activations had their mean subtracted"
        )
    if metadata.get("prepend_bos") is False:
        yield "was trained without BOS tokens, but contexts here begin with one"
    positions = metadata.get("seqpos_slice") or []
    if any(end not in (None, 0) for end in positions):
        yield f"was trained only on positions {list(positions)}, but all count here"
    for name in OTHER_WEIGHTS:
        value = _entries(metadata, "model_from_pretrained_kwargs").get(name)
        if value is not None:
            yield f"was trained on the model's {name} {value}, which can't be compared"


# ---- writing ------------------------------------------------------------------------------------


def save(sae: SAE, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the SAE with everything folded, except the decoder norms, on which the code depends.

    Args:
        folder: to be filled.
        about: model, hook_name, context, dataset and further metadata to be stored.

    Raises: SettingError when a part of the SAE can't be folded.
    """
    transcoders.check_writable(sae)
    plain = Plain.of(sae).validate(folder)
    tensors = {name: getattr(plain, name) for name in MATRICES} | {"W_enc": plain.W_enc.T}
    if plain.pursuit is not None:
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip
    if plain.threshold is not None:
        tensors["threshold"] = plain.threshold
    copies = {name: t.detach().float().cpu().clone().contiguous() for name, t in tensors.items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(copies, temporary))
    write_json(folder / CONFIG, _config(plain) | {"metadata": _metadata(about)})


def _architecture(plain: Plain) -> str:
    if plain.target:
        return transcoders.architecture(plain)
    if plain.pursuit is not None:
        return "matching_pursuit"
    if plain.k is not None:
        return "abstopk" if plain.signed else "topk"
    return "standard" if plain.threshold is None else "jumprelu"


def _config(plain: Plain) -> dict[str, Any]:
    return {
        "architecture": _architecture(plain),
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": next(n for n, k in ROW_NORMS.items() if k == plain.row_norm),
        "reshape_activations": "none",
        **({"k": plain.k, "rescale_acts_by_decoder_norm": False} if plain.k is not None else {}),
        **_pursuit_fields(plain.pursuit),
        **transcoders.config(plain),
    }


def _pursuit_fields(pursuit: Pursuit | None) -> dict[str, Any]:
    """Returns the fields of a matching pursuit alone; {} for any other SAE."""
    if pursuit is None:
        return {}
    return {
        "max_iterations": pursuit.steps,
        "residual_threshold": pursuit.residual_threshold,
        "stop_on_duplicate_support": pursuit.stops_at_repeats,
    }


#: Metadata of another tool's SAE that are written again as they were read.
METADATA_OF_TRAINING = ("prepend_bos", "seqpos_slice")


def _training(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how the SAE was trained; for another tool's SAE only what it says itself."""
    if "saelens" in about:
        original = about["saelens"]
        kwargs = original.get("model_from_pretrained_kwargs") or {}
        copied = {name: original.get(name) for name in METADATA_OF_TRAINING}
        return copied | {"model_from_pretrained_kwargs": kwargs}
    if about.get("model") and "format" not in about:
        return {
            "prepend_bos": True,
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
        }
    return {"prepend_bos": None, "model_from_pretrained_kwargs": {}}


def _metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    hook = str(about.get("hook_name") or "")
    block = hook.removeprefix("blocks.").split(".")[0] if hook.startswith("blocks.") else ""
    standard = {"model", "hook_name", "context", "dataset"}
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": about.get("model") or None,
        "model_class_name": "HookedTransformer",
        **transcoders.metadata(hook),
        "hook_layer": int(block) if block.isdigit() else None,
        "hook_head_index": None,
        **_training(about),
        "context_size": about.get("context"),
        "dataset_path": about.get("dataset") or None,
        "saelab_version": __version__,
        "saelab": {name: value for name, value in about.items() if name not in standard},
    }
