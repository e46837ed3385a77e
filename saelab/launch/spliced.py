"""The language model for losses that ask for it, as the settings of a launch name it."""

from __future__ import annotations

from saelab.data import language_model
from saelab.study.plan import BaseConfig
from saelab.training.spliced_model import SplicedModel, needs_model


def spliced_model(base: BaseConfig, device: str) -> SplicedModel | None:
    """Loads the language model where a loss of the settings reads its output.

    Returns: None where none does, or where the activations were made elsewhere.
    """
    sae = base.sae.outline(d_out=2 if base.target_hooks else None)
    if not needs_model(sae) or base.activations is not None:
        return None
    model = language_model.load(base.model.patched({"device": device}))
    return SplicedModel(model, base.output_hooks)
