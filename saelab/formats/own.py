"""Folders that saelab writes: sae.json and sae.safetensors (`saelab.checkpoint`)."""

from __future__ import annotations

from pathlib import Path

from saelab import checkpoint
from saelab.errors import SourceError
from saelab.formats.base import MATRICES, Loaded, Origin

FILES = ("sae.json", "sae.safetensors")


def load(folder: Path) -> Loaded:
    """Loads a folder of `checkpoint.save`.

    Raises: SourceError and DamageError as `checkpoint.load`; SourceError for a weight that is not
        finite.
    """
    sae, about = checkpoint.load(folder)
    for name in (*MATRICES, "scale"):
        if not bool(getattr(sae, name).isfinite().all()):
            raise SourceError(f"{folder}: {name} holds a value that is not finite: train it again")
    origin = Origin(str(about.get("model") or ""), str(about.get("hook_name") or ""))
    return Loaded(sae, origin, about)
