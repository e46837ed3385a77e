"""The SAE of qresearch on DeepSeek-R1-Distill-Llama-8B, a pickled state dict; read only if named.

    DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt
        encoder.weight [d_sae, d_in], encoder.bias [d_sae],
        decoder.weight [d_in, d_sae], decoder.bias [d_in]

    f = max(W_enc x + b_enc, 0)

The file's name says the model and the block whose output is encoded.
"""

from __future__ import annotations

from pathlib import Path

from saelab.formats.base import LinearNames, Loaded
from saelab.formats.published.shared import load_linear_file

PATTERN = r"(DeepSeek-R1-.+)-SAE-l(\d+)\.pt"
NAMES = LinearNames()


def load(path: Path) -> Loaded:
    """Loads the file of an SAE, or a folder that holds one.

    Raises: SourceError when the file is not that of such an SAE.
    """
    return load_linear_file(path, PATTERN, NAMES, "deepseek-ai")
