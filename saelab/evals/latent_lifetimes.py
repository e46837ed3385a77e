"""Lifetimes of latents, from the counts of a trained SAE's observers.

    lifetime.survival     share of lives that outlast an age (a share of the run, 'age=0.25'): the
                          Kaplan-Meier estimate of `parts/lifetimes`
    lifetime.at_risk      lives that were observed up to the beginning of the last bin before it
    lifetime.median       the age, as a share of the run, that half of the lives do not outlast
    lifetime.deaths, lifetime.resamplings, resampling.count    numbers over the whole run

A part that resamples on a schedule and one that does so by age count together in resampling.count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saelab.evals.base import Row, missing, number
from saelab.parts.observers.lifetimes import BINS, Lifetimes
from saelab.parts.observers.resampling import Resampling
from saelab.sae import SAE

DEFINITION = "survival/1"
LIFETIME = ("lifetime.deaths", "lifetime.resamplings", "lifetime.median")
COUNT = "resampling.count"
#: Ages at which the survival curve is given, evenly spaced over the run. Our choice.
AGES = 20


def survival_rows(subject: object) -> list[Row]:
    """The rows of one trained subject."""
    if not isinstance(subject, SAE):
        reason = "only an SAE made of parts counts its latents' lives"
        return [missing(name, DEFINITION, reason) for name in (*LIFETIME, COUNT)]
    parts = subject.observer_parts()
    lives = next((part for part in parts if isinstance(part, Lifetimes)), None)
    resets = next((part for part in parts if isinstance(part, Resampling)), None)
    return [*_lifetimes(lives), _count(lives, resets)]


def _lifetimes(lives: Lifetimes | None) -> Iterator[Row]:
    if lives is None:
        yield from (missing(name, DEFINITION, "no part follows lifetimes") for name in LIFETIME)
        return
    survival, at_risk = lives.survival()
    step = BINS // AGES
    for last in range(step - 1, BINS, step):
        where, value = f"age={(last + 1) / BINS:.2f}", float(survival[last])
        if at_risk[last]:
            yield number("lifetime.survival", value, DEFINITION, where)
        else:
            reason = "no life was observed up to that age"
            yield missing("lifetime.survival", DEFINITION, reason, where)
        yield number("lifetime.at_risk", float(at_risk[last]), DEFINITION, where)
    yield number(LIFETIME[0], float(lives.deaths.sum()), DEFINITION)
    yield number(LIFETIME[1], float(lives.resamplings.sum()), DEFINITION)
    half = torch.nonzero(survival <= 0.5)
    if len(half):
        yield number(LIFETIME[2], (int(half[0]) + 1) / BINS, DEFINITION)
    else:
        reason = "more than half of the lives outlast every age that was observed"
        yield missing(LIFETIME[2], DEFINITION, reason)


def _count(lives: Lifetimes | None, resets: Resampling | None) -> Row:
    if lives is not None:  # is told of every latent that starts afresh, whoever resampled it
        return number(COUNT, float(lives.resamplings.sum()), DEFINITION)
    if resets is not None:
        return number(COUNT, float(resets.resets), DEFINITION)
    return missing(COUNT, DEFINITION, "nothing is resampled in this SAE")
