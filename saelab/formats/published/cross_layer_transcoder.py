"""Layers of cross-layer transcoders: mntss/clt-..., and the folders `clt` of Gemma Scope 2.

    W_enc_{n}.safetensors   W_enc_{n} [d_sae, d_in], b_enc_{n} [d_sae], b_dec_{n} [d_out]
    W_dec_{n}.safetensors   W_dec_{n} [d_sae, layers - n, d_out]
    config.yaml             model_name, feature_input_hook, feature_output_hook

    clt/{name}[_affine]/params_layer_{n}.safetensors        of Gemma Scope 2, see `gemma_scope_2`
        w_enc [d_in, d_sae], b_enc, threshold [d_sae], w_dec [d_sae, layers, d_out], b_dec [d_out],
        affine_skip_connection [d_in, d_out] of some

Each layer has a code, f = max(z, 0) of mntss and max(z, 0) 1[z > threshold] of Gemma Scope 2 with
z = W_enc x_n + b_enc, and writes at its own MLP's output and at those of all later layers:

    y_hat_m = sum over n <= m of f_n W_dec_n,m, + b_dec_m + W_skip_m x_m

One file is one n. It is read with the targets n, n + 1 ...: one code, and its parts of these sums;
b_dec and the skip connection are parts of the first. SAELens' loader adds all targets up. A part of
a sum reconstructs nothing: `Origin` says so, and evaluations refuse it without --allow-mismatch.
The code is that of the layer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError, SourceError
from saelab.formats.base import (
    Loaded,
    Plain,
    floats,
    read_config,
    read_tensors,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.pickles import the_file
from saelab.formats.published import gemma_scope_2
from saelab.formats.published.shared import last_match, yaml_texts
from saelab.origin import Origin

PATTERN = r"W_(?:enc|dec)_(\d+)\.safetensors"
ENCODER = r"W_enc_(\d+)\.safetensors"
#: The two files of a layer, by its number in `PATTERN`.
BOTH = (r"W_enc_\1.safetensors", r"W_dec_\1.safetensors")
CONFIG = "config.yaml"
INPUT, OUTPUT = "feature_input_hook", "feature_output_hook"
GEMMA_PATTERN = r"params_layer_(\d+)\.safetensors"
PART = "is one layer of a cross-layer transcoder, whose outputs are parts of sums over layers"


def load(path: Path) -> Loaded:
    """Loads one layer of mntss' layout.

    Args:
        path: the file of its encoder or its decoder, or a folder with those of one layer.

    Raises: SourceError when the files are not those of such a layer.
    """
    if not path.is_dir():
        path = path.with_name(path.name.replace("W_dec_", "W_enc_"))
    file, name = the_file(path, ENCODER)
    n = int(name[1])
    names = [f"{tensor}_{n}" for tensor in ("W_enc", "b_enc", "b_dec")]
    w_enc, b_enc, b_dec = take(floats(read_tensors(file)), names, file).values()
    decoder = file.with_name(f"W_dec_{n}.safetensors")
    (w_dec,) = take(floats(read_tensors(decoder)), [f"W_dec_{n}"], decoder).values()
    with shape_errors_as_source_error(file):
        plain = _one_layer(Plain(w_enc, b_enc, w_dec, b_dec, centre=False), decoder)
        plain = plain.validate(file)
    config = yaml_texts(file.with_name(CONFIG), ("model_name", INPUT, OUTPUT))
    hooks = (config.get(INPUT, ""), config.get(OUTPUT, ""))
    return _loaded(plain, n, config.get("model_name", ""), hooks, config)


def load_gemma(path: Path) -> Loaded:
    """Loads one layer of Gemma Scope 2: its file, or a folder that holds one.

    Raises: SourceError when the file is not that of such a layer; SettingError for another
        architecture, and for a crosscoder, whose files have the same names.
    """
    file, name = the_file(path, GEMMA_PATTERN)
    n, where = int(name[1]), file.with_name(gemma_scope_2.CONFIG)
    config = read_config(where) if where.is_file() else {}
    gemma_scope_2.check_architecture(config, where)
    folder = last_match(r"/(clt|crosscoder)\w*/([^/]+)/[^/]+$", file)
    kind = str(config.get("type") or (folder[1] if folder else "")).lower()
    if kind != "clt":
        remedy = "only clt is read of files of this name: keep its repository's names"
        raise SettingError(f"{file}: type", kind or None, remedy)
    affine = config.get("affine_connection", bool(folder) and "affine" in folder[2])
    plain = gemma_scope_2.read_plain(file, bool(affine))
    with shape_errors_as_source_error(file):
        plain = _one_layer(plain, file, n).validate(file)
    name = gemma_scope_2.model({"model_name": gemma_scope_2.model_of_path(file), **config})
    return _loaded(plain, n, name, ("mlp.hook_in", "hook_mlp_out"), config)


def _one_layer(plain: Plain, where: Path, before: int = 0) -> Plain:
    """Returns the layer with one row of W_dec per latent, over all targets.

    Args:
        plain: its W_dec is [d_sae, targets, d_out], its b_dec and W_skip those of the first target.
        where: the file of W_dec, for messages.
        before: number of targets of W_dec that are layers before this one; they must be 0.

    Raises: SourceError when W_dec has another shape, or writes to layers before this one.
    """
    w_dec, skip = plain.W_dec, plain.W_skip
    if w_dec.dim() != 3 or w_dec.shape[1] <= before:
        shape = list(w_dec.shape)
        problem = f"W_dec has the shape {shape}, not [d_sae, targets, d_out]"
        raise SourceError(f"{where}: {problem}: save the layer again")
    if bool(w_dec[:, :before].any()):
        raise SourceError(f"{where}: W_dec writes to layers before {before}: save the layer again")
    w_dec = w_dec[:, before:]
    targets, d_out = w_dec.shape[1:]
    return replace(
        plain,
        W_dec=w_dec.flatten(1),
        b_dec=_padded(plain.b_dec, targets * d_out),
        W_skip=None if skip is None else _padded(skip, targets * d_out),
        target=True,
        targets=(d_out,) * targets if targets > 1 else (),
    )


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Returns the tensor with zeros after its first axis up to the size."""
    return torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])


def _loaded(
    plain: Plain, n: int, model: str, hooks: tuple[str, str], about: dict[str, Any]
) -> Loaded:
    """Returns the SAE of layer n; `hooks` are its places in a block, '' where none is recorded."""
    source, target = hooks
    written = [f"blocks.{n + i}.{target}" for i in range(len(plain.targets) or 1) if target]
    place = describe_hooks([f"blocks.{n}.{source}"], written) if source and target else ""
    return Loaded(plain.build(), Origin(model, place, peculiarities=(PART,)), dict(about))
