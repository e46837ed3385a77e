"""Published transcoders, which are recognised and refused.

layer_{n}.safetensors                               mwhanna/qwen3-...-transcoders, one per layer
W_enc_{n}.safetensors, W_dec_{n}.safetensors        mntss/clt-...: one layer of a transcoder whose
                                                    outputs are parts of sums over layers
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from saelab.errors import SettingError

PER_LAYER = r"layer_\d+\.safetensors"
CROSS_LAYER = r"W_(?:enc|dec)_\d+\.safetensors"


def load(path: Path) -> NoReturn:
    """Raises: SettingError, always."""
    remedy = "reconstructs other activations than it reads: only autoencoders are read"
    raise SettingError(f"{path}: architecture", "transcoder", remedy)
