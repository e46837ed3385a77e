"""The interface of evaluations: subject and data in, rows out.

A subject is anything with `encode` and `decode` in raw activation space: our SAE, a control, a
checkpoint of another tool. A `SparseSubject` gives codes without their zeros too. An evaluation
never changes its subject and draws random numbers only from the named stream 'evaluation'. Every
number leaves as a `Row`; a missing number is a row without a value and with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from saelab.errors import MismatchError
from saelab.kernels import Code
from saelab.runs.schema import CellId

#: Begins the reason of a row whose number came out infinite or undefined.
NOT_FINITE = "not finite"


#: Scalars that every cell has rows for, if only to say that it has none.
ALWAYS_NAMED = ("beta", "theta", "tau")


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        metric: its name, for example 'fvu' or 'sae_top_5_test_accuracy'.
        value: the number; None when it is missing.
        definition: id and version of how it is computed, for example 'core/1'.
        slice: the part of the data that it covers ('' for all), for example
            'entry=docs,class=email'.
        reason: why the value is missing; '' when it is present.
        arm, seed, level: the cell it belongs to, filled in by the launch.
    """

    metric: str
    value: float | None
    definition: str
    _: KW_ONLY
    slice: str = ""
    reason: str = ""
    arm: str = ""
    seed: int = -1
    level: float = 0.0

    def of_cell(self, cell: CellId) -> Row:
        """Returns the row with its cell filled in."""
        return replace(self, arm=cell.arm, seed=cell.seed, level=cell.level)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def number(metric: str, value: float, definition: str, slice: str = "") -> Row:
    """Builds the row of a value; one that is not finite becomes missing with that reason."""
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        return Row(metric, None, definition, slice=slice, reason=f"{NOT_FINITE} ({value})")
    return Row(metric, value, definition, slice=slice)


def missing(metric: str, definition: str, reason: str, slice: str = "") -> Row:
    """Builds the row of a number that can't be had."""
    return Row(metric, None, definition, slice=slice, reason=reason)


def other_definition(
    definition: str | None, reference: str | None, who: str = "the baseline"
) -> str:
    """Says why two numbers of one metric are not compared; '' when both have one definition."""
    if definition == reference and definition is not None:
        return ""
    return (
        f"measured as {definition!r}, {who} as {reference!r}: numbers of different definitions "
        "are not compared, so evaluate both in the same way"
    )


def check_one_definition(metric: str, definitions: Mapping[str, str]) -> None:
    """Refuses to compare numbers of one metric that are defined differently.

    Args:
        definitions: name of a subject -> definition id; subjects without a number are left out.

    Raises: MismatchError that names the metric, the subject that differs and the definitions.
    """
    first = next(iter(definitions), "")
    for name, definition in definitions.items():
        if why := other_definition(definition, definitions[first], first):
            raise MismatchError(f"{metric} of {name} is {why}")


def number_or_reason(metric: str, value: float | str, definition: str, slice: str = "") -> Row:
    """Builds the row of a number, or of the reason (a str) why there is none."""
    if isinstance(value, str):
        return missing(metric, definition, value, slice)
    return number(metric, value, definition, slice)


@runtime_checkable
class Subject(Protocol):
    """Any object that can be evaluated. All tensors are in raw activation space, float32.

    It may have `complete(x_hat, x)`, as `SAE` does: what it adds to a result of `decode`.
    """

    d_in: int
    d_sae: int

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encodes x [n, d_in] into a dense code [n, d_sae]."""
        ...

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Decodes f [n, d_sae] into a reconstruction [n, d_in], or [n, d_out] of a target."""
        ...


def complete(subject: Subject, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Adds to a decoded code what the subject takes from its input past the code, such as a skip
    connection.

    Args:
        x_hat: [n, d_out].
        x: the rows that were encoded, [n, d_in].
    """
    past = getattr(subject, "complete", None)
    return x_hat if past is None else past(x_hat, x)


class SkipAlone:
    """A subject without its code: what it reconstructs past it."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.d_in, self.d_sae = subject, subject.d_in, 1

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 1)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.subject.decode(f.new_zeros(1, self.subject.d_sae)).expand(len(f), -1)

    def complete(self, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return complete(self.subject, x_hat, x)


@runtime_checkable
class SparseSubject(Subject, Protocol):
    """Subject that also gives its code without zeros, and so is evaluated faster."""

    def codes(self, x: torch.Tensor) -> Iterator[tuple[slice, Code]]:
        """Encodes x [n, d_in] in blocks; yields each block's rows of x, in order, and its code."""
        ...

    def decode_code(self, code: Code) -> torch.Tensor:
        """Decodes a code of `codes` into a reconstruction [rows, d_in]."""
        ...

    def pooled(self, rows: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
        """Sums the code of rows [n, d_in] over segments; cuts int64 [m + 1] rise.

        Returns: float32 [m, d_sae]; row i is the sum of encode(rows)[cuts[i] : cuts[i + 1]].
        """
        ...


class TrainingLog(Protocol):
    """Named values of every step of a training.

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
    """Returns True if a token's code depends on the tokens before it.

    Such a subject is a `SparseSubject` whose `codes` and `pooled` take `starts` too: the first row
    of each run of consecutive tokens, and the number of rows; int64 [m + 1].
    """
    return bool(getattr(subject, "needs_contexts", False))
