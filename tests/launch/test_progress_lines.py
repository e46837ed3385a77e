"""What a job says of its cells: often enough, the right numbers, and without touching them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import batches
from saelab.errors import CellFailure
from saelab.evals.base import Row
from saelab.launch import progress_lines
from saelab.launch.cell_key import Key
from saelab.launch.executors import JobSet
from saelab.launch.executors.local import run_jobs
from saelab.launch.jobs import TRAINING_SHARE, JobCell
from saelab.launch.progress_lines import LOGGED, POINTS, Reports
from saelab.progress import Progress
from saelab.progress.state import State
from saelab.runs.schema import CellId
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig

STEPS, SIZE = 330, 16
BASELINE = CellId("baseline", 3, 6.0)


def activations() -> MemorySource:
    x = torch.randn(44, 16, 8, generator=torch_stream(0, "synthetic activations"))
    return MemorySource([Shard(x, torch.ones(44, 16, dtype=torch.bool))] * 8, {})


def cells(source: MemorySource) -> list[Cell]:
    sae = SAEConfig.parse({"d_sae": 32, "controllers": [{"kind": "l0_target", "target": 6}]})
    training = TrainConfig.parse({"tokens": SIZE * STEPS, "batch_size": SIZE, "lr": 3e-3})
    sample = source.shard(0).rows()[0]
    return [Cell(f"{i}", sae, training, sample, i) for i in range(2)]


@pytest.fixture(scope="module")
def told() -> tuple[list[Cell], list[dict[str, Any]], float]:
    source, lines, amounts = activations(), [], []

    def advance(amount: float, line: dict[str, Any] | None = None) -> None:
        amounts.append(amount)
        lines.extend([] if line is None else [line])

    own = cells(source)
    said = Reports(own, [replace(BASELINE, seed=int(cell.name)) for cell in own], advance)
    train(own, batches(source, 0, SIZE, "rows"), said.steps)
    said.evaluating(own[0])
    failure = CellFailure("1", 7, "loss nan")
    rows = [Row("fvu", 0.25, "d"), Row("l0", 6.0, "d"), Row("fvu", 0.5, "d", slice="a")]
    said.done(own[0], rows, None)
    said.done(own[1], [], failure)
    return own, lines, sum(amounts)


def test_saying_where_cells_are_leaves_their_bits_alone(told) -> None:
    source = activations()
    silent = cells(source)
    train(silent, batches(source, 0, SIZE, "rows"))
    for one, other in zip(told[0], silent, strict=True):
        mine, theirs = one.sae.state_dict(), other.sae.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        for name, column in other.log.columns.items():
            np.testing.assert_array_equal(one.log.columns[name], column)


def test_each_line_holds_the_means_since_the_one_before(told) -> None:
    cell, lines, _ = told[0][0], told[1], told[2]
    own = [line for line in lines if line["seed"] == 0 and "values" in line][:-1]
    assert 5 < len(own) <= POINTS and own[-1]["step"] == STEPS
    since = 0
    for line in own:
        for name, column in LOGGED.items():
            expected = np.mean(cell.log.columns[column][since : line["step"]])
            assert line["values"][name] == float(expected)
        assert line["tokens"] == SIZE * line["step"] and line["rate"] > 0
        since = line["step"]


def test_the_first_line_says_from_which_step_a_cell_goes_on(told) -> None:
    fresh = [line["from_step"] for line in told[1] if "from_step" in line]
    assert fresh == [0, 0] == [line["step"] for line in told[1][:2]]
    goes_on = cells(activations())
    goes_on[1].restore(told[0][1].state())
    lines: list[Any] = []
    Reports(goes_on, [BASELINE, BASELINE], lambda amount, line=None: lines.append(line))
    assert [line["from_step"] for line in lines] == [0, STEPS]
    assert all("values" not in line for line in lines)


def test_never_more_than_a_hundred_lines(monkeypatch) -> None:
    """Also when a turn is a single step."""
    source, lines = activations(), []
    (cell, _) = cells(source)
    said = Reports([cell], [BASELINE], lambda amount, line=None: lines.append(line))
    for batch, _ in batches(source, 0, SIZE, "rows"):
        if cell.done:
            break
        cell.step(batch)
        said.steps(1, [cell])
    assert sum(line is not None and "values" in line for line in lines) == POINTS


def test_all_token_steps_are_counted_and_the_state_follows(told) -> None:
    _, lines, amount = told
    assert amount == pytest.approx(TRAINING_SHARE * 2 * SIZE * STEPS)
    state = State()
    for line in lines:
        state.fold({"time": 1.0, **line})
    assert not state.cells and (len(state.finished), state.failed) == (2, 1)
    done, failed = state.finished
    expected = {"fvu": 0.25, "l0": 6.0, "dead": None, "loss_recovered": None, "ce_rise": None}
    assert done.values == expected and done.step == STEPS
    assert "loss nan" in failed.failure


def test_a_control_is_named_as_one() -> None:
    key = Key(settings=[], data={}, code=[], machine={})
    control = JobCell(id=BASELINE, sae={}, train={}, key=key, control="PCA")
    found = progress_lines.line(control.display_id, "evaluate")
    assert (found["arm"], found["stage"], found["seed"]) == ("control:PCA", "evaluate", 3)


# ---------------------------------------------------------------- from a worker to the launch


def job(number: int, advance: Any, state: dict[str, Any]) -> None:
    """Says 500 amounts and 50 lines; the last ones right before it ends."""
    for i in range(500):
        advance(1.0)
        if i % 10 == 9:
            cell = replace(BASELINE, seed=number)
            line = progress_lines.line(cell, "train", step=i, values={"x": math.nan})
            advance(0.0, line)
    advance(0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_whatever_workers_say_arrives_in_order(tmp_path, monkeypatch, workers: int) -> None:
    from contextlib import nullcontext

    from saelab.launch.executors import local as executor

    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(executor, "log_progress", heard.append)
    bar = Progress("x", 1)
    run_jobs(
        JobSet(function=job, jobs=[1, 2, 3], workers=workers, logs=tmp_path, bar=nullcontext(bar))
    )
    assert bar.done == 1501.5
    for number in (1, 2, 3):
        steps = [line["step"] for line in heard if line["seed"] == number]
        assert steps == list(range(9, 500, 10))
