"""A run's sparse probing by entry."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from saelab import stats
from saelab.analysis.probing_table import by_entry
from saelab.cli import app
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.runs.folder import seal_run

HALF = float(stats.t_interval([0.7, 0.8])[1]) - 0.75


def rows() -> list[dict[str, object]]:
    def of(arm: str, seed: int, metric: str, value: float | None, where: str = "", **other: object):
        made = {"arm": arm, "seed": seed, "level": 0.0, "metric": metric, "slice": where}
        return {**made, "value": value, "reason": "", "definition": "d/1", **other}

    one, five = "sae_top_1_test_accuracy", "sae_top_5_test_accuracy"
    return [
        *(of("baseline", seed, "fvu", 0.1) for seed in (3, 4)),
        *(of("baseline", s, "loss_recovered", None, reason="no head") for s in (3, 4)),
        of("baseline", 3, one, 0.7, "entry=news"),
        of("baseline", 4, one, 0.8, "entry=news"),
        of("baseline", 3, one, 0.9, "entry=news,class=sport"),
        of("baseline", 3, five, 0.6, "position=0-31,entry=news"),
        of("baseline", 5, one, 0.1, "entry=news", level=16.0),
        of("baseline", 3, five, 0.9),
        of("baseline", 4, five, None, reason="not finite"),
        of("control:model channels", -1, "llm_top_1_test_accuracy", 0.625, "entry=news"),
        of("control:untrained", 3, one, 0.5, "entry=news"),
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "metrics.parquet")
    told = {"target_l0": None, "base": {"context": 128}, "data": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    return tmp_path


def test_means_over_the_seeds_of_an_arm_at_the_plans_level(run: Path) -> None:
    found = {(r["subject"], r["metric"], r["slice"]): r for r in by_entry(run)["rows"]}
    news = found["baseline", "sae_top_1_test_accuracy", "entry=news"]
    assert (news["values"], news["definition"]) == ([0.7, 0.8], "d/1")
    assert (news["mean"], news["half_width"]) == pytest.approx((0.75, HALF))
    assert not any("class=" in where or "position=" in where for _, _, where in found)
    alone = found["control:untrained", "sae_top_1_test_accuracy", "entry=news"]
    assert (alone["mean"], alone["half_width"]) == (0.5, None)


def test_a_mean_with_a_missing_seed_is_missing_with_the_reason(run: Path) -> None:
    found = {(r["metric"], r["slice"]): r for r in by_entry(run)["rows"]}
    assert found["sae_top_5_test_accuracy", ""]["mean"] is None
    assert found["sae_top_5_test_accuracy", ""]["reason"] == "not finite"


def test_numbers_of_two_definitions_are_not_put_side_by_side(run: Path) -> None:
    table = rows()
    table[-1]["definition"] = "d/2"
    pq.write_table(pa.Table.from_pylist(table), run / "metrics.parquet")
    with pytest.raises(MismatchError, match="of control:untrained, seed 3 is .*d/2"):
        by_entry(run)


def test_what_is_printed(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    ended = CliRunner().invoke(app, ["probing", str(run), "--table", str(table)])
    assert ended.exit_code == 0
    assert json.loads(table.read_text()) == by_entry(run)
    lines = [line.split() for line in ended.output.splitlines()]
    assert ["baseline", "0.1000", "±0.0000", "-", "-", "-", "-"] in lines
    assert ["baseline", "k", "=", "1", "-", "0.7500", f"±{HALF:.4f}"] in lines
    assert ["control:model", "channels", "k", "=", "1", "-", "0.6250"] in lines
    assert "loss_recovered: no head" in ended.output


def test_a_run_that_was_changed_is_told(run: Path) -> None:
    told = json.loads((run / "manifest.json").read_text())
    seal_run(run, told, {})
    assert by_entry(run)["rows"]
    content = (run / "metrics.parquet").read_bytes()
    pq.write_table(pq.read_table(run / "metrics.parquet").slice(1), run / "metrics.parquet")
    with pytest.raises(DamageError, match=r"metrics.parquet was changed"):
        by_entry(run)
    (run / "metrics.parquet").write_bytes(content[:-20])
    (run / "manifest.json").write_text(json.dumps(told))  # as of a stranger: without checksums
    with pytest.raises(DamageError, match=r"metrics.parquet can't be read"):
        by_entry(run)


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="name the folder of a complete run"):
        by_entry(tmp_path)
