"""The embedded default at full size: one cell that any user's launch would train."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from projects import ROOT, cli

pytestmark = pytest.mark.slow


def test_the_baseline_at_l0_32_is_a_good_sae(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "embedded.toml")
    ended = cli(tmp_path, "train", config, "--out_dir", "out")
    assert ended.code == 0, ended.err
    rows = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    found = {(r["arm"], r["metric"]): r["value"] for r in rows if not r["slice"]}
    own = {metric: value for (arm, metric), value in found.items() if arm == "baseline"}
    k5 = "sae_top_5_test_accuracy"
    channels = found["control:model channels", "llm_top_5_test_accuracy"]
    untrained = found["control:untrained", k5]
    names = ("explained_variance", "loss_recovered", "l0", "dead_share")
    print({**{name: own[name] for name in names}, k5: own[k5]}, channels, untrained)
    assert own["l0"] == pytest.approx(32, rel=0.05)
    assert own["explained_variance"] >= 0.80
    assert own["loss_recovered"] >= 0.85
    assert own[k5] > channels
    assert own[k5] > untrained
