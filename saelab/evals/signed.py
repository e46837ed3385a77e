"""Signed codes as codes of one sign, for evaluations that ask which latents fire.

    f' = (max(f, 0), max(-f, 0))      decoder rows w' = (w, -w)      f' w' = f w

A latent of a signed code fires in two directions, and may stand for a feature in each. Counted as
two latents it is matched once for each sign, the L0 stays the same, and nothing depends on which
of its directions is called positive.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from saelab.evals.base import Subject, needs_contexts


class OneSided:
    """A signed subject as one with twice as many latents, none of which is negative."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.d_in, self.d_sae = subject.d_in, 2 * subject.d_sae
        self.needs_contexts = needs_contexts(subject)

    def encode(self, x: Tensor, *starts: Tensor) -> Tensor:
        f = self.subject.encode(x, *starts)
        return torch.cat([f.clamp_min(0), (-f).clamp_min(0)], dim=1)

    def decode(self, f: Tensor) -> Tensor:
        up, down = f.tensor_split(2, dim=1)
        return self.subject.decode(up - down)


def is_signed(subject: object) -> bool:
    """Says whether codes of the subject may be negative."""
    return bool(getattr(subject, "signed", False))


def one_sided(subject: Subject) -> Subject:
    """Returns a subject without negative codes: itself, or a signed one in two halves."""
    return cast(Subject, OneSided(subject)) if is_signed(subject) else subject
