"""The forest plot: settings with their intervals, the mean, and the prediction interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from pictures import panel, picture, words
from run_folders import ARMS, write_run

from saelab.report.figure_data import Arrays, scene
from saelab.report.figures.forest import forest
from saelab.report.run_data import Run, load
from saelab.verdict.across_settings import AcrossSettings, judge_across
from saelab.verdict.judge import Comparison


def comparison(arm: str, diff: float | None) -> Comparison:
    numbers = {} if diff is None else {"low": diff - 0.002, "high": diff + 0.002, "se": 0.0008}
    reason = "" if diff is not None else "the L0 is off"
    return Comparison(
        arm=arm, metric="fvu", mean_diff=diff, level=0.05, sesoi=0.005, exploratory=True,
        word="refused" if diff is None else "hurts", reason=reason, **numbers,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load(write_run(tmp_path / "run_1", ARMS, seeds=3))


def over(*diffs: float | None) -> list[AcrossSettings]:
    groups = {f"s{i}": [comparison(arm, d) for arm in ARMS[1:3]] for i, d in enumerate(diffs)}
    return judge_across(groups, "lower")


def bars(axes: object) -> dict[float, tuple[float, float]]:
    """Line -> both ends of the interval that is drawn there."""
    found = {}
    for lines in axes.collections:  # type: ignore[attr-defined]
        assert isinstance(lines, LineCollection)
        for (low, y), (high, _) in lines.get_segments():
            found[round(float(y), 3)] = (float(low), float(high))
    return found


def test_every_interval_is_drawn_in_its_line(run: Run) -> None:
    across = over(0.010, 0.012, 0.017)
    figure = picture(replace(run, across=across), "forest")
    axes = panel(figure, ARMS[1])
    a = across[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("s0", "s1", "s2", "mean", "a new setting")
    ]
    drawn = bars(axes)
    assert drawn[0] == pytest.approx((0.008, 0.012)) and len(drawn) == 5
    assert drawn[3] == pytest.approx((a.low, a.high))
    assert drawn[4] == pytest.approx((a.new_low, a.new_high))
    diamond = next(line for line in axes.lines if line.get_marker() == "D")
    assert np.ravel(diamond.get_xdata()) == pytest.approx([0.013])
    assert "for a new one: cannot tell yet 2" in words(figure)
    assert scene(figure, run.arms, Arrays())["panels"]  # the page draws it again


def test_what_is_missing_is_said(run: Run) -> None:
    figure = picture(replace(run, across=over(0.010, 0.012, None)), "forest")
    assert len(bars(panel(figure, ARMS[1]))) == 2
    assert "in s2 (the L0 is off)" in words(figure) and "3 are needed" in words(figure)


def test_a_run_without_settings_has_no_such_picture(run: Run) -> None:
    assert forest(run) == ""
