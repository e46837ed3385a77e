"""Folders that saelab writes: sae.json and sae.safetensors (`saelab.checkpoint`)."""

from __future__ import annotations

from pathlib import Path

from saelab import checkpoint
from saelab.formats.base import Loaded, Origin

FILES = ("sae.json", "sae.safetensors")


def load(folder: Path) -> Loaded:
    """Loads a folder of `checkpoint.save`.

    Raises: SourceError and DamageError as `checkpoint.load`.
    """
    sae, about = checkpoint.load(folder)
    origin = Origin(str(about.get("model") or ""), str(about.get("hook_name") or ""))
    return Loaded(sae, origin, about)
