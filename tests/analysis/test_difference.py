"""The paired difference of two arms of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saelab import stats
from saelab.analysis.difference import difference
from saelab.cli import app
from saelab.errors import SettingError, SourceError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    values = {"a": [0.5, 0.4, 0.45, 0.6], "b": [0.52, 0.43, None], "c": [0.1]}
    info = {name: {"final_info_dict": {"fvu": row}} for name, row in values.items()}
    (tmp_path / "final_info.json").write_text(json.dumps(info))
    return tmp_path


def test_over_the_seeds_that_both_have(run: Path) -> None:
    found = difference(run, "a", "b")
    summary = stats.paired_summary([0.5 - 0.52, 0.4 - 0.43])
    assert (found.n, found.mean_diff) == (2, summary.mean)
    assert (found.low, found.high) == (summary.low, summary.high)
    said = CliRunner().invoke(app, ["difference", str(run), "a", "b"]).output
    assert "a - b, fvu: -0.0250" in said and "2 pairs" in said
    assert difference(run, "c", "a").low is None
    assert "one pair" in CliRunner().invoke(app, ["difference", str(run), "c", "a"]).output


def test_what_is_not_there_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no such arm"):
        difference(run, "a", "d")
    with pytest.raises(SettingError, match="not measured in both"):
        difference(run, "a", "b", "l0")
    with pytest.raises(SourceError, match="complete run"):
        difference(tmp_path / "none", "a", "b")
