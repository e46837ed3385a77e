"""The losses in nats and the share of the way from the random code, next to loss recovered."""

from __future__ import annotations

from typing import Any

import pytest

from saelab.runs.random_code import NO_RANDOM_CODE, complete_losses, random_code
from saelab.runs.schema import UNTRAINED, control_arm
from saelab.verdict.losses_in_nats import losses_of_run

CLEAN, ZERO, RANDOM, SPLICED = 3.0, 11.0, 4.0, 3.25


def subject(arm: str, spliced: float | None, reason: str = "", **others: float) -> list[Any]:
    """Rows of one subject, as core gives them; `others` replaces its losses."""
    losses = {"ce_clean": CLEAN, "ce_zero": ZERO, "ce_spliced": spliced} | others
    recovered = None if spliced is None else (ZERO - spliced) / (ZERO - CLEAN)
    values = losses | {"loss_recovered": recovered, "loss_recovered_mean": recovered}
    if spliced is None:
        values = dict.fromkeys(values)
    cell = {"arm": arm, "seed": 1, "level": 32.0, "slice": "", "definition": "core/1"}
    return [cell | {"metric": m, "value": v, "reason": reason} for m, v in values.items()]


def found(rows: list[Any], arm: str) -> dict[str, Any]:
    return {row["metric"]: row for row in rows if row["arm"] == arm}


UNTRAINED_ROWS = subject(control_arm(UNTRAINED), RANDOM)


def test_the_share_is_that_of_the_way_from_the_random_code_to_the_clean_model() -> None:
    rows = complete_losses([*subject("A1", SPLICED), *UNTRAINED_ROWS])
    of_arm, of_random = found(rows, "A1"), found(rows, control_arm(UNTRAINED))
    assert of_arm["ce_rise"]["value"] == pytest.approx(0.25)
    assert of_arm["ce_random"]["value"] == RANDOM
    assert of_arm["loss_recovered_random"]["value"] == pytest.approx(0.75)
    assert of_arm["loss_recovered_random"]["definition"] == "core/random/1"
    assert of_arm["loss_recovered"]["value"] == pytest.approx(0.96875)  # as it was
    assert of_random["loss_recovered_random"]["value"] == 0
    metrics = [row["metric"] for row in rows if row["arm"] == "A1"]
    first = metrics.index("loss_recovered")
    assert metrics[first + 1 : first + 4] == ["ce_rise", "ce_random", "loss_recovered_random"]
    assert complete_losses(rows) == rows  # made once


def test_without_a_random_code_the_share_is_missing_and_says_why() -> None:
    of_arm = found(complete_losses(subject("A1", SPLICED)), "A1")
    for metric in ("ce_random", "loss_recovered_random"):
        assert of_arm[metric]["value"] is None and of_arm[metric]["reason"] == NO_RANDOM_CODE
    assert of_arm["ce_rise"]["value"] == pytest.approx(0.25)


def test_where_no_loss_can_be_measured_the_share_has_the_same_reason() -> None:
    reason = "the model has no language-model head"
    rows = complete_losses([*subject("A1", None, reason), *UNTRAINED_ROWS])
    assert found(rows, "A1")["loss_recovered_random"]["reason"] == reason
    assert "ce_rise" not in found(rows, "A1")  # core's row, which says so too


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (subject("A1", SPLICED, ce_clean=2.9), "with another model, text or hook (ce_clean is 3."),
        (subject("A1", SPLICED, ce_zero=9.0), "(ce_zero is 11.0000 nats there, 9.0000 nats here)"),
    ],
)
def test_a_random_code_of_other_text_or_another_place_is_not_used(
    rows: list[Any], reason: str
) -> None:
    row = found(complete_losses([*rows, *UNTRAINED_ROWS]), "A1")["loss_recovered_random"]
    assert row["value"] is None and reason in row["reason"]


def test_a_random_code_that_does_not_hurt_is_no_start() -> None:
    rows = [*subject("A1", SPLICED), *subject(control_arm(UNTRAINED), 2.99)]
    row = found(complete_losses(rows), "A1")["loss_recovered_random"]
    assert row["value"] is None
    assert row["reason"] == "the random code does not hurt the model (ce_random - ce_clean = " + (
        "-0.0100 nats)"
    )


def test_the_line_names_every_loss_or_why_it_is_missing() -> None:
    losses = losses_of_run(complete_losses([*subject("A1", SPLICED), *UNTRAINED_ROWS]))
    assert losses is not None
    line = "loss of the language model in nats per token: clean 3, with zeros at the hook 11"
    assert losses.line() == f"{line}, with the random code (untrained) 4"
    alone = losses_of_run(complete_losses(subject("A1", SPLICED)))
    assert alone is not None
    assert alone.line() == f"{line}, with the random code missing ({NO_RANDOM_CODE})"
    assert losses_of_run(complete_losses(subject("A1", None, "none"))) is None


def test_a_run_names_its_random_code() -> None:
    losses = random_code([*subject("A1", SPLICED), *UNTRAINED_ROWS])
    assert losses == {"ce_clean": CLEAN, "ce_zero": ZERO, "ce_spliced": RANDOM}
    assert random_code(subject("A1", SPLICED)) == NO_RANDOM_CODE
