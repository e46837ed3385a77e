"""Effect of a small change of a scalar on a trained SAE, without training it again.

    elasticity of m to s at change c:   (m(s (1 + c)) / m(s) - 1) / c

for FVU and L0 at each of `CHANGES`, for loss recovered at the two large ones. An elasticity of 1
means that 1% more of s gives 1% more of m. `sensitivity.<scalar>` sums up: the FVU's elasticity
that is largest in size. Each scalar is restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from saelab.errors import SettingError
from saelab.evals.base import ALWAYS_NAMED, Row, Subject, missing, number
from saelab.evals.core import CoreData, loss_recovered, measure_reconstruction
from saelab.parts.base import Part
from saelab.sae import SAE

DEFINITION = "sensitivity/1"
#: Changes of a scalar, as shares of its value; those that loss recovered is measured at.
CHANGES = (-0.10, -0.01, 0.01, 0.10)
LARGE = (-0.10, 0.10)
#: Held-out rows of an FVU and an L0. Our choice: all changes see the same rows, so few are enough.
ROWS = 2048


@torch.no_grad()
def evaluate_sensitivity(subject: Subject, data: CoreData) -> list[Row]:
    """Rows sensitivity.<scalar> and, by slice 'change=+10%', sensitivity.<scalar>.fvu, .l0 and
    .loss_recovered; missing with the reason where a scalar is absent or can't be changed."""
    scalars = scalars_of(subject)
    rows = [
        missing(f"sensitivity.{name}", DEFINITION, f"the subject has no {name}")
        for name in ALWAYS_NAMED
        if name not in scalars
    ]
    if not scalars:
        return rows
    before = _metrics(subject, data, with_loss=True)
    for name, part in scalars.items():
        rows += _of_scalar(subject, data, name, part, before)
    return rows


def scalars_of(subject: object) -> dict[str, Part]:
    """The scalars that shape a subject's code, and the part that each belongs to."""
    parts = subject.parts() if isinstance(subject, SAE) else []
    return {name: part for part in parts for name in part.stored()}


def _of_scalar(
    subject: Subject, data: CoreData, name: str, part: Part, before: dict[str, float]
) -> Iterator[Row]:
    metric = f"sensitivity.{name}"
    if not any(bool(place.tensor.any()) or place.link != "value" for place in part.stored()[name]):
        yield missing(metric, DEFINITION, f"{name} is 0, so that no share of it is a change")
        return
    largest = 0.0
    for change in CHANGES:
        where = f"change={change:+.0%}"
        try:
            with part.scale_temporarily(name, 1 + change):
                after = _metrics(subject, data, with_loss=change in LARGE)
        except SettingError as error:
            yield missing(f"{metric}.fvu", DEFINITION, str(error), where)
            continue
        for of, value in after.items():
            if before[of] == 0:
                yield missing(f"{metric}.{of}", DEFINITION, f"{of} is 0 before the change", where)
                continue
            elasticity = (value / before[of] - 1) / change
            yield number(f"{metric}.{of}", elasticity, DEFINITION, where)
            if of == "fvu" and abs(elasticity) > abs(largest):
                largest = elasticity
    yield number(metric, largest, DEFINITION)


def _metrics(subject: Subject, data: CoreData, with_loss: bool) -> dict[str, float]:
    measured = measure_reconstruction(subject, data, ROWS)
    metrics = {"fvu": measured.fvu, "l0": measured.l0}
    recovered = loss_recovered(subject, data.quick) if with_loss else None
    return metrics if recovered is None else metrics | {"loss_recovered": recovered}
