"""Shared code of the two layouts of OpenMOSS that are read: Llama Scope and Llama Scope R1.

    u = s x,  s = sqrt(d_in) / (average norm of the activations)
    z = W_enc u + b_enc        f = max(z, 0) 1[z > threshold]        x_hat = (f W_dec + b_dec) / s

Where sparsity_include_decoder_norm is true, OpenMOSS compares z |W_dec_i| with the threshold, but
SAELens' loader compares z. They are the same function only where the decoder rows have norm 1, so
others are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SettingError, SourceError
from saelab.formats.base import LinearNames, Plain, take

NAMES = LinearNames()
#: Largest difference of a decoder row's norm from 1: the rounding of bfloat16.
ROUNDING = 2**-7
#: Fields that change what is computed -> the values that are read; a missing field is the first.
READ: dict[str, tuple[Any, ...]] = {
    "act_fn": ("jumprelu", None),
    "norm_activation": ("dataset-wise", "inference", None),
    "use_glu_encoder": (False, None),
    "sae_type": ("sae", None),
}
NEWER = "belong to a newer layout of OpenMOSS, which is not read: convert it to SAELens"


def check_fields(config: Mapping[str, Any], where: Path) -> None:
    """Checks the fields of a configuration.

    Raises: SettingError for a function that is not read, and for a transcoder.
    """
    for name, accepted in READ.items():
        value = config.get(name)
        if (value.lower() if isinstance(value, str) else value) not in accepted:
            remedy = f"is not read: only {accepted[0]!r} is"
            raise SettingError(f"{where}: {name}", value, remedy)
    source, target = config.get("hook_point_in"), config.get("hook_point_out")
    if target and source and target != source:
        remedy = "is a transcoder's, whose thresholds follow the scale of its input by one reading "
        remedy += "and of its output by another: only autoencoders of this layout are read"
        raise SettingError(f"{where}: hook_point_out", target, remedy)


def read_layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: Path) -> Plain:
    """Builds the SAE on s x, with ReLU.

    Args:
        tensors: the four of two linear layers, or three where use_decoder_bias is false.
        where: the file, for messages.

    Raises: SourceError for other tensors; SettingError for a decoder that SAELens and OpenMOSS
        take differently.
    """
    refuse_newer(tensors, where)
    if config.get("use_decoder_bias") is False and NAMES.decoder_bias not in tensors:
        encoder = take_one(tensors, NAMES.encoder, where)
        zeros = torch.zeros(encoder.shape[-1], dtype=torch.float32)
        tensors = {**tensors, NAMES.decoder_bias: zeros}
    centre = bool(config.get("apply_decoder_bias_to_pre_encoder"))
    plain = NAMES.plain(take(tensors, NAMES.all, where), centre=centre).validate(where)
    if config.get("sparsity_include_decoder_norm"):
        norms = torch.linalg.vector_norm(plain.W_dec, dim=1)
        if bool(((norms - 1).abs() > ROUNDING).any()):
            remedy = "thresholds are relative to decoder norms that are not 1, where SAELens and "
            remedy += "OpenMOSS differ: convert it to norms of 1"
            raise SettingError(f"{where}: sparsity_include_decoder_norm", True, remedy)
    return plain


def refuse_newer(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raises: SettingError for the tensors of OpenMOSS' newer layout."""
    if newer := [name for name in ("W_E", "b_E", "W_D", "b_D") if name in tensors]:
        raise SettingError(f"{where}: tensors", ", ".join(newer), NEWER)


def take_one(tensors: Mapping[str, Tensor], name: str, where: Path) -> Tensor:
    """Returns a tensor.

    Raises: SourceError when it is missing.
    """
    if name not in tensors:
        raise SourceError(f"{where} lacks {name!r}: name an SAE's directory")
    return tensors[name]


def input_factor(
    norms: Mapping[str, Any], config: Mapping[str, Any], d_in: int, where: Path
) -> float:
    """Returns s of this module's equation.

    Args:
        norms: average norm of the activations by 'in', 'out' or hook point.
        where: the file that should hold them, for messages.

    Raises: SettingError when there is none for the SAE's input, or it is not positive.
    """
    if str(config.get("norm_activation")).lower() == "inference":  # already folded
        return 1.0
    hook = str(config.get("hook_point_in") or "")
    values = [float(norms[name]) for name in ("in", hook) if name in norms]
    setting = f"{where}: dataset_average_activation_norm"
    if not values or not 0 < values[0] < math.inf:
        remedy = f"has no positive norm for 'in' or {hook!r}, by which activations are scaled: "
        raise SettingError(setting, dict(norms) or None, f"{remedy}add it")
    if float(norms.get("out", values[0])) != values[0]:
        remedy = "scales input and output differently, as only a transcoder does: set one value"
        raise SettingError(setting, dict(norms), remedy)
    return math.sqrt(d_in) / values[0]
