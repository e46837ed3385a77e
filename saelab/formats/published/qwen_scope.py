"""Qwen Scope, one pickled dictionary per layer; read only if the format is named.

    SAE-Res-{model}-W{thousands}K-L0_{k}/layer{n}.sae.pt
        W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_in, d_sae], b_dec [d_in]

    f = max(W_enc x + b_enc, 0) at the k largest of a row

k, the width and the model are only in the name of the repository, so the file must lie in a folder
of that name (or in the hub's cache).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from saelab.errors import SettingError, SourceError
from saelab.formats.base import (
    LinearNames,
    Loaded,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.pickles import read_state_dict, the_file
from saelab.formats.published.shared import block_output, last_match
from saelab.origin import Origin
from saelab.runtime.counting import count

PATTERN = r"layer(\d+)\.sae\.pt"
NAMES = LinearNames(encoder="W_enc", encoder_bias="b_enc", decoder="W_dec", decoder_bias="b_dec")
_REPOSITORY = r"SAE-Res-([^/]+)-W(\d+)K-L0_(\d+)(?=/)"


def load(path: Path) -> Loaded:
    """Loads the file of a layer, or a folder that holds one.

    Raises: SourceError when the file is not that of such an SAE, or its path does not say k;
        SettingError when the path says another width than the weights have.
    """
    file, name = the_file(path, PATTERN)
    repository = last_match(_REPOSITORY, file)
    if repository is None:
        remedy = "put it into a folder named like its repository (SAE-Res-...-W32K-L0_50)"
        raise SourceError(f"{file}: k is only in the name of the repository: {remedy}")
    model, thousands, k = repository.groups()
    tensors = take(read_state_dict(file), NAMES.all, file)
    with shape_errors_as_source_error(file):
        plain = replace(NAMES.plain(tensors), k=int(k)).validate(file)
    if plain.d_sae != int(thousands) * 1024:
        remedy = f"the weights have {count(plain.d_sae, 'latent')}: name their repository's folder"
        raise SettingError(f"{file}: width", f"W{thousands}K", remedy)
    return Loaded(plain.build(), Origin(f"Qwen/{model}", block_output(name[1])), {"k": int(k)})
