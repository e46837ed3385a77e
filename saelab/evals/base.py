"""What an evaluation is: subject and data in, rows out.

A subject is anything with `encode` and `decode` in raw activation space: our SAE, a control, a
peer's checkpoint. One that is also a `SparseSubject` is asked for codes without their zeros. An
evaluation never changes its subject and draws random numbers only from the named stream
'evaluation'. Every number leaves as a `Row`; a missing number is a row without a value and with a
reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from saelab.errors import MismatchError
from saelab.kernels import Code

#: What the reason of a row begins with whose number came out infinite or undefined.
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        metric: its name, for example 'fvu' or 'sae_top_5_test_accuracy'.
        value: the number; None when it is missing.
        definition: id and version of how it is computed, for example 'core/1'.
        slice: what part of the data it covers ('' for all), for example 'entry=docs,class=email'.
        reason: why the value is missing; '' when it is there.
        arm, seed, level: the cell it belongs to, filled in by the study.
    """

    metric: str
    value: float | None
    definition: str
    slice: str = ""
    reason: str = ""
    arm: str = ""
    seed: int = -1
    level: float = 0.0

    def of_cell(self, arm: str, seed: int, level: float) -> Row:
        return replace(self, arm=arm, seed=seed, level=level)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def number(metric: str, value: float, definition: str, slice: str = "") -> Row:
    """A row for `value`; a value that is not finite becomes a missing one with that reason."""
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        return Row(metric, None, definition, slice, reason=f"{NOT_FINITE} ({value})")
    return Row(metric, value, definition, slice)


def missing(metric: str, definition: str, reason: str, slice: str = "") -> Row:
    return Row(metric, None, definition, slice, reason=reason)


def other_definition(own: str | None, reference: str | None, who: str = "the baseline") -> str:
    """Why two numbers of one metric are not compared; '' when both have one definition."""
    if own == reference and own is not None:
        return ""
    return (
        f"measured as {own!r}, {who} as {reference!r}: numbers of different definitions "
        "are not compared, so evaluate both in the same way"
    )


def check_one_definition(metric: str, definitions: Mapping[str, str]) -> None:
    """To be called wherever numbers of one metric are put beside each other.

    Args:
        definitions: who is compared -> definition id; whoever has no number is left out.

    Raises: MismatchError that names the metric, who differs and the definitions.
    """
    first = next(iter(definitions), "")
    for name, definition in definitions.items():
        if why := other_definition(definition, definitions[first], first):
            raise MismatchError(f"{metric} of {name} is {why}")


def number_or_reason(metric: str, found: float | str, definition: str, slice: str = "") -> Row:
    """A row for what was found: a number, or the reason why there is none."""
    if isinstance(found, str):
        return missing(metric, definition, found, slice)
    return number(metric, found, definition, slice)


@runtime_checkable
class Subject(Protocol):
    """Anything that can be evaluated. All tensors are in raw activation space, float32."""

    d_in: int
    d_sae: int

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, d_in] -> dense code [n, d_sae]."""
        ...

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """f [n, d_sae] -> reconstruction [n, d_in]."""
        ...


@runtime_checkable
class SparseSubject(Subject, Protocol):
    """A subject that gives its code without zeros too, and so is evaluated faster."""

    def codes(self, x: torch.Tensor) -> Iterator[tuple[slice, Code]]:
        """x [n, d_in] -> rows of x, in order, and their code; some rows at a time."""
        ...

    def decode_code(self, code: Code) -> torch.Tensor:
        """What `codes` gave -> reconstruction in raw activation space [rows, d_in]."""
        ...

    def pooled(self, rows: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
        """Rows [n, d_in] and rising cuts int64 [m + 1] -> sums of the code over each segment.

        Row i of the result, float32 [m, d_sae], is the sum of encode(rows)[cuts[i] : cuts[i + 1]].
        """
        ...


class TrainingLog(Protocol):
    """What an evaluation may read of a training: the named values of every step.

    `columns` holds arrays [steps] of which the first `length` entries are filled; `loss` is the
    reconstruction loss, float64 [length].
    """

    columns: dict[str, np.ndarray]
    length: int

    @property
    def loss(self) -> np.ndarray: ...


class Snapshots(Protocol):
    """Decoders saved during a training.

    `tokens` of the run when each was taken, rising, the last at the end; `decoders` are their rows
    [d_sae, d_in], of any length. Both are empty where none were taken.
    """

    tokens: list[int]
    decoders: list[torch.Tensor]


@dataclass(frozen=True)
class Training:
    """The training of one cell, as its launch has it.

    Args:
        log: of its steps.
        stopped: step at which training failed; None for a finished cell.
        snapshots: None for a subject without decoder rows.
        settled: tokens at which warm-up ends.
    """

    log: TrainingLog
    stopped: int | None = None
    snapshots: Snapshots | None = None
    settled: float = 0.0


#: One cell's side of a comparison with another seed: metric -> bin of firing frequency -> sum and
#: number of its latents' matched cosines.
SeedPair = Mapping[str, Mapping[str, tuple[float, int]]]


def needs_contexts(subject: object) -> bool:
    """Whether a token's code depends on the tokens before it.

    Such a subject is a `SparseSubject` whose `codes` and `pooled` take `starts` too: where each run
    of tokens that follow each other begins in the rows, and their number; int64 [m + 1].
    """
    return bool(getattr(subject, "needs_contexts", False))
