"""Directories of dictionary_learning (0.1), which are read only if the format is named.

    config.json     trainer: dict_class, k, lm_name, submodule_name, layer
    ae.pt           a pickled state dict, read by torch.load(weights_only=True): tensors only

    AutoEncoder                            ReLU, centred; decoder norms folded, as its loader does
    AutoEncoderNew                         ReLU, not centred
    GatedAutoEncoder                       see formats/base.py
    AutoEncoderTopK                        k largest of a row
    BatchTopKSAE, MatryoshkaBatchTopKSAE   ReLU above the stored threshold
    JumpReluAutoEncoder                    thresholds, not centred

Activations that were normalised in training need no treatment: the trainer scales biases and
thresholds back before it saves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.errors import SettingError, SourceError, nearest
from saelab.formats.base import (
    MATRICES,
    LinearNames,
    Loaded,
    Plain,
    read_config,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.pickles import read_state_dict
from saelab.origin import Origin

FILES = CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = LinearNames().all[:3]
#: The name that the library's demo gives to the output of a block.
_BLOCK = re.compile(r"resid_post_layer_(\d+)")

Tensors = Mapping[str, Tensor]


def load(folder: Path) -> Loaded:
    """Loads a directory of dictionary_learning.

    Raises: SourceError when the files are not those of an SAE; SettingError for an unknown class.
    """
    where = folder / CONFIG
    trainer = read_config(where).get("trainer")
    if not isinstance(trainer, dict):
        raise SourceError(f"{where} has no 'trainer': name the folder that a trainer has saved")
    kind = str(trainer.get("dict_class"))
    if kind not in CLASSES:
        remedy = f"is not read: use one of {', '.join(CLASSES)}{nearest(kind, CLASSES)}"
        raise SettingError(f"{where}: trainer.dict_class", kind, remedy)
    tensors = read_state_dict(folder / WEIGHTS)
    with shape_errors_as_source_error(folder / WEIGHTS):
        plain = CLASSES[kind](tensors, folder / WEIGHTS).validate(folder / WEIGHTS)
    k = trainer.get("k")
    if plain.k is not None and k is not None and plain.k != k:
        raise SettingError(f"{where}: trainer.k", k, f"the weights have {plain.k}")
    return Loaded(plain.build(), _origin(trainer), trainer)


def _from_linear(tensors: Tensors, b_dec: str) -> Plain:
    return LinearNames(decoder_bias=b_dec).plain(tensors, centre=True)


def _read_relu(tensors: Tensors, where: Path) -> Plain:
    return _from_linear(take(tensors, (*LINEAR, "bias"), where), "bias").with_unit_decoder()


def _read_new_relu(tensors: Tensors, where: Path) -> Plain:
    return LinearNames().plain(take(tensors, LinearNames().all, where))


def _read_gated(tensors: Tensors, where: Path) -> Plain:
    names = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
    w_enc, decoder, b_dec, r_mag, b_gate, b_mag = take(tensors, names, where).values()
    return Plain(w_enc, b_mag, decoder.T, b_dec).with_gate(r_mag.exp(), b_gate, b_mag)


def _read_topk(tensors: Tensors, where: Path) -> Plain:
    tensors = take(tensors, (*LINEAR, "b_dec", "k", "threshold"), where)
    return replace(_from_linear(tensors, "b_dec"), k=int(tensors["k"]))


def _read_batchtopk(tensors: Tensors, where: Path) -> Plain:
    tensors = take(tensors, (*LINEAR, "b_dec", "k", "threshold"), where)
    return _with_threshold(_from_linear(tensors, "b_dec"), tensors["threshold"])


def _read_matryoshka(tensors: Tensors, where: Path) -> Plain:
    tensors = take(tensors, (*MATRICES, "k", "threshold", "group_sizes"), where)
    return _with_threshold(_from_matrices(tensors), tensors["threshold"])


def _read_jumprelu(tensors: Tensors, where: Path) -> Plain:
    tensors = take(tensors, (*MATRICES, "threshold"), where)
    return replace(_from_matrices(tensors), threshold=tensors["threshold"], centre=False)


def _from_matrices(tensors: Tensors) -> Plain:
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in MATRICES)
    return Plain(w_enc.T, b_enc, w_dec, b_dec)


def _with_threshold(plain: Plain, threshold: Tensor) -> Plain:
    return replace(plain, threshold=threshold.expand(plain.d_sae))


#: Class -> function that reads its tensors.
CLASSES: dict[str, Callable[[Tensors, Path], Plain]] = {
    "AutoEncoder": _read_relu,
    "AutoEncoderNew": _read_new_relu,
    "GatedAutoEncoder": _read_gated,
    "AutoEncoderTopK": _read_topk,
    "BatchTopKSAE": _read_batchtopk,
    "MatryoshkaBatchTopKSAE": _read_matryoshka,
    "JumpReluAutoEncoder": _read_jumprelu,
}


def _origin(trainer: Mapping[str, Any]) -> Origin:
    """Reads model and hook point from a trainer's settings."""
    submodule, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    block = _BLOCK.fullmatch(submodule)
    number = block[1] if block else layer if type(layer) is int and not submodule else None
    hook = "" if number is None else f"blocks.{number}.hook_resid_post"
    return Origin(str(trainer.get("lm_name") or ""), hook)
