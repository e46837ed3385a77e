"""Checkpoints of sparsify (`sparsify.SparseCoder.save_to_disk`, 1.3.3).

    cfg.json            k, activation, transcode, skip_connection, num_latents, d_in
    sae.safetensors     encoder.weight, W_dec [d_sae, d_in], encoder.bias [d_sae], b_dec [d_in]

    f = max(W_enc (x - b_dec) + b_enc, 0) at the k largest of a row

With `transcode` it reads the input of the module and reconstructs its output: b_dec is then not
subtracted. `skip_connection` adds W_skip x (tensor W_skip [d_in, d_in]).

The folder is named after the module whose output is encoded ('layers.3', 'h.3'). The folder above
may hold the run's config.json with the model's name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError, nearest
from saelab.formats.base import Loaded, Origin, Plain, read_config, read_tensors, take

FILES = CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
#: Fields that are honoured, and those that are used only in training.
HONOURED = ("activation", "k", "d_in", "transcode", "skip_connection")
TRAINING = ("expansion_factor", "num_latents", "normalize_decoder", "multi_topk")
#: Field -> why an SAE that uses it is refused; false means that it is not used.
REFUSED = {
    "signed": "selects latents by their magnitude, which no part here computes",
}
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
    plain = Plain(w_enc, b_enc, w_dec, b_dec, k=config["k"])
    transcode = bool(config.get("transcode"))
    if transcode:
        skip = tensors["W_skip"].float() if "W_skip" in tensors else None
        plain = replace(plain, centre=False, target=True, W_skip=skip)
    plain = plain.validate(folder / WEIGHTS)
    for name, size in (("d_in", plain.d_in), ("num_latents", plain.d_sae)):
        if config.get(name, size) not in (size, 0):  # 0: d_in times the expansion factor
            raise SettingError(f"{where}: {name}", config[name], f"the weights have {size}")
    return Loaded(plain.build(), Origin(_model(folder), _hooks(folder, transcode)), config)


def _check(where: Path, config: dict[str, object]) -> None:
    """Checks all fields.

    Raises: SettingError for a field that is refused or unknown, or has a value that is not read.
    """
    if config.get("skip_connection") and not config.get("transcode"):
        remedy = "goes past the code to the same activations: it is read with transcode alone"
        raise SettingError(f"{where}: skip_connection", True, remedy)
    for name, value in config.items():
        if name in REFUSED and value:
            raise SettingError(f"{where}: {name}", value, f"{REFUSED[name]}: it is not read")
        fields = (*HONOURED, *TRAINING, *REFUSED)
        if name not in fields:
            remedy = f"is unknown{nearest(name, fields)}: delete it if it does not change what the "
            raise SettingError(f"{where}: {name}", value, f"{remedy}SAE computes")
    if config.get("activation", "topk") != "topk":
        remedy = "no part here takes the largest latent of each group: only topk is read"
        raise SettingError(f"{where}: activation", config["activation"], remedy)
    k = config.get("k")
    if type(k) is not int or k < 1:
        raise SettingError(f"{where}: k", k, "use a whole number of at least 1")


def _hook(module: str) -> str:
    """Converts a module's name to a hook point: the output of a block, or the name itself."""
    block = _BLOCK.fullmatch(module)
    return f"blocks.{block[1]}.hook_resid_post" if block else module if "." in module else ""


def _hooks(folder: Path, transcode: bool) -> str:
    """Returns the hook points that a folder's name stands for."""
    module = folder.resolve().name
    if not transcode:
        return _hook(module)
    mlp = _MLP.fullmatch(module)
    if mlp:
        block = f"blocks.{mlp[1]}"
        return describe_hooks([f"{block}.mlp.hook_in"], [f"{block}.hook_mlp_out"])
    return describe_hooks([f"{module}.input"], [module]) if "." in module else ""


def _model(folder: Path) -> str:
    """Returns the model's name from the config.json of the run, '' if there is none."""
    run = folder.resolve().parent / "config.json"
    return str(read_config(run).get("model") or "") if run.is_file() else ""
