"""Attention SAEs of Kissane and Conmy on GPT-2 small; a pickled state dict, read only if named.

    {name}.pt           W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]
    {name}_cfg.json     act_name, act_size, dict_size

    f = max(W_enc (x - b_dec) + b_enc, 0)

x holds the outputs of all heads one after the other, which is the input of the module that projects
them back to the residual stream.
"""

from __future__ import annotations

import re
from pathlib import Path

from saelab.errors import SettingError
from saelab.formats.base import (
    MATRICES,
    Loaded,
    Plain,
    read_config,
    shape_errors_as_source_error,
    take,
)
from saelab.formats.pickles import read_state_dict, the_file
from saelab.origin import Origin

PATTERN = r"(gpt2-small_L\d+_Hcat_z_.+)\.pt"
MODEL = "openai-community/gpt2"


def load(path: Path) -> Loaded:
    """Loads the file of an SAE, or a folder that holds one.

    Raises: SourceError when the files are not those of such an SAE; SettingError when the
        configuration says another size than the weights have, or another place.
    """
    file, name = the_file(path, PATTERN)
    where = file.with_name(f"{name[1]}_cfg.json")
    config = read_config(where)
    tensors = take(read_state_dict(file), MATRICES, file)
    with shape_errors_as_source_error(file):
        w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in MATRICES)
        plain = Plain(w_enc.mT, b_enc, w_dec, b_dec).validate(file)
    for field, size in (("act_size", plain.d_in), ("dict_size", plain.d_sae)):
        if config.get(field, size) != size:
            raise SettingError(f"{where}: {field}", config[field], f"the weights have {size}")
    hook = str(config.get("act_name") or "")
    block = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", hook)
    if block is None:
        remedy = "only SAEs on the concatenated heads of a block (blocks.N.attn.hook_z) are read"
        raise SettingError(f"{where}: act_name", hook, remedy)
    origin = Origin(MODEL, f"transformer.h.{block[1]}.attn.c_proj.input")
    return Loaded(plain.build(), origin, config)
