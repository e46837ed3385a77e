"""Gemma Scope: SAEs and transcoders on Gemma 2, as the repositories
google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders} hold them.

    layer_{n}/width_{w}/average_l0_{l}/params.npz, embedding/width_4k/average_l0_{l}/params.npz
        W_enc [d_in, d_sae], b_enc, threshold [d_sae], W_dec [d_sae, d_in], b_dec [d_in]

    z = W_enc x + b_enc        f = max(z, 0) 1[z > threshold]

The SAEs on embeddings were trained on sqrt(d_in) times less: W_enc / sqrt(d_in) and
W_dec sqrt(d_in), but b_dec as it is (so does SAELens' loader). A transcoder's file has the same
arrays, so the repository's name in the path decides what it is. Its input is the MLP's after the
norm and before the norm's gain, says SAELens (TransformerLens' ln2.hook_normalized).
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from saelab.data.hook_names import describe_hooks
from saelab.errors import SettingError, SourceError
from saelab.formats.base import (
    MATRICES,
    Loaded,
    Plain,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.npz import read_arrays
from saelab.formats.published.shared import block_output, last_match, place
from saelab.origin import Origin

FILES = (WEIGHTS,) = ("params.npz",)
_REPOSITORY = r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)\b"
#: Kind of a repository -> hook point of its SAEs in block n.
HOOKS = {
    "res": block_output("{n}"),
    "mlp": "blocks.{n}.hook_mlp_out",
    "att": "model.layers.{n}.self_attn.o_proj.input",
    "transcoders": describe_hooks(["blocks.{n}.ln2.hook_normalized"], ["blocks.{n}.hook_mlp_out"]),
}


def load(folder: Path) -> Loaded:
    """Loads the directory of one SAE or transcoder.

    Raises: SourceError when the file is not that of an SAE, or the path does not say which of the
        two it is; SettingError for a scaling factor that is used.
    """
    where = folder / WEIGHTS
    repository = last_match(_REPOSITORY, folder)
    if repository is None:
        remedy = "keep the names of its folders (gemma-scope-2b-pt-res/layer_20/...)"
        raise SourceError(f"{where}: only the path says whether it is a transcoder: {remedy}")
    size, tuning, kind = repository.groups()
    inner = place(folder)[repository.end() :]
    tensors = _take(read_arrays(where), where)
    with shape_errors_as_source_error(where):
        w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in MATRICES)
        plain = Plain(w_enc.mT, b_enc, w_dec, b_dec, centre=False, threshold=tensors["threshold"])
        plain = replace(plain, target=kind == "transcoders").validate(where)
    if kind == "res" and "embedding" in inner:
        plain = _from_embedding(plain)
    model = f"google/gemma-2-{size}" + "-it" * (tuning == "it")
    return Loaded(plain.build(), Origin(model, _hook(kind, inner)), {"repository": repository[0]})


def _take(arrays: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Returns the arrays of an SAE under their present names.

    Raises: SourceError as `take`; SettingError for a scaling factor that is not all 1.
    """
    tensors = {re.sub(r"^w_", "W_", name): array for name, array in arrays.items()}
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        remedy = "multiplies the code by a learned factor, which is not read"
        raise SettingError(f"{where}: scaling_factor", "not all 1", remedy)
    return take(tensors, (*MATRICES, "threshold"), where)


def _from_embedding(plain: Plain) -> Plain:
    root = math.sqrt(plain.d_in)
    return replace(plain, W_enc=plain.W_enc / root, W_dec=plain.W_dec * root)


def _hook(kind: str, inner: str) -> str:
    """Returns the hook point of a folder below the repository's; '' where it does not say it."""
    if "embedding" in inner:
        return "hook_embed"
    layer = re.search(r"layer_(\d+)", inner)
    return HOOKS[kind].format(n=layer[1]) if layer else ""
