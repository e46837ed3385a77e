"""What a launch, its summary and its page say of a run that a new user makes first."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from projects import BASELINE, Project, cli

from saelab import formats

#: The first sketch of idea A, whose batch statistics have no form in other tools.
BATCH = 'Arm("batch", {"sae.scaling": {"kind": "variance", "statistics": "batch"}})'


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One SAE trained by `saelab train`, and its page."""
    project = Project.make_smallest(tmp_path_factory.mktemp("one") / "project")
    ended = cli(project.folder, "train", "configs/small.toml", "--out_dir", "out")
    assert ended.code == 0, ended.err
    project.write("printed.txt", ended.out)
    assert cli(project.folder, "report", "out").code == 0
    return project


def words(project: Project) -> str:
    """The text of the page."""
    page = (project.folder / "report.html").read_text(encoding="utf-8").split("<script")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_one_sae_is_not_called_an_arm_and_its_place_is_said(one: Project) -> None:
    printed = (one.folder / "printed.txt").read_text(encoding="utf-8")
    head, _, first = printed.splitlines()[:3]
    assert head.startswith("SAE ") and "verdict" not in head
    assert first.startswith("baseline (configs/small.toml) ")
    place = re.search(r"the trained SAE is in (\S+)", printed)
    assert place and (one.folder / place[1] / "sae.safetensors").is_file()
    assert re.search(r"^out: 1 cell in ", printed, re.M)
    summary = (one.folder / "out" / "summary.md").read_text(encoding="utf-8")
    assert "How good is the SAE that configs/small.toml describes?" in summary


def test_its_own_l0_is_not_called_l0_0(one: Project) -> None:
    (cell,) = one.manifest("out")["cells"]
    assert re.fullmatch(r"baseline/seed \d+/own L0", cell)
    (folder,) = (one.folder / "out" / "cells" / "baseline").iterdir()
    assert re.fullmatch(r"seed\d+", folder.name)
    ended = cli(one.folder, "eval", f"out/cells/baseline/{folder.name}", "--evals", "core")
    assert ended.code == 0, ended.err
    for name in ("summary.md", "manifest.json", "gate.json", "metrics.jsonl"):
        text = (one.folder / "out" / name).read_text(encoding="utf-8")
        assert not re.search(r"/L0 0\b|l0_0\b", text), name


def test_the_page_names_the_settings_that_were_used_and_the_planted_effect(one: Project) -> None:
    said = words(one)
    assert "base configs/small.toml" in said and "embedded.toml" not in said
    assert "levels 16, 64" not in said
    assert "No effect was planted" not in said
    assert "An effect was planted in 1 SAE: a verdict on it needs two with numbers." in said
    assert one.manifest("out")["plan"]["levels"] == []


def test_export_writes_what_can_be_written_and_names_the_rest(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project", BASELINE, BATCH)
    assert project.call().code == 0
    ended = cli(project.folder, "export", "run_1", "--out", "for_saelens")
    assert ended.code == 2
    written = [project.folder / line for line in ended.out.splitlines()]
    assert len(written) == 2 and all("baseline" in str(folder) for folder in written)
    *refused, last = ended.err.splitlines()
    assert len(refused) == 2 and last.startswith("2 SAEs written to for_saelens, 2 refused: ")
    for line in refused:
        assert re.match(r"batch/seed\S+ is not written: .*scaling = 'batch statistics'", line)
    assert not (project.folder / "for_saelens" / "batch").exists()
    for folder in written:
        assert formats.load(folder).sae.d_sae == 64
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        assert str(project.folder) not in json.dumps(config)
        assert not [v for v in map(str, config["metadata"].values()) if v.startswith("/")]
    alone = cli(project.folder, "export", "run_1", "--out", "none", "--arm", "batch")
    assert alone.code == 2 and not (project.folder / "none").exists()
    assert len(alone.err.splitlines()) == 1 and "batch statistics" in alone.last


def test_open_findings_are_among_the_next_steps(tmp_path: Path) -> None:
    project = Project.make_smallest(tmp_path / "project")
    project.replace("configs/small.toml", "tokens = 2_048", "tokens = 4_096")
    assert project.call().code == 0
    text = (project.folder / "run_1" / "summary.md").read_text(encoding="utf-8")
    steps = text.partition("**What to try next.**")[2]
    assert "not_converged in 2 cells of baseline" in steps or "not_converged" not in text
    assert "nothing" not in steps or "not_converged" not in text
