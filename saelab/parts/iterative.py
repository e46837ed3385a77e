"""Demands of encoders that compare the input with the decoder's rows, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.parts.base import Dims
from saelab.parts.following import FollowsK, KConfig

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


class TiedPursuitConfig(KConfig):
    """Settings that pursuits share: k, and `free_norms`, which allows decoder rows of any norm."""

    free_norms: bool = False

    @property
    def companions(self) -> Mapping[str, Any]:
        return {"tied": True, "encoder_bias": False, "constraints": [{"kind": "unit_norm"}]}

    @property
    def takes_initial_l0(self) -> bool:
        return False


class TiedPursuit(FollowsK):
    """A pursuit: its encoder is the decoder, and it has no bias."""

    uses_weights: ClassVar[bool] = True
    shardable = "rows"

    def __init__(self, config: TiedPursuitConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.kind, self.free_norms = config.kind, config.free_norms

    def check(self, sae: SAE) -> None:
        """Checks that the SAE has no other encoder, and decoder rows of norm 1.

        Raises: SettingError where it is not so.
        """
        check_decoder_space(self.kind, sae)
        if not sae.config.tied:
            remedy = f"{self.kind} has no encoder but the decoder: set it to true"
            raise SettingError("tied", False, remedy)
        if sae.config.encoder_bias:
            raise SettingError(
                "encoder_bias", True, f"{self.kind} does not use it: set it to false"
            )
        fixed = any(part.fixes_decoder_norms for part in sae.config.constraints)
        if not (fixed or self.free_norms):
            remedy = (
                "needs decoder rows of norm 1: add the constraint 'unit_norm', or set it to true"
            )
            raise SettingError("free_norms", False, remedy)
        super().check(sae)


def row_blocks(u: Tensor) -> list[Tensor]:
    """Splits rows into blocks of `ROWS_AT_ONCE`; an empty batch is one empty block."""
    return list(torch.split(u, ROWS_AT_ONCE))
