"""Gemma Scope 2: SAEs and transcoders on Gemma 3, as google/gemma-scope-2-{size}-{pt,it} hold them.

    {resid_post,mlp_out,attn_out,transcoder}[_all]/layer_{n}_width_{w}_l0_{size}[_affine]/
        params.safetensors  w_enc [d_in, d_sae], b_enc, threshold [d_sae], w_dec [d_sae, d_out],
                            b_dec [d_out], affine_skip_connection [d_in, d_out] of some transcoders
        config.json         architecture, model_name, hf_hook_point_in, hf_hook_point_out, width,
                            type, affine_connection, l0; some folders do not have it

    z = W_enc x + b_enc        f = max(z, 0) 1[z > threshold]
    y_hat = f W_dec + b_dec + x affine_skip_connection

Hook points are those of hf_hook_point_in and hf_hook_point_out: SAELens names the input of a
transcoder hook_mlp_in, which is another tensor (before the norm). Without config.json the folders'
names say the place. SAELens multiplies x with the transposed affine_skip_connection; the example
code of the publishers and circuit-tracer multiply as this equation does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError
from saelab.formats.base import (
    Loaded,
    Plain,
    floats,
    read_config,
    read_tensors,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.published.shared import block_output, last_match, place
from saelab.origin import Origin

CONFIG, TRANSCODER = "config.json", "transcoder"
FILES = (WEIGHTS,) = ("params.safetensors",)
TENSORS = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
AFFINE = "affine_skip_connection"
#: Kind of a folder -> the module's tensor that its SAEs encode.
PLACES = {
    "resid_post": "model.layers.{n}.output",
    "mlp_out": "model.layers.{n}.post_feedforward_layernorm.output",
    "attn_out": "model.layers.{n}.self_attn.o_proj.input",
    "transcoder": "model.layers.{n}.pre_feedforward_layernorm.output",
}
#: End of hf_hook_point_in or _out -> hook point of block n; other places keep their name.
HOOKS = {
    "output": block_output("{n}"),
    "pre_feedforward_layernorm.output": "blocks.{n}.mlp.hook_in",
    "post_feedforward_layernorm.output": "blocks.{n}.hook_mlp_out",
}
_PLACE = r"/(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d+)_([^/]+)"


def load(folder: Path) -> Loaded:
    """Loads the directory of one SAE or transcoder.

    Raises: SourceError when the files are not those of an SAE; SettingError for another
        architecture, for fields that contradict each other, and for a width that is not that of the
        weights.
    """
    where, weights = folder / CONFIG, folder / WEIGHTS
    config = read_config(where) if where.is_file() else _from_path(folder)
    is_transcoder = _check(config, folder, where)
    plain = read_plain(weights, bool(config.get("affine_connection")))
    with shape_errors_as_source_error(weights):
        plain = replace(plain, target=is_transcoder).validate(weights)
    width = config.get("width")
    if type(width) is int and width != plain.d_sae:
        raise SettingError(f"{where}: width", width, f"the weights have {plain.d_sae}")
    hooks = [_hook(config, "hf_hook_point_in")]
    targets = [_hook(config, "hf_hook_point_out")] if is_transcoder else []
    return Loaded(plain.build(), Origin(model(config), describe_hooks(hooks, targets)), config)


def read_plain(file: Path, affine: bool) -> Plain:
    """Reads the tensors of an SAE, a transcoder or a layer, which the caller validates.

    Args:
        affine: whether the file holds a skip connection.

    Raises: SourceError when a tensor is missing, unknown or no matrix, or the file can't be read.
    """
    tensors = take(floats(read_tensors(file)), (*TENSORS, AFFINE) if affine else TENSORS, file)
    w_enc, b_enc, w_dec, b_dec, threshold = (tensors[name] for name in TENSORS)
    with shape_errors_as_source_error(file):
        plain = Plain(w_enc.mT, b_enc, w_dec, b_dec, centre=False, threshold=threshold)
        return replace(plain, W_skip=tensors[AFFINE].mT) if affine else plain


def _from_path(folder: Path) -> dict[str, Any]:
    """Returns what the names of the folders say of the fields of config.json."""
    config: dict[str, Any] = {}
    if name := model_of_path(folder):
        config["model_name"] = name
    if spot := last_match(_PLACE, folder):
        config["hf_hook_point_in"] = PLACES[spot[1]].format(n=spot[2])
        if spot[1] == TRANSCODER:
            config["hf_hook_point_out"] = PLACES["mlp_out"].format(n=spot[2])
            config["affine_connection"] = "affine" in spot[3]
    return config


def model_of_path(path: Path) -> str:
    """Returns the model's name from that of the repository in the path; '' if there is none."""
    repository = last_match(r"gemma-scope-2-(\w+)-(pt|it)(?=/|$)", path)
    return f"gemma-3-{repository[1]}-{repository[2]}" if repository else ""


def _check(config: Mapping[str, Any], folder: Path, where: Path) -> bool:
    """Returns whether it is a transcoder: whether it writes at another place than it reads.

    Raises: SettingError for an architecture other than JumpReLU, for other kinds of SAEs, and where
        the fields and the folder's name contradict each other.
    """
    check_architecture(config, where)
    source, target = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    is_transcoder = bool(target) and target != source
    spot = last_match(_PLACE, folder)
    if spot and (spot[1] == TRANSCODER) != is_transcoder:
        remedy = f"contradicts the folder's name, {spot[1]}: keep its repository's names"
        raise SettingError(f"{where}: hf_hook_point_out", target, remedy)
    kind = TRANSCODER if is_transcoder else "sae"
    if stated := str(config.get("type") or "").lower():
        if stated not in ("sae", TRANSCODER):
            raise SettingError(f"{where}: type", stated, f"is not read: only sae and {TRANSCODER}")
        if stated != kind:
            remedy = f"its hf_hook_point_in and hf_hook_point_out are those of one of type {kind}"
            raise SettingError(f"{where}: type", stated, remedy)
    if other := re.search(r"/(clt|crosscoder)\w*/[^/]+$", place(folder)):
        raise SettingError(f"{folder}: folder", other[1], "is not read from one file")
    if config.get("affine_connection") and not is_transcoder:
        remedy = "is read of a transcoder alone, whose hf_hook_point_out is not hf_hook_point_in"
        raise SettingError(f"{where}: affine_connection", True, remedy)
    return is_transcoder


def check_architecture(config: Mapping[str, Any], where: Path) -> None:
    """Raises: SettingError for an architecture other than JumpReLU."""
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise SettingError(f"{where}: architecture", architecture, "only jump_relu is read")


def model(config: Mapping[str, Any]) -> str:
    """Returns the name of the model's repository: that of 270m has no -pt."""
    name = str(config.get("model_name") or "").removeprefix("google/").replace("-v3", "-3")
    if not name:
        return ""
    return "google/" + (name.replace("-pt", "") if "270m" in name else name)


def _hook(config: Mapping[str, Any], field: str) -> str:
    """Returns the hook point of a field that names a module and its side."""
    name = str(config.get(field) or "")
    block = re.search(r"\blayers\.(\d+)\.(.+)$", name)
    if block is None or block[2] not in HOOKS:
        return name.removesuffix(".output")  # the module's name means its output
    return HOOKS[block[2]].format(n=block[1])
