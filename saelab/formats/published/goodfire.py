"""Goodfire's SAEs, one pickled state dict per repository; read only if the format is named.

    Llama-3.1-8B-Instruct-SAE-l19.pth, Llama-3.3-70B-Instruct-SAE-l50.pt
        encoder_linear.weight [d_sae, d_in], encoder_linear.bias [d_sae],
        decoder_linear.weight [d_in, d_sae], decoder_linear.bias [d_in]

    f = max(W_enc x + b_enc, 0)

The file's name says the model and the block whose output is encoded.
"""

from __future__ import annotations

from pathlib import Path

from saelab.formats.base import LinearNames, Loaded
from saelab.formats.published.shared import load_linear_file

PATTERN = r"(Llama-.+)-SAE-l(\d+)\.pth?"
NAMES = LinearNames(
    encoder="encoder_linear.weight",
    encoder_bias="encoder_linear.bias",
    decoder="decoder_linear.weight",
    decoder_bias="decoder_linear.bias",
)


def load(path: Path) -> Loaded:
    """Loads the file of an SAE, or a folder that holds one.

    Raises: SourceError when the file is not that of such an SAE.
    """
    return load_linear_file(path, PATTERN, NAMES, "meta-llama")
