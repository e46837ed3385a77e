"""Fine-tuning: training that starts from an SAE instead of random weights.

The SAE may come from anywhere (`saelab.load`). What computes its code and reconstruction stays:
size, activation, scaling, and the tensors of these. What trains it is of the new settings: losses,
controllers, constraints, observers and the optimiser, which start anew.

An SAE in raw units (scale 1, as other tools store them) is first brought to the units of training,
where E|x - mean|^2 = d: with the sample's scale c,

    W_enc <- c W_enc    b_enc, thresholds as they are    W_dec <- W_dec / c    b_dec <- b_dec / c

computes the same function of x, and learning rates and coefficients mean what they mean for an SAE
that is trained from the start.
"""

from __future__ import annotations

import hashlib
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.sae import SAE, SAEConfig, computes
from saelab.storage.atomic import digest

#: Settings that decide what the SAE computes; the start has them.
KEPT = ("d_sae", "activation", "scaling", "encoder_bias", "centre", "tied", "skip")


def fine_tuning_settings(start: SAE, training: SAEConfig) -> SAEConfig:
    """Returns the settings of an SAE that starts as `start` and is trained as `training` says."""
    stored = start.config.model_dump()
    changes: dict[str, Any] = {name: stored[name] for name in KEPT}
    return SAEConfig.parse({**training.model_dump(), **changes, "initial_l0": None})


def digest_of(sae: SAE) -> str:
    """Returns the digest of all that an SAE computes with."""
    computing = {n: t.contiguous() for n, t in sae.cpu().state_dict().items() if computes(n)}
    content = hashlib.sha256(safetensors.torch.save(computing)).hexdigest()
    return digest([sae.config.model_dump(mode="json"), sae.row_norm, content])


@torch.no_grad()
def start_from(sae: SAE, start: SAE) -> None:
    """Copies what computes code and reconstruction into a fresh SAE of `fine_tuning_settings`.

    Args:
        sae: initialised on a sample of the activations, in training mode.
        start: in evaluation mode.

    Raises: SettingError when the widths differ.
    """
    for name, ours, theirs in (
        ("d_in", sae.d_in, start.d_in),
        ("d_out", sae.d_out, start.d_out),
    ):
        if ours != theirs:
            remedy = f"the activations have {ours}: take the hook that the SAE was trained on"
            raise SettingError(name, theirs, remedy)
    scales = sae.scale.clone(), sae.out_scale.clone()
    stored = {n: t for n, t in start.state_dict().items() if computes(n)}
    sae.load_state_dict(sae.state_dict() | stored)
    sae.row_norm = start.row_norm
    raw = sae.scaling is None and bool((sae.scale == 1).all())
    if raw and not sae.config.tied and start.row_norm == "none":
        _to_training_units(sae, *scales)
    sae.check_parts()


def _to_training_units(sae: SAE, scale: Tensor, out_scale: Tensor) -> None:
    """Divides inputs and targets by these scales, and changes the weights to the same function."""
    sae.scale.copy_(scale)
    sae.out_scale.copy_(out_scale)
    sae.W_enc.mul_(scale)
    sae.W_dec.div_(out_scale)
    sae.b_dec.div_(out_scale)
    if sae.has_target:
        sae.centre.div_(scale)
    if sae.W_skip is not None:
        sae.W_skip.mul_(scale)
        sae.W_skip.div_(out_scale.reshape(-1, 1))
