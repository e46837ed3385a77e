"""Folders that saelab writes: sae.json and sae.safetensors (`saelab.checkpoint`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saelab import checkpoint
from saelab.errors import SourceError
from saelab.formats.base import MATRICES, Loaded
from saelab.origin import Origin
from saelab.sae import SAE

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
    odd = about.get("peculiarities")
    peculiarities = tuple(map(str, odd)) if isinstance(odd, list) else ()
    model, hook = (str(about.get(name) or "") for name in ("model", "hook_name"))
    return Loaded(sae, Origin(model, hook, peculiarities), about)


def save(sae: SAE, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes an SAE with all its state, see `SAE.save`."""
    sae.save(folder, about)
