"""OpenAI's SAEs on GPT-2 small, one pickled state dict per layer; read only if the format is named.

    sparse-autoencoder/gpt2-small/{location}[_v4,_v5_32k,_v5_128k]/autoencoders/{layer}.pt
        encoder.weight [d_sae, d_in], latent_bias [d_sae], decoder.weight [d_in, d_sae],
        pre_bias [d_in], statistics of training, and two settings that are not tensors:
        activation              "ReLU" or "TopK"
        activation_state_dict   k and postact_fn of TopK

    z = W_enc (x - pre_bias) + latent_bias,  x_hat = f W_dec + pre_bias

with ReLU or the k largest of a row. With TopK, and only then (github.com/openai/sparse_autoencoder,
`Autoencoder.from_state_dict`), x is a row from which its mean was subtracted and which was divided
by its standard deviation + 1e-5; mean and deviation are given back to x_hat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saelab.errors import SettingError
from saelab.formats.base import (
    LinearNames,
    Loaded,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.pickles import read_with_settings, the_file
from saelab.formats.published.shared import last_match
from saelab.origin import Origin

PATTERN = r"(\d+)\.pt"
NAMES = LinearNames(encoder_bias="latent_bias", decoder_bias="pre_bias")
#: Tensors that count activations in training, and that nothing is computed from.
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
#: Values that are not tensors. The last two are those of TopK once more, since a module's state
#: dict also holds its children's.
SETTINGS = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")
MODEL = "openai-community/gpt2"
_LOCATION = r"/([a-z]+_[a-z]+_[a-z]+)(?:_v\d\w*)?/autoencoders/\d+\.pt$"
#: Location -> hook point of its SAEs in block n.
HOOKS = {
    "resid_delta_attn": "blocks.{n}.hook_attn_out",
    "resid_delta_mlp": "blocks.{n}.hook_mlp_out",
    "resid_post_attn": "blocks.{n}.hook_resid_mid",
    "resid_post_mlp": "blocks.{n}.hook_resid_post",
    "mlp_post_act": "blocks.{n}.mlp.hook_post",
}


def load(path: Path) -> Loaded:
    """Loads the file of a layer, or a folder that holds one.

    Raises: SourceError when the file is not that of such an SAE; SettingError for an activation
        that is not read.
    """
    file, name = the_file(path, PATTERN)
    tensors, settings = read_with_settings(file, SETTINGS)
    k = _k(settings, file)
    tensors = {name: t for name, t in tensors.items() if name not in STATISTICS}
    with shape_errors_as_source_error(file):
        plain = NAMES.plain(take(tensors, NAMES.all, file), centre=True)
    if k is not None:
        plain = replace(plain, k=k, row_norm="layer_norm")
    return Loaded(plain.validate(file).build(), Origin(MODEL, _hook(file, name)), {"k": k})


def _k(settings: Mapping[str, Any], file: Path) -> int | None:
    """Returns k of TopK; None for ReLU.

    Raises: SettingError for another activation, and where two settings contradict each other.
    """
    kind = settings.get("activation", "ReLU")
    if kind not in ("ReLU", "TopK"):
        raise SettingError(f"{file}: activation", kind, "only ReLU and TopK are read")
    if kind == "ReLU":
        return None
    nested = settings.get("activation_state_dict")
    values = dict(nested) if isinstance(nested, Mapping) else {}
    k, after = values.get("k"), values.get("postact_fn")
    if type(k) is not int:
        raise SettingError(f"{file}: activation_state_dict.k", k, "is not a whole number")
    if after != "ReLU":
        remedy = "makes codes that may be negative: only ReLU is read"
        raise SettingError(f"{file}: activation_state_dict.postact_fn", after, remedy)
    for name, value in (("activation.k", k), ("activation.postact_fn", after)):
        if settings.get(name, value) != value:
            raise SettingError(f"{file}: {name}", settings[name], f"elsewhere it is {value!r}")
    return k


def _hook(file: Path, layer: re.Match[str]) -> str:
    """Returns the hook point that the path says; '' where it does not."""
    location = last_match(_LOCATION, file)
    known = location is not None and location[1] in HOOKS
    return HOOKS[location[1]].format(n=layer[1]) if location and known else ""
