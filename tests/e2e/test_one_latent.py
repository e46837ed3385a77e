"""`saelab latent` and `saelab steer`, and the same from Python, on a cell of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from projects import Ended, Project, cli

import saelab
from saelab.analysis.latents import browse, chosen_cells
from saelab.errors import SettingError
from saelab.evals.latent_examples import neighbours
from saelab.runs.folder import RunFolder

PROMPT = "def add("
DOCS = Path(__file__).parents[2] / "docs" / "inside.md"
#: A block of Python in a page.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One finished run of the baseline; no test changes it."""
    return Project.finished_baseline(tmp_path_factory.mktemp("latent") / "project")


@pytest.fixture(scope="module")
def cell(project: Project) -> str:
    return str(project.first_cell().relative_to(project.folder))


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, (ended.out, ended.err)
    assert "Traceback" not in ended.err and len(ended.err.strip().splitlines()) == 1
    for word in words:
        assert word in ended.last, ended.last


def test_a_latent_is_what_the_feature_browser_shows(
    project: Project, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)  # texts are named relative to it
    run = RunFolder(project.folder / "run_1")
    cache = project.folder / ".saelab"
    (browsed,) = browse(chosen_cells([run], ["baseline"], 1), 4, 8, cache)
    one = browsed.latents[0]
    ended = cli(project.folder, "latent", cell, str(one.index), "--json")
    assert ended.code == 0, ended.err
    data = json.loads(ended.out)
    assert (data["latent"], data["d_sae"], data["tokens"]) == (one.index, 64, browsed.tokens)
    assert (data["density"], data["largest"]) == (one.density, one.largest)
    assert [c["values"] for c in data["contexts"]] == [list(e.values) for e in one.examples]
    assert data["contexts"]
    assert all(len(c["tokens"]) == len(c["values"]) for c in data["contexts"])
    assert [c["value"] for c in data["contexts"]] == [
        c["values"][c["peak"]] for c in data["contexts"]
    ]
    assert one.lens is not None
    assert [value for _, value in data["raised"]] == pytest.approx(
        [value for _, value in one.lens.raised],
        rel=1e-4,  # of other rows at once
    )
    sae = saelab.load(project.folder / cell)
    (near,) = neighbours(sae, [one.index])
    assert data["neighbours"] == [list(pair) for pair in near]
    ended = cli(project.folder, "latent", cell, str(one.index), "--examples", "2")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"latent {one.index} of 64, on ")
    assert sum("»" in line and "«" in line for line in lines) == 2 and len(lines) == 8


def test_a_latent_from_python(project: Project, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    view = saelab.latent(project.folder / cell, 7, cache=project.folder)
    ended = cli(project.folder, "latent", cell, "7", "--json")
    assert json.loads(ended.out) == view.as_dict()
    assert repr(view).splitlines()[0].startswith("latent 7 of 64")


def test_steering_prints_both_texts(
    project: Project, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    options = ("--prompt", PROMPT, "--tokens", "6")
    ended = cli(project.folder, "steer", cell, "--latent", "7", "--by", "40", *options, "--json")
    assert ended.code == 0, ended.err
    data = json.loads(ended.out)
    assert data["plain"].startswith(PROMPT) and data["steered"].startswith(PROMPT)
    assert data["plain"] != data["steered"]
    with saelab.attach("embedded", project.folder / cell) as inside:
        assert inside.hook == "blocks.2.hook_resid_post"
        assert inside.generate(PROMPT, 6) == data["plain"]
        assert inside.add(7, 40).generate(PROMPT, 6) == data["steered"]
    ended = cli(project.folder, "steer", cell, "--latent", "7", "--by", "0", *options)
    assert ended.code == 0, ended.err
    plain, _, steered = ended.out.partition("\n\n")
    assert plain.partition("\n")[2] == steered.partition("\n")[2].rstrip("\n") == data["plain"]


def test_the_python_of_the_page_runs(
    project: Project,
    cell: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project.folder)
    blocks = BLOCK.findall(DOCS.read_text(encoding="utf-8"))
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        if "saelab.train(" in block:  # tests/docs/test_code_blocks.py, which is slow
            continue
        exec(block.replace('"downloaded_sae"', repr(cell)), names)
    assert "def add(" in capsys.readouterr().out


def test_bad_input_ends_with_one_sentence(project: Project, cell: str) -> None:
    folder = project.folder
    refused(cli(folder, "latent", cell, "64"), "latent = 64", "the last is 63")
    refused(cli(folder, "latent", cell, "7", "--examples", "0"), "examples = 0")
    refused(cli(folder, "latent", "run_1", "7"), "is a run with 2 SAEs", "cells")
    steer = ("steer", cell, "--prompt", PROMPT, "--latent")
    refused(cli(folder, *steer, "99", "--by", "4"), "latent = 99", "the last is 63")
    refused(cli(folder, *steer, "7", "--by", "nan"), "by = nan", "finite")
    refused(cli(folder, *steer, "7", "--by", "4", "--tokens", "0"), "tokens = 0")
    refused(cli(folder, *steer, "7", "--by", "4", "--tokens", "100000"), "the model takes")
    elsewhere = Path(folder / "elsewhere.toml")
    text = (folder / "configs/small.toml").read_text(encoding="utf-8")
    elsewhere.write_text(text.replace("blocks.2", "blocks.1"), encoding="utf-8")
    options = ("--config", "elsewhere.toml")
    refused(cli(folder, "latent", cell, "7", *options), "was trained at blocks.2", "--config")


def test_an_sae_in_memory_needs_settings() -> None:
    sae = saelab.SAEConfig.parse({"d_sae": 8}).build(3).eval()
    with pytest.raises(SettingError, match="base = None: name model, hook and text"):
        saelab.latent(sae, 0)
