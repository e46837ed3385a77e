"""The share of the way from the random code to the clean model, of every subject of a run.

    loss recovered from the random code = (CE_random - CE_spliced) / (CE_random - CE_clean)

CE_random is CE_spliced of the run's control 'untrained', the baseline at its initialisation and at
the plan's L0; the same number for cells of all levels. Loss recovered has zeros for its start, a
bad one: a code that was never trained recovers most of what they lose.

The rows are made of those that the subjects have, so they need no measurement, and older runs have
them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from saelab.runs.schema import UNTRAINED, control_arm

#: Metric of the share, and of the loss that it starts from.
SHARE, RANDOM = "loss_recovered_random", "ce_random"
#: Why there is no share where no launch has measured a random code.
NO_RANDOM_CODE = (
    "no random code was measured on this text: a launch measures one, its control 'untrained'"
)
#: Relative difference up to which the losses of two subjects are those of the same contexts.
SAME_LOSS = 1e-5
#: Losses of a subject that are needed, in nats per token.
_LOSSES = ("ce_clean", "ce_zero", "ce_spliced")

_Losses = Mapping[str, float | None]
_Row = Mapping[str, Any]


def random_code(rows: Iterable[_Row]) -> _Losses | str:
    """Returns the losses of a run's random code, or the reason why it has none.

    Args:
        rows: of metrics.parquet.
    """
    name = control_arm(UNTRAINED)
    losses = _losses(row for row in rows if row["arm"] == name)
    return losses if losses.get("ce_spliced") is not None else NO_RANDOM_CODE


def complete_losses(rows: Sequence[_Row], random: _Losses | str | None = None) -> list[Any]:
    """Adds rows of the rise of the loss, of the loss with the random code and of the share, next to
    those of loss recovered; rows that are there are left as they are.

    Args:
        rows: plain data, as `Row.as_dict` or metrics.parquet has it, also an older version's.
        random: losses of the random code, or why there are none; None takes those of the rows.
    """
    random = random_code(rows) if random is None else random
    subjects: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        if not row["slice"]:
            subjects.setdefault(_subject(row), []).append(row)
    complete: list[dict[str, Any]] = []
    for row in rows:
        complete.append(dict(row))
        if row["metric"] == "loss_recovered" and not row["slice"]:
            members = subjects[_subject(row)]
            there = {member["metric"] for member in members}
            new = _further(row, _losses(members), random)
            complete += (one for one in new if one["metric"] not in there)
    return complete


def _further(row: _Row, losses: _Losses, random: _Losses | str) -> Iterator[dict[str, Any]]:
    """Yields the rows that belong next to a subject's loss recovered."""
    clean, spliced = losses.get("ce_clean"), losses.get("ce_spliced")
    if clean is not None and spliced is not None:
        yield {**row, "metric": "ce_rise", "value": spliced - clean, "reason": ""}
    elif row["value"] is None and row["reason"]:
        random = str(row["reason"])  # which is that of all its losses
    loss = _loss_of_random_code(losses, random)
    definition = f"{row['definition'].rpartition('/')[0]}/random/1"
    for metric, value in ((RANDOM, loss), (SHARE, _share(losses, loss))):
        known = not isinstance(value, str)
        number, reason = (value, "") if known else (None, value)
        yield {**row, "metric": metric, "value": number, "definition": definition} | {
            "reason": reason
        }


def _share(losses: _Losses, loss: float | str) -> float | str:
    """Returns the share of the way, or the reason why there is none.

    Args:
        losses: of the subject.
        loss: with the random code, or why there is none.
    """
    if isinstance(loss, str):
        return loss
    clean, spliced = losses.get("ce_clean"), losses.get("ce_spliced")
    if clean is None or spliced is None:
        return "the loss with the reconstruction is missing"
    if loss <= clean:
        apart = f"{RANDOM} - ce_clean = {loss - clean:.4f} nats"
        return f"the random code does not hurt the model ({apart})"
    return (loss - spliced) / (loss - clean)


def _loss_of_random_code(losses: _Losses, random: _Losses | str) -> float | str:
    """Returns the loss with the random code, or why there is none for this subject: both must have
    been measured on the same contexts of the same model, at the same place."""
    if isinstance(random, str):
        return random
    if (spliced := random.get("ce_spliced")) is None:
        return NO_RANDOM_CODE
    for name in ("ce_clean", "ce_zero"):
        here, there = losses.get(name), random.get(name)
        if here is None or there is None or abs(here - there) > SAME_LOSS * abs(there):
            where = "with another model, text or hook"
            numbers = f"{name} is {_nats(there)} there, {_nats(here)} here"
            return f"the random code was measured {where} ({numbers})"
    return spliced


def _nats(loss: float | None) -> str:
    return "missing" if loss is None else f"{loss:.4f} nats"


def _subject(row: _Row) -> tuple[Any, ...]:
    return row["arm"], row["seed"], row["level"]


def _losses(rows: Iterable[_Row]) -> _Losses:
    return {r["metric"]: r["value"] for r in rows if r["metric"] in _LOSSES and not r["slice"]}
