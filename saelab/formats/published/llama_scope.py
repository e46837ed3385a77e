"""Llama Scope: SAEs on Llama 3.1 8B, as fnlp/Llama3_1-8B-Base-LX{R,M,A}-{8,32}x hold them.

    Llama3_1-8B-Base-L{n}{R,M,A}-{8,32}x/
        hyperparams.json                d_model, d_sae, hook_point_in, jump_relu_threshold,
                                        dataset_average_activation_norm
        checkpoints/final.safetensors   encoder.weight [d_sae, d_in], encoder.bias [d_sae],
                                        decoder.weight [d_in, d_sae], decoder.bias [d_in]

See `openmoss`. The one threshold is on activations as they are, the weights on s times them:
threshold = s jump_relu_threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saelab.errors import SettingError
from saelab.formats.base import (
    Loaded,
    floats,
    read_config,
    read_tensors,
    shape_errors_as_source_error,
)
from saelab.formats.published.openmoss import check_fields, input_factor, read_layers
from saelab.origin import Origin

FILES = CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
MODEL = "meta-llama/Llama-3.1-8B"


def load(folder: Path) -> Loaded:
    """Loads the directory of one SAE.

    Raises: SourceError when the files are not those of an SAE; SettingError for a function that is
        not read.
    """
    where, weights = folder / CONFIG, folder / WEIGHTS
    config = read_config(where)
    check_fields(config, where)
    with shape_errors_as_source_error(weights):
        plain = read_layers(floats(read_tensors(weights)), config, weights)
    for name, size in (("d_model", plain.d_in), ("d_sae", plain.d_sae)):
        if config.get(name, size) != size:
            raise SettingError(f"{where}: {name}", config[name], f"the weights have {size}")
    norms = config.get("dataset_average_activation_norm")
    norms = norms if isinstance(norms, dict) else {}
    factor = input_factor(norms, config, plain.d_in, where)
    threshold = torch.full_like(plain.b_enc, _threshold(config, where) * factor)
    plain = replace(plain, threshold=threshold).without_scaling(factor).validate(weights)
    return Loaded(plain.build(), Origin(MODEL, str(config.get("hook_point_in") or "")), config)


def _threshold(config: Mapping[str, Any], where: Path) -> float:
    """Returns the one threshold, in units of activations as they are.

    Raises: SettingError when it is missing or is not a finite number.
    """
    threshold: object = config.get("jump_relu_threshold")
    if not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        remedy = "is not a number: it is the threshold of all latents"
        raise SettingError(f"{where}: jump_relu_threshold", threshold, remedy)
    return float(threshold)
