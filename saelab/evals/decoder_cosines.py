"""Largest cosine of each latent's decoder row with another one's.

Where codes are signed a row stands for its negative too, and the cosine counts without its sign.

Rows: decoder.max_cosine, its mean over latents, and with a slice ('cosine=0.35') the share of
latents whose largest cosine lies in [0.35, 0.40); the lowest bin holds all below it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.evals.base import Row, Subject, missing, number
from saelab.evals.dictionary_matching import largest_cosines
from saelab.evals.measure import EvalData
from saelab.sae import SAE

DEFINITION = "decoder/1"
METRIC = "decoder.max_cosine"
#: Bins from 0 to 1. Our choice.
BINS = 20


def evaluate_decoder(subject: Subject, _: EvalData) -> list[Row]:
    """Computes the rows of one subject."""
    if not isinstance(subject, SAE):
        return decoder_rows(None)
    return decoder_rows(largest_cosines(subject.W_dec, absolute=subject.signed))


def decoder_rows(largest: Tensor | None) -> list[Row]:
    """Builds the rows of the largest cosines [d_sae] of `largest_cosines`; None for a subject whose
    decoder is not made of rows."""
    if largest is None:
        return [missing(METRIC, DEFINITION, "only an SAE made of parts has decoder rows")]
    # a cosine that is 0.35 up to rounding belongs to the bin at 0.35
    index = (largest.double() * BINS + 1e-6).floor().long().clamp(0, BINS - 1)
    counts = torch.bincount(index, minlength=BINS).tolist()
    rows = [number(METRIC, float(largest.double().mean()), DEFINITION)]
    for i, count in enumerate(counts):
        rows.append(number(METRIC, count / len(largest), DEFINITION, f"cosine={i / BINS:.2f}"))
    return rows
