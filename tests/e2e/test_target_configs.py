"""The configurations with targets, each through a whole launch with few tokens."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from projects import BASE, BASELINE, RATE, ROOT, Project

import saelab
from saelab.config import read_toml
from saelab.storage.atomic import read_json

CONFIGS = ("transcoder", "skip-transcoder", "crosscoder", "several-targets")
PLAN = """\
study = "targets"
base = "configs/small.toml"
target_l0 = "none"
levels = []
seeds = 2
seeds_other = 2
"""


def small(name: str) -> str:
    """The base of small projects with the hooks and the SAE of a configuration."""
    text = (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    head = text[: text.index("context =")]
    sae = text[text.index("[sae]") : text.index("[train]\n")]
    before, rest = BASE[BASE.index("context =") :].split("[sae]\n")
    rest = rest[rest.index("[train]") :].replace("tokens = 8_192", "tokens = 2_048")
    return head + before + sae.replace("d_sae = 1536", "d_sae = 64") + rest


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_launch_of_a_configuration(name: str, tmp_path: Path) -> None:
    project = Project.make(tmp_path / "project", (BASELINE, RATE), plan=PLAN, base=small(name))
    ended = project.launch()
    assert ended.code == 0, ended.err
    run = project.folder / "run_1"
    base = read_toml(ROOT / "configs" / f"{name}.toml")
    rows = pq.read_table(run / "metrics.parquet").to_pylist()
    core = [row for row in rows if row["metric"] == "fvu" and not row["slice"]]
    assert {row["definition"] for row in core} == {"core/targets/1"}
    assert all(row["value"] is not None and 0 < row["value"] < 5 for row in core)
    arms = {row["arm"] for row in core}
    assert ("control:linear map" in arms) == ("target_hook" in base)
    assert {"baseline", "rate", "control:PCA", "control:untrained"} <= arms
    spliced = [row for row in rows if row["metric"] == "ce_spliced" and row["arm"] == "baseline"]
    assert spliced and all(row["value"] > 0 for row in spliced)
    if name in ("crosscoder", "several-targets"):
        assert len({row["slice"] for row in rows if row["slice"].startswith("hook=")}) == 2
    if name == "skip-transcoder":
        assert any(row["metric"] == "skip_only_fvu" for row in rows)
    (folder, *_) = (run / "cells").glob("baseline/*/sae.json")
    sae = saelab.load(folder.parent)
    assert ("targets" in read_json(folder)) == ("target_hook" in base)
    assert sae.d_sae == 64
