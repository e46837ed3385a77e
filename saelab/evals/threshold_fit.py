"""Share of the differences between features' thresholds or gains that variance alone explains.

    log |t_i| = a + s log v_i        over features that each have a threshold (or gain)

At the threshold t_i is that of latent i, v_i the variance of its pre-activation, and the implied
temperature is s; at the input t_j multiplies dimension j, v_j is its variance, and the temperature
is -s. R^2 is the share of the differences that one global pair could explain. Latents that never
fire here are left out. A latent whose encoder row is c times as long has c times the pre-activation
and the threshold, so that differences of length alone give s = 0.5.

    spread    standard deviation over features of log variance, before and after they are scaled

of the encoder's input before and after its scaling, or of the pre-activations before and after the
division by the unit u of a tied threshold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saelab.evals.base import Row, Subject, missing, number
from saelab.evals.core import CoreData
from saelab.parts.base import log_spread
from saelab.sae import SAE

DEFINITION = "consistency/1"
FIT = ("temperature", "r2", "slope", "intercept")
SPREAD = ("before", "after")
#: Held-out rows that variances are taken over, and points of a fit that get rows. Our choice.
ROWS, POINTS = 8192, 128


@torch.no_grad()
def evaluate_consistency(subject: Subject, data: CoreData) -> list[Row]:
    """Computes the rows of the fit and of the spread.

    Returns: consistency.temperature, .r2, .slope and .intercept; `POINTS` features of the fit as
        consistency.variance and .threshold (slice 'latent=7'); spread.before and spread.after.
    """
    if not isinstance(subject, SAE):
        reason = "only an SAE made of parts has thresholds and scalings"
        return [*_no_fit(reason), *_no_spread(reason)]
    x = data.rows[0][:ROWS].to(data.device)
    return [*_fit(subject, x), *_spread(subject, x)]


def _no_fit(reason: str) -> list[Row]:
    return [missing(f"consistency.{name}", DEFINITION, reason) for name in FIT]


def _no_spread(reason: str) -> list[Row]:
    return [missing(f"spread.{name}", DEFINITION, reason) for name in SPREAD]


# ---- the fit -----------------------------------------------------------------------------------


def _fit(sae: SAE, x: Tensor) -> list[Row]:
    fitted = _thresholds(sae, x) or _gains(sae)
    if fitted is None:
        return _no_fit("no threshold or gain of this SAE is learned feature by feature")
    variance, threshold, sign = fitted
    usable = (variance > 0) & (threshold != 0)
    features = usable.nonzero()[:, 0]
    log_v, log_t = (part[usable].double().abs().log() for part in (variance, threshold))
    if len(features) < 3 or float(log_v.std()) == 0:
        return _no_fit(f"{len(features)} features have a variance: a line needs 3 different ones")
    slope, intercept, r2 = _line(log_v, log_t)
    values = dict(zip(FIT, (sign * slope, r2, slope, intercept), strict=True))
    rows = [number(f"consistency.{name}", value, DEFINITION) for name, value in values.items()]
    ranked = log_v.argsort()
    for i in ranked[
        torch.linspace(0, len(ranked) - 1, min(POINTS, len(ranked)), dtype=torch.float32).long()
    ].tolist():
        where = f"latent={int(features[i])}"
        rows.append(number("consistency.variance", float(log_v[i].exp()), DEFINITION, where))
        rows.append(number("consistency.threshold", float(log_t[i].exp()), DEFINITION, where))
    return rows


def _line(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the least-squares line; R^2 of a constant y is 0."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    total = float(dy @ dy)
    r2 = 1 - float((dy - slope * dx).square().sum()) / total if total > 0 else 0.0
    return slope, float(y.mean()) - slope * float(x.mean()), r2


def _thresholds(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Variance of each latent's pre-activation, its threshold (0 for one that never fires here),
    both [d_sae], and 1; None where the thresholds are not learned latent by latent."""
    parameters = sae.activation.parameters()
    learned = [p for p in parameters if p.requires_grad and p.shape == (sae.d_sae,)]
    floor = sae.activation.initial_floor()
    if not learned or floor is None or floor.dim() == 0:
        return None
    z = _preactivations(sae, x)
    fires = (z > floor).any(0)
    return z.var(0, correction=0), floor * fires, 1.0


def _gains(sae: SAE) -> tuple[Tensor, Tensor, float] | None:
    """Variance of each input dimension, what it is multiplied by, and -1; as `_thresholds`."""
    gains = None if sae.scaling is None else sae.scaling.learned_gains()
    return None if gains is None else (*gains, -1.0)


def _preactivations(sae: SAE, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(sae.encoder_input(x), sae.W_enc, sae.b_enc)


# ---- the spread --------------------------------------------------------------------------------


def _spread(sae: SAE, x: Tensor) -> Iterator[Row]:
    unit = sae.activation.latent_scale()
    if unit is not None:
        before = _preactivations(sae, x)
        after = before / unit
    elif sae.scaling is not None:
        before, after = x, sae.encoder_input(x)
    else:
        yield from _no_spread("nothing is scaled in this SAE")
        return
    for name, part in zip(SPREAD, (before, after), strict=True):
        yield number(f"spread.{name}", float(log_spread(part.var(0, correction=0))), DEFINITION)
