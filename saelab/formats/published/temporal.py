"""Temporal SAEs of canrager/temporalSAEs, which are recognised and refused.

    conf.yaml, latest_ckpt.safetensors

Attention over the codes of earlier tokens predicts a part of the code, and the reconstruction needs
this part: no function of one row's code gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from saelab.errors import SettingError

FILES = CONFIG, WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"


def load(folder: Path) -> NoReturn:
    """Raises: SettingError, always."""
    remedy = "is not read: its reconstruction needs the tokens before, which no decoder here sees"
    raise SettingError(f"{folder}: architecture", "temporal", remedy)
