"""Checkpoints of sparsify (`sparsify.SparseCoder.save_to_disk`, 1.3.3).

    cfg.json            k, activation, transcode, skip_connection, num_latents, d_in
    sae.safetensors     encoder.weight, W_dec [d_sae, d_in], encoder.bias [d_sae], b_dec [d_in]

    f = max(W_enc (x - b_dec) + b_enc, 0) at the k largest of a row; old versions may say `signed`:
    then f = W_enc (x - b_dec) + b_enc at the k largest in size

With `transcode` it reads the input of the module and reconstructs its output: b_dec is then not
subtracted. `skip_connection` adds W_skip x (tensor W_skip [d_in, d_in]).

The folder is named after the module whose output is encoded ('layers.3', 'h.3'); a run of several
seeds has folders 'seed0', 'seed1' in it. The run's folder above may hold config.json with the
model's name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError, nearest
from saelab.formats.base import Loaded, Plain, read_config, read_tensors, take
from saelab.origin import Origin

FILES = CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
#: Fields that are honoured, and those that are used only in training.
HONOURED = ("activation", "k", "d_in", "signed", "transcode", "skip_connection")
TRAINING = ("expansion_factor", "num_latents", "normalize_decoder", "multi_topk")
_MLP = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.mlp")
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)")


def load(folder: Path) -> Loaded:
    """Loads a directory of sparsify.

    Raises: SourceError when the files are not those of an SAE; SettingError for a refused field.
    """
    where = folder / CONFIG
    config = read_config(where)
    _check(where, config)
    names = (*TENSORS, "W_skip") if config.get("skip_connection") else TENSORS
    tensors = take(read_tensors(folder / WEIGHTS), names, folder / WEIGHTS)
    w_enc, b_enc, w_dec, b_dec = (tensors[name].float() for name in TENSORS)
    signed = config.get("signed", False)
    plain = Plain(w_enc, b_enc, w_dec, b_dec, k=config["k"], signed=signed)
    transcode = bool(config.get("transcode"))
    if transcode:
        skip = tensors["W_skip"].float() if "W_skip" in tensors else None
        plain = replace(plain, centre=False, target=True, W_skip=skip)
    plain = plain.validate(folder / WEIGHTS)
    for name, size in (("d_in", plain.d_in), ("num_latents", plain.d_sae)):
        if config.get(name, size) not in (size, 0):  # 0: d_in times the expansion factor
            raise SettingError(f"{where}: {name}", config[name], f"the weights have {size}")
    place = folder.resolve()
    place = place.parent if re.fullmatch(r"seed\d+", place.name) else place
    return Loaded(plain.build(), Origin(_model(place), _hooks(place.name, transcode)), config)


def _check(where: Path, config: dict[str, object]) -> None:
    """Checks all fields.

    Raises: SettingError for a field that is refused or unknown, or has a value that is not read.
    """
    if config.get("skip_connection") and not config.get("transcode"):
        remedy = "goes past the code to the same activations: it is read with transcode alone"
        raise SettingError(f"{where}: skip_connection", True, remedy)
    for name, value in config.items():
        fields = (*HONOURED, *TRAINING)
        if name not in fields:
            remedy = f"is unknown{nearest(name, fields)}: delete it if it does not change what the "
            raise SettingError(f"{where}: {name}", value, f"{remedy}SAE computes")
    if config.get("activation", "topk") != "topk":
        remedy = "takes the largest latent of each group, which no reader here does: only topk is"
        raise SettingError(f"{where}: activation", config["activation"], remedy)
    if not isinstance(config.get("signed", False), bool):
        raise SettingError(f"{where}: signed", config["signed"], "use true or false")
    k = config.get("k")
    if type(k) is not int or k < 1:
        raise SettingError(f"{where}: k", k, "use a whole number of at least 1")


def _hook(module: str) -> str:
    """Converts a module's name to a hook point: the output of a block, or the name itself."""
    block = _BLOCK.fullmatch(module)
    return f"blocks.{block[1]}.hook_resid_post" if block else module if "." in module else ""


def _hooks(module: str, transcode: bool) -> str:
    """Returns the hook points that a folder's name stands for."""
    if not transcode:
        return _hook(module)
    mlp = _MLP.fullmatch(module)
    if mlp:
        block = f"blocks.{mlp[1]}"
        return describe_hooks([f"{block}.mlp.hook_in"], [f"{block}.hook_mlp_out"])
    return describe_hooks([f"{module}.input"], [module]) if "." in module else ""


def _model(place: Path) -> str:
    """Returns the model's name from the config.json of the run, '' if there is none."""
    run = place.parent / "config.json"
    return str(read_config(run).get("model") or "") if run.is_file() else ""
