"""Gemma Scope 2: SAEs on Gemma 3, as google/gemma-scope-2-{size}-{pt,it} hold them.

    {resid_post,mlp_out,attn_out}[_all]/layer_{n}_width_{w}_l0_{size}/
        params.safetensors  w_enc [d_in, d_sae], b_enc, threshold [d_sae], w_dec [d_sae, d_in],
                            b_dec [d_in]
        config.json         architecture, model_name, hf_hook_point_in, hf_hook_point_out, width,
                            type, affine_connection, l0; some folders do not have it

    z = W_enc x + b_enc        f = max(z, 0) 1[z > threshold]

Hook points are those of hf_hook_point_in: SAELens names the input of a transcoder hook_mlp_in,
which is another tensor (before the norm). Without config.json the folders' names say the place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab.errors import SettingError
from saelab.formats.base import (
    Loaded,
    Origin,
    Plain,
    floats,
    read_config,
    read_tensors,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.published.shared import block_output, last_match, place

CONFIG = "config.json"
FILES = (WEIGHTS,) = ("params.safetensors",)
TENSORS = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
#: Kind of a folder -> the module's tensor that its SAEs encode.
PLACES = {
    "resid_post": "model.layers.{n}.output",
    "mlp_out": "model.layers.{n}.post_feedforward_layernorm.output",
    "attn_out": "model.layers.{n}.self_attn.o_proj.input",
}
#: End of hf_hook_point_in -> hook point of block n; other places keep their name.
HOOKS = {
    "output": block_output("{n}"),
    "post_feedforward_layernorm.output": "blocks.{n}.hook_mlp_out",
}
TRANSCODER = "reconstructs other activations than it reads: only autoencoders are read"


def load(folder: Path) -> Loaded:
    """Loads the directory of one SAE.

    Raises: SourceError when the files are not those of an SAE; SettingError for another
        architecture, a transcoder, and a width that is not that of the weights.
    """
    where = folder / CONFIG
    config = read_config(where) if where.is_file() else _from_path(folder)
    _check(config, folder, where)
    tensors = take(floats(read_tensors(folder / WEIGHTS)), TENSORS, folder / WEIGHTS)
    with shape_errors_as_source_error(folder / WEIGHTS):
        w_enc, b_enc, w_dec, b_dec, threshold = (tensors[name] for name in TENSORS)
        plain = Plain(w_enc.mT, b_enc, w_dec, b_dec, centre=False, threshold=threshold)
        plain = plain.validate(folder / WEIGHTS)
    width = config.get("width")
    if type(width) is int and width != plain.d_sae:
        raise SettingError(f"{where}: width", width, f"the weights have {plain.d_sae}")
    return Loaded(plain.build(), Origin(_model(config), _hook(config)), config)


def _from_path(folder: Path) -> dict[str, Any]:
    """Returns what the names of the folders say of the fields of config.json."""
    config: dict[str, Any] = {}
    if repository := last_match(r"gemma-scope-2-(\w+)-(pt|it)(?=/|$)", folder):
        config["model_name"] = f"gemma-3-{repository[1]}-{repository[2]}"
    if spot := last_match(r"/(resid_post|mlp_out|attn_out)(?:_all)?/layer_(\d+)_", folder):
        config["hf_hook_point_in"] = PLACES[spot[1]].format(n=spot[2])
    return config


def _check(config: Mapping[str, Any], folder: Path, where: Path) -> None:
    """Checks the fields that decide what is computed.

    Raises: SettingError for an architecture other than JumpReLU, and for a transcoder.
    """
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise SettingError(f"{where}: architecture", architecture, "only jump_relu is read")
    kind = str(config.get("type") or "sae")
    if kind.lower() != "sae":
        raise SettingError(f"{where}: type", kind, TRANSCODER)
    if config.get("affine_connection"):
        raise SettingError(f"{where}: affine_connection", True, TRANSCODER)
    source, target = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if target and target != source:
        raise SettingError(f"{where}: hf_hook_point_out", target, TRANSCODER)
    if named := re.search(r"/(transcoder|clt|crosscoder)\w*/[^/]+$", place(folder)):
        raise SettingError(f"{folder}: folder", named[1], TRANSCODER)


def _model(config: Mapping[str, Any]) -> str:
    """Returns the name of the model's repository: that of 270m has no -pt."""
    name = str(config.get("model_name") or "").removeprefix("google/").replace("-v3", "-3")
    if not name:
        return ""
    return "google/" + (name.replace("-pt", "") if "270m" in name else name)


def _hook(config: Mapping[str, Any]) -> str:
    """Returns the hook point of hf_hook_point_in."""
    name = str(config.get("hf_hook_point_in") or "")
    block = re.search(r"\blayers\.(\d+)\.(.+)$", name)
    if block is None or block[2] not in HOOKS:
        return name.removesuffix(".output")  # the module's name means its output
    return HOOKS[block[2]].format(n=block[1])
