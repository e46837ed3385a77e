"""Lifetimes of latents, from the counts of a trained SAE's observers.

    lifetime.survival     share of lives that outlast an age (a share of the run, 'age=0.25'): the
                          Kaplan-Meier estimate of the observer
    lifetime.at_risk      lives that were observed up to the beginning of the last bin before it
    lifetime.median       the age, as a share of the run, that half of the lives do not outlast
    lifetime.deaths, lifetime.resamplings, resampling.count    numbers over the whole run

A part that resamples on a schedule and one that does so by age count together in resampling.count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saelab.evals.base import Row, missing, number
from saelab.parts.base import Lives
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
    lives = next((lives for part in parts if (lives := part.lives()) is not None), None)
    resets = [resets for part in parts if (resets := part.resampled()) is not None]
    return [*_lifetimes(lives), _count(resets)]


def _lifetimes(lives: Lives | None) -> Iterator[Row]:
    if lives is None:
        yield from (missing(name, DEFINITION, "no part follows lifetimes") for name in LIFETIME)
        return
    survival, bins = lives.survival, len(lives.survival)
    step = bins // AGES
    for last in range(step - 1, bins, step):
        where, value = f"age={(last + 1) / bins:.2f}", float(survival[last])
        if lives.at_risk[last]:
            yield number("lifetime.survival", value, DEFINITION, where)
        else:
            reason = "no life was observed up to that age"
            yield missing("lifetime.survival", DEFINITION, reason, where)
        yield number("lifetime.at_risk", float(lives.at_risk[last]), DEFINITION, where)
    yield number(LIFETIME[0], float(lives.deaths), DEFINITION)
    yield number(LIFETIME[1], float(lives.resamplings), DEFINITION)
    half = torch.nonzero(survival <= 0.5)
    if len(half):
        yield number(LIFETIME[2], (int(half[0]) + 1) / bins, DEFINITION)
    else:
        reason = "more than half of the lives outlast every age that was observed"
        yield missing(LIFETIME[2], DEFINITION, reason)


def _count(resets: list[int]) -> Row:
    """The largest count: a part may count the resets that others have asked for too."""
    if resets:
        return number(COUNT, float(max(resets)), DEFINITION)
    return missing(COUNT, DEFINITION, "nothing is resampled in this SAE")
