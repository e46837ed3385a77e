"""Transcoders of one file per layer: mwhanna/qwen3-{size}b-transcoders.

    layer_{n}.safetensors   W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]
    config.yaml             model_name, feature_input_hook, feature_output_hook; not all have it

    f = max(W_enc x + b_enc, 0)        y_hat = f W_dec + b_dec

Both weights are latent-major. From the input of block n's MLP, after the norm with its gain, to
its output. Files of these names with other tensors (thresholds, a skip connection) are refused.
"""

from __future__ import annotations

from pathlib import Path

from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError
from saelab.formats.base import (
    MATRICES,
    Loaded,
    Plain,
    floats,
    read_tensors,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.pickles import the_file
from saelab.formats.published.shared import last_match, yaml_texts
from saelab.origin import Origin

PATTERN = r"layer_(\d+)\.safetensors"
CONFIG = "config.yaml"
INPUT, OUTPUT = "feature_input_hook", "feature_output_hook"
#: Names of hook points in a block -> ours, where they differ. Qwen 3 has no norm after the MLP.
HOOKS = {"mlp.hook_out": "hook_mlp_out"}


def load(path: Path) -> Loaded:
    """Loads the file of a layer, or a folder that holds one.

    Raises: SourceError when the file is not that of such a transcoder; SettingError for another
        activation.
    """
    file, name = the_file(path, PATTERN)
    where = file.with_name(CONFIG)
    config = yaml_texts(where, ("model_name", INPUT, OUTPUT, "activation"))
    if config.get("activation", "relu").lower() != "relu":
        raise SettingError(f"{where}: activation", config["activation"], "only relu is read")
    tensors = take(floats(read_tensors(file)), MATRICES, file)
    with shape_errors_as_source_error(file):
        plain = Plain(*(tensors[n] for n in MATRICES), centre=False, target=True).validate(file)
    source, target = config.get(INPUT, "mlp.hook_in"), config.get(OUTPUT, "hook_mlp_out")
    read, written = (f"blocks.{name[1]}.{HOOKS.get(hook, hook)}" for hook in (source, target))
    origin = Origin(config.get("model_name") or _model(file), describe_hooks([read], [written]))
    return Loaded(plain.build(), origin, dict(config))


def _model(file: Path) -> str:
    """Returns the model's name from that of the repository; '' where it does not say it."""
    size = last_match(r"qwen3-(\d+(?:\.\d+)?)b", file)
    return f"Qwen/Qwen3-{size[1]}B" if size else ""
