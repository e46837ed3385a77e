"""Trials of `plan cost --trials`: runs as they are predicted, and the table of both."""

from __future__ import annotations

import pytest

from saelab.data.activations.harvest import bytes_needed
from saelab.data.language_model import size
from saelab.preflight.calibration import (
    Compared,
    _harvest_trial,
    _run_alone,
    _step_seconds,
    trial_lines,
)
from saelab.study.plan import BaseConfig


def test_trials_name_the_worst_of_their_figures() -> None:
    results = [Compared("a", "s", 1.0, 1.1), Compared("b", "s", 1.0, 2.0)]
    assert results[1].error == -0.5
    assert trial_lines(results)[-1] == "worst: b, a factor of 2.00"


def test_a_trial_writes_what_is_predicted_for_the_disk() -> None:
    base = BaseConfig(context=32)
    (tokens, seconds, written), peak = _run_alone(_harvest_trial, base, 1000)
    assert tokens == 32 * 31
    predicted = bytes_needed(tokens, 32, size(base.model).d_model, "float32")
    assert written == pytest.approx(predicted, rel=0.01)
    assert seconds > 0 and peak > predicted


def test_the_step_of_a_trial_is_that_of_the_settings() -> None:
    topk = {"d_sae": 64, "activation": {"kind": "topk", "k": 8}, "controllers": []}
    for sae in (topk | {"losses": ["reconstruction"]}, {"d_sae": 64}):
        assert _step_seconds(BaseConfig.parse({"sae": sae}), 16, 8, 64, 6) > 0
