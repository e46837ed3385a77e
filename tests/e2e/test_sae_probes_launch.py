"""A launch that is judged by probing on sae-probes' data sets, and the same for a saved SAE."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
from projects import BASELINE, RATE, TWO_SEEDS, Project, cli
from sae_probes_folders import made_folder

from saelab.launch.controls import SUBJECTS
from saelab.runs.schema import TWIN

METRIC = "sae_probes_top_1_auc"


def test_a_launch_is_judged_by_it_and_a_saved_sae_has_its_rows(tmp_path: Path) -> None:
    data = made_folder(tmp_path / "data", {"1_a": 160, "2_b": 170})
    plan = f"{TWO_SEEDS}primary = '{METRIC}'\ndirection = 'higher'\n"
    project = Project.make_smallest(tmp_path / "project", BASELINE, RATE, plan=plan)
    ended = project.call()
    assert ended.code == 2
    assert f"primary = '{METRIC}': is not measured in this launch" in ended.last

    settings = {
        "evaluation.extra": ["sae_probes"],
        "evaluation.sae_probes": {"path": str(data), "k_values": [1, 2], "draws": 2},
    }
    project.table((BASELINE, RATE), changes=json.dumps(settings))
    ended = project.call()
    assert ended.code == 0, ended.err
    rows = [
        row
        for row in pq.read_table(project.folder / "run_1" / "metrics.parquet").to_pylist()
        if row["definition"] == "sae_probes/2"
    ]
    overall = {
        (row["arm"], row["seed"]): row["value"]
        for row in rows
        if (row["metric"], row["slice"]) == (METRIC, "")
    }
    controls = {f"control:{name}" for name in (*SUBJECTS, TWIN)}
    assert {arm for arm, _ in overall} >= {"baseline", "rate", *controls}
    assert all(0 <= value <= 1 for value in overall.values())
    channels = [row for row in rows if row["metric"] == "sae_probes_channels_logistic_auc"]
    assert {row["arm"] for row in channels} == {"control:model channels"}
    assert {row["text"] for row in rows} == {"data sets of sae-probes"}
    assert {row["tokens"] for row in rows} == {330}
    assert project.info()["baseline"]["means"]

    arguments = ("--evals", "sae_probes", "--arm", "rate", "--json")
    saved = cli(project.folder, "eval", "run_1", *arguments)
    assert saved.code == 0, saved.err
    again = [r for r in json.loads(saved.out) if (r["metric"], r["slice"]) == (METRIC, "")]
    assert {(r["arm"], r["seed"]): r["value"] for r in again} == {
        cell: value for cell, value in overall.items() if cell[0] == "rate"
    }

    refused = cli(
        *(project.folder, "eval", "run_1", "--evals", "sae_probes"),
        *("--set", "evaluation.sae_probes.path=nowhere"),
    )
    assert refused.code == 2
    assert "evaluation.sae_probes.path = 'nowhere': holds no" in refused.last
