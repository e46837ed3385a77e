"""Activations as other tools know them: a function of pre-activations, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pursuit:
    """Matching pursuit over the decoder's rows (`saelab.parts.activations.matching_pursuit`).

    Args:
        steps: the most of a row.
        residual_threshold: a row's pursuit ends when its residual is shorter; 0 never ends it.
        stops_at_repeats: whether it ends when a latent is chosen again.
    """

    steps: int
    residual_threshold: float = 0.0
    stops_at_repeats: bool = False


@dataclass(frozen=True)
class Form:
    """Activation as other tools know it, a function of one row's pre-activations z:

        f = gain z + shift      where it is above 0 and z above the threshold, else 0
        f = max(z, 0)           at the k largest z of the row, else 0
        f = z                   at the k largest |z| of the row, else 0, where it is signed

    or a pursuit of the centred input over the decoder's rows, which has no pre-activations.

    Args:
        threshold: [d_sae] or 0-dim; None where 0 is the only one.
        k: active latents per row; then there is nothing else but `signed`.
        affine: gain (> 0) and shift, [d_sae] each; None for 1 and 0.
        signed: whether the k are the largest in size and keep their signs.
        pursuit: steps of a matching pursuit; then there is nothing else.

    Raises: ValueError for settings that do not go together.
    """

    threshold: Tensor | None = None
    k: int | None = None
    affine: tuple[Tensor, Tensor] | None = None
    signed: bool = False
    pursuit: Pursuit | None = None

    def __post_init__(self) -> None:
        of_z = self.threshold is not None or self.k is not None or self.affine is not None
        if self.pursuit is not None and of_z:
            raise ValueError("a pursuit has no pre-activations, and so no threshold and no k")
        if self.k is not None and not (self.threshold is None and self.affine is None):
            raise ValueError("a form with a k has no threshold and no affine map")
        if self.signed and self.k is None:
            raise ValueError("a signed form needs a k")
        if self.affine is not None and not bool((self.affine[0] > 0).all()):
            raise ValueError("the gains of a form must be positive")

    def code(self, z: Tensor) -> Tensor:
        """The code of pre-activations; [n, d_sae] both.

        Raises: ValueError for a pursuit, which has none.
        """
        if self.pursuit is not None:
            raise ValueError("a pursuit has no pre-activations: build the SAE and encode rows")
        if self.signed:
            latents = z.abs().topk(self.k or 0, dim=-1).indices
            return torch.zeros_like(z).scatter(-1, latents, z.gather(-1, latents))
        if self.k is not None:
            values, latents = z.topk(self.k, dim=-1)
            return torch.zeros_like(z).scatter(-1, latents, torch.relu(values))
        f = torch.relu(z if self.affine is None else z * self.affine[0] + self.affine[1])
        return f if self.threshold is None else f * (z > self.threshold)


@dataclass(frozen=True)
class Refusal:
    """The reason why no other tool computes an activation, as the end of a sentence about it.

    Raises: ValueError where the reason is empty.
    """

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("a refusal needs its reason")
