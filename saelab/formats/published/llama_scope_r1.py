"""Llama Scope R1: SAEs on DeepSeek-R1-Distill-Llama-8B, as fnlp/Llama-Scope-R1-Distill holds them.

    {mix}/L{n}R/
        config.json                 d_model, hook_point_in, dataset_average_activation_norm
        sae_weights.safetensors     encoder.weight [d_sae, d_in], encoder.bias [d_sae],
                                    decoder.weight [d_in, d_sae], decoder.bias [d_in],
                                    log_jumprelu_threshold [d_sae], and one number for each of
                                    dataset_average_activation_norm.*

See `openmoss`; threshold = exp(log_jumprelu_threshold), on s x as the weights are.
SAELens' loader names the base model, its list of releases the distilled one, as this reader does:
the factor of layer 0 in that list (53.5) is not the base model's (58.9).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from saelab.errors import SettingError
from saelab.formats.base import (
    Loaded,
    floats,
    read_config,
    read_tensors,
    shape_errors_as_source_error,
)
from saelab.formats.published.openmoss import (
    check_fields,
    input_factor,
    read_layers,
    refuse_newer,
    take_one,
)
from saelab.origin import Origin

FILES = CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
THRESHOLD = "log_jumprelu_threshold"
NORM = "dataset_average_activation_norm"


def load(folder: Path) -> Loaded:
    """Loads the directory of one SAE.

    Raises: SourceError when the files are not those of an SAE; SettingError for a function that is
        not read.
    """
    where, weights = folder / CONFIG, folder / WEIGHTS
    config = read_config(where)
    check_fields(config, where)
    tensors = floats(read_tensors(weights))
    stored = {name: float(tensors.pop(name)) for name in list(tensors) if name.startswith(NORM)}
    norms = {name.removeprefix(f"{NORM}."): value for name, value in stored.items()}
    norms = norms or (config.get(NORM) if isinstance(config.get(NORM), dict) else {})
    refuse_newer(tensors, weights)
    threshold = take_one(tensors, THRESHOLD, weights)
    with shape_errors_as_source_error(weights):
        layers = {name: t for name, t in tensors.items() if name != THRESHOLD}
        plain = read_layers(layers, config, weights)
        plain = replace(plain, threshold=threshold.exp()).validate(weights)
    if config.get("d_model", plain.d_in) != plain.d_in:
        remedy = f"the weights have {plain.d_in}"
        raise SettingError(f"{where}: d_model", config["d_model"], remedy)
    factor = input_factor(norms or {}, config, plain.d_in, where)
    plain = plain.without_scaling(factor).validate(weights)
    return Loaded(plain.build(), Origin(MODEL, str(config.get("hook_point_in") or "")), config)
