"""Looks of the gate's checks: what they search for in the facts of one cell, see `gate.CHECKS`.

A check's look takes facts and threshold and yields (subject, observation) for each finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from saelab.errors import SettingError
from saelab.runs.schema import MOVED, MOVED_SPREAD, REACH

Facts = Mapping[str, float | str | None]
Hits = Iterator[tuple[str, str]]

#: Weights above this are the arm's fault. Our choice: they start at about 1, and a reconstruction
#: leaves the range of float32 only where some weight is above 1e9.
EXPLODED = 1e9
#: A model predicts a text badly when its loss is above this share of its loss with zeros at the
#: hook. Our choice: the embedded model is at 0.2 on its own kind of text.
BADLY = 0.5
#: A scalar is not inert where it moved farther than this many times the standard deviation of its
#: distance over seeds. Our choice: the distance of pure noise is 1.3 of them on average.
ALIKE = 4.0


def number(facts: Facts, name: str) -> float | None:
    """Reads a fact as a finite number; None where it is missing or not finite."""
    value = facts.get(name)
    if isinstance(value, str):
        raise SettingError(name, value, "this fact must be a number or None")
    return None if value is None or not math.isfinite(value) else float(value)


def flag(facts: Facts, name: str) -> bool:
    return bool(number(facts, name))


def above(fact: str, what: str, unit: str = "") -> Callable[[Facts, float], Hits]:
    """Makes a check that fires when the fact is larger than the threshold."""

    def look(facts: Facts, threshold: float) -> Hits:
        value = number(facts, fact)
        if value is not None and value > threshold:
            yield "", f"{what} is {value:.6g}{unit} (limit: at most {threshold:g})"

    return look


def at_most(fact: str, what: str, unit: str = "") -> Callable[[Facts, float], Hits]:
    """Makes a check that fires when the fact is not larger than the threshold."""

    def look(facts: Facts, threshold: float) -> Hits:
        value = number(facts, fact)
        if value is not None and value <= threshold:
            yield "", f"{what} is {value:.6g}{unit} (limit: above {threshold:g})"

    return look


def below(fact: str, what: str) -> Callable[[Facts, float], Hits]:
    """Makes a check that fires when the fact is smaller than the threshold."""

    def look(facts: Facts, threshold: float) -> Hits:
        value = number(facts, fact)
        if value is not None and value < threshold:
            yield "", f"{what} is {value:.6g} (limit: at least {threshold:g})"

    return look


def ratio(fact: str, to: str, what: str, than: str) -> Callable[[Facts, float], Hits]:
    """Makes a check that fires when fact / to is larger than the threshold."""

    def look(facts: Facts, threshold: float) -> Hits:
        value, base = number(facts, fact), number(facts, to)
        if value is not None and base and value > threshold * base:
            yield "", f"{what} is {value:.6g} (limit: {threshold:g} x {than}, {base:g})"

    return look


def unless(
    excuse: Callable[[Facts], bool], look: Callable[[Facts, float], Hits]
) -> Callable[[Facts, float], Hits]:
    """Makes a check silent where another fact excuses it."""
    return lambda facts, threshold: iter(()) if excuse(facts) else look(facts, threshold)


def find_zero_weights(facts: Facts, _: float) -> Hits:
    began = number(facts, "l0_at_start") or 0.0  # a code that fired came from weights above zero
    if flag(facts, "weights_zero") and not (began > 0 or has_diverged(facts)):
        yield "", "the encoder's or the decoder's weights are all zero"


def find_hook_mismatch(facts: Facts, _: float) -> Hits:
    names = ("hook_sae", "hook_activations", "hook_evaluation")
    hooks = {name: facts[name] for name in names if facts.get(name) is not None}
    if len(set(hooks.values())) > 1:
        names = ", ".join(f"{name.removeprefix('hook_')} {hook}" for name, hook in hooks.items())
        yield "", f"hooks are not the same ({names})"


def find_not_finite(facts: Facts, _: float) -> Hits:
    numbers = {k: v for k, v in facts.items() if isinstance(v, (int, float))}
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    bad += [str(names)] if (names := facts.get("not_finite")) else []  # missing rows have no value
    if bad and not has_diverged(facts):
        yield "", f"measured numbers are not finite ({', '.join(bad)})"


def find_nonfinite_step(facts: Facts, _: float) -> Hits:
    step = number(facts, "nonfinite_step")
    if step is not None:
        yield "", f"the loss or a gradient is not finite at step {step:.0f}"


def has_diverged(facts: Facts) -> bool:
    """Returns whether training stopped at a number that is not finite, maybe at its first step, or
    left weights from which only such numbers can come."""
    largest = number(facts, "largest_weight")
    exploded = largest is not None and largest > EXPLODED
    return facts.get("nonfinite_step") is not None or exploded


def find_constant_probing(facts: Facts, _: float) -> Hits:
    if flag(facts, "probing_constant"):
        yield "", "every probing task scores exactly its class prior"


def arm_died(facts: Facts) -> bool:
    """Returns whether the arm failed, which is a separate finding and explains the probes."""
    at_zero = ("l0", "code_std", "explained_variance")
    values = [value for name in at_zero if (value := number(facts, name)) is not None]
    return has_diverged(facts) or any(value <= 0 for value in values)


def predicts_badly(facts: Facts) -> bool:
    """Returns whether the unchanged model's loss on the text is a large share of its loss without
    the hook's activations."""
    clean, ablated = number(facts, "ce_clean"), number(facts, "ce_zero")
    return clean is not None and ablated is not None and clean > BADLY * ablated


def find_loss_recovered(facts: Facts, threshold: float) -> Hits:
    value = number(facts, "loss_recovered")
    if value is None or value <= threshold:
        return
    clean, spliced = number(facts, "ce_clean"), number(facts, "ce_spliced")
    losses = ""
    if clean is not None and spliced is not None:
        losses = (
            f", from a loss of {spliced:.4g} nats with the reconstruction and {clean:.4g} without"
        )
    yield "", f"loss recovered is {value:.6g}{losses} (limit: at most {threshold:g})"


def find_control_band(facts: Facts, _: float) -> Hits:
    value = number(facts, "probing_accuracy")
    low, high = number(facts, "random_control_low"), number(facts, "random_control_high")
    if value is not None and low is not None and high is not None and low <= value <= high:
        band = f"{low:.4g} to {high:.4g}"
        yield "", f"probing accuracy {value:.4g} lies in the band of the random controls, {band}"


def find_worse_than_linear(facts: Facts, _: float) -> Hits:
    value, linear = (
        number(facts, name) for name in ("explained_variance", "linear_explained_variance")
    )
    if value is not None and linear is not None and value < linear:
        yield "", f"explained variance is {value:.4g}, that of the linear map {linear:.4g}"


def find_repeated_data(facts: Facts, _: float) -> Hits:
    passes, planned = number(facts, "data_passes"), number(facts, "planned_passes")
    if passes is not None and planned is not None and passes > planned:
        yield "", f"the data was read {passes:.3g} times (planned: {planned:.3g})"


def find_inert(facts: Facts, threshold: float) -> Hits:
    for name in facts:
        reach = number(facts, name) if name.startswith(REACH) else None
        if reach is not None and reach < threshold:
            scalar = name.removeprefix(REACH)
            if not moves_alike(facts, scalar):
                text = f"the learned {scalar} moved {reach:.1%} of its reach"
                yield scalar, f"{text} (limit: {threshold:.0%})"


def moves_alike(facts: Facts, scalar: str) -> bool:
    """Returns whether the seeds moved a scalar so much more alike than noise would that a short
    way is no standstill; the sign of the way does not count."""
    moved, spread = number(facts, f"{MOVED}{scalar}"), number(facts, f"{MOVED_SPREAD}{scalar}")
    return moved is not None and spread is not None and moved > ALIKE * spread and moved > 0


def find_collapsed(facts: Facts, threshold: float) -> Hits:
    share = number(facts, "alpha_outside_share")
    if share is not None and share > threshold:
        text = f"alpha lay outside [0.02, 0.98] for {share:.1%} of the steps"
        yield "alpha", f"{text} (limit: {threshold:.0%})"
