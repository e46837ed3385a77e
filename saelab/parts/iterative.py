"""Demands of encoders that compare the input with the decoder's rows, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saelab.errors import SettingError

if TYPE_CHECKING:
    from saelab.sae import SAE

#: Rows that are encoded at once: their inner products with all latents stay in a core's cache.
ROWS_AT_ONCE = 256


def check_decoder_space(kind: str, sae: SAE) -> None:
    """Checks that the encoder's input is what the decoder reconstructs, but for b_dec.

    Raises: SettingError where it is not.
    """
    config = sae.config
    if sae.has_target:
        remedy = f"is another space than the input, but {kind} subtracts decoder rows from the "
        raise SettingError("target_hook", "set", f"{remedy}input: leave it out")
    if config.scaling is not None:
        remedy = f"scales the input, but {kind} subtracts decoder rows from it: leave it out"
        raise SettingError("scaling", config.scaling.kind, remedy)
    if not config.centre:
        remedy = f"leaves b_dec in the input, which {kind} would explain once more: set it to true"
        raise SettingError("centre", False, remedy)


def check_no_encoder(kind: str, free_norms: bool, sae: SAE) -> None:
    """Checks that an SAE whose encoder is its decoder has no other, and has rows of norm 1.

    Args:
        free_norms: whether rows of other norms are allowed.

    Raises: SettingError where it is not so.
    """
    check_decoder_space(kind, sae)
    if not sae.config.tied:
        raise SettingError("tied", False, f"{kind} has no encoder but the decoder: set it to true")
    if sae.config.encoder_bias:
        raise SettingError("encoder_bias", True, f"{kind} does not use it: set it to false")
    fixed = any(part.fixes_decoder_norms for part in sae.config.constraints)
    if not (fixed or free_norms):
        remedy = "needs decoder rows of norm 1: add the constraint 'unit_norm', or set it to true"
        raise SettingError("free_norms", False, remedy)


def row_blocks(u: Tensor) -> list[Tensor]:
    """Splits rows into blocks of `ROWS_AT_ONCE`; an empty batch is one empty block."""
    return list(torch.split(u, ROWS_AT_ONCE))
