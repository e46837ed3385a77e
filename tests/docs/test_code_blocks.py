"""Every block of code in README.md and docs/ is run by a test, or its page says why it is not.

Commands are run by tests/e2e/test_documented_commands.py. Here: Python, TOML, and that no block is
of a kind which nothing runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from code_blocks import BLOCKS, COMMANDS, PAGES, Block, commands_of, lines_of
from projects import ROOT, Project

import saelab
from saelab.cli import app
from saelab.errors import SettingError
from saelab.study.experiment_file import load_experiment
from saelab.study.plan import BaseConfig, PlanConfig, cells, read_base, read_plan

RUN = [block for block in BLOCKS if not block.reason]
SHOWN = ("text", "python", "toml", COMMANDS)
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
COMMENT = re.compile(r"\s{2,}#.*$")
#: A line of a shell that starts nothing.
ACTIVATE = "source .venv/bin/activate"


def blocks(language: str, *containing: str, run: bool = True) -> list[Block]:
    return [
        block
        for block in (RUN if run else BLOCKS)
        if block.language == language and all(words in block.text for words in containing)
    ]


def ids(block: Block) -> str:
    return str(block)


# ---- no block is left out --------------------------------------------------------------------


def test_every_block_has_a_language_that_a_test_knows() -> None:
    assert len(BLOCKS) > 60 and {block.page for block in BLOCKS} > {"README.md", "docs/zoo.md"}
    odd = [f"{block}: {block.language!r}" for block in BLOCKS if block.language not in SHOWN]
    assert not odd, f"{odd}: fence commands by indentation, others as python, toml or text"


@pytest.mark.parametrize("block", blocks(COMMANDS), ids=ids)
def test_a_block_of_commands_is_run(block: Block) -> None:
    rest = [COMMENT.sub("", line) for line in lines_of(block) if line not in commands_of(block)]
    left = [line for line in rest if line != ACTIVATE and f"\n{line}\n" not in f"{CI}\n"]
    assert not left, f"{block}: nothing runs {left}; say why: <!-- not run: reason -->"


def test_equations_and_outputs_hold_no_commands() -> None:
    """`text` is not a way around the rule."""
    commands = re.compile(r"(\$ |saelab [a-z]|python [a-z]|make [a-z]|import |from \w+ import)")
    odd = [block for block in blocks("text") if commands.match(block.text)]
    assert not [str(block) for block in odd]


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.reason], ids=ids)
def test_what_is_not_run_exists(block: Block) -> None:
    """Commands and options, scripts and targets of make, and configs."""
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in lines_of(block) if block.language == COMMANDS else []:
        words = [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True)]
        for word in words:
            if word.startswith(("benchmarks/", "configs/")) and word.endswith((".py", ".toml")):
                assert (ROOT / word).is_file(), (str(block), word)
        if "saelab" in words:
            check_options(words[words.index("saelab") + 1 :])
        if words[0] == "make":
            assert f"\n{words[1]}:" in targets, (str(block), line)


def check_options(words: list[str]) -> None:
    """Reads a command line without running it; raises what typer does for options that it lacks."""
    command: Any = typer.main.get_command(app)
    while commands := getattr(command, "commands", None):  # a group
        name, *words = words
        assert name in commands, f"saelab {name} does not exist"
        command = commands[name]
    command.make_context("saelab", list(words))


def test_a_command_that_does_not_exist_is_found() -> None:
    check_options(["train", "x.toml", "--out_dir", "out"])
    with pytest.raises(Exception, match="--outdir"):
        check_options(["train", "x.toml", "--outdir", "out"])
    with pytest.raises(AssertionError, match="trian"):
        check_options(["trian"])


def test_a_page_can_say_that_a_block_is_not_run() -> None:
    (block,) = [b for b in BLOCKS if "make demo-smollm2" in b.text and b.language == COMMANDS]
    assert block.reason == "takes half an hour"
    assert not [str(b) for b in BLOCKS if b.language in ("text", "toml") and b.reason]


# ---- TOML ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("toml"), ids=ids)
def test_settings_can_be_read(block: Block) -> None:
    """They are settings of a base or of a plan."""
    data = tomllib.loads(block.text)
    assert data
    try:
        BaseConfig.parse(data)
    except SettingError as error:
        known = set(data) <= set(PlanConfig.model_fields)
        assert known, f"{block}: {error}"
        PlanConfig.parse({"study": "s"} | data)


# ---- Python ----------------------------------------------------------------------------------

#: Lines of a run table, which stand in experiment.py.
TABLES = blocks("python", "RUNS[")
#: Blocks that need an SAE on disk, in the order of their page.
WITH_SAE = [block for block in blocks("python") if block.page == "docs/inside.md"]
#: Those that train, which tests/e2e/test_front.py runs in small.
TRAINING = [block for block in blocks("python", "saelab.train(") if block not in WITH_SAE]
#: Those that need a hub, which tests/formats/test_hub.py runs on one of its own.
WITH_HUB = [block for block in blocks("python") if block.page == "docs/sharing.md"]
APART = (*TABLES, *WITH_SAE, *TRAINING, *WITH_HUB)
OTHERS = [block for block in blocks("python") if block not in APART]


@pytest.mark.parametrize("block", TABLES, ids=ids)
def test_lines_of_a_run_table(block: Block, tmp_path: Path) -> None:
    """They are run at the end of the shipped table; their arms are cells that can be trained."""
    text = (ROOT / "experiment.py").read_text(encoding="utf-8")
    before, main, after = text.rpartition("\nif __name__")
    assert main
    file = tmp_path / "experiment.py"
    file.write_text(f"{before}\n{block.text}\n{main}{after}", encoding="utf-8")
    try:
        runs = load_experiment(file).RUNS
    finally:
        sys.modules.pop("saelab_experiment", None)
    (name,) = re.findall(r"RUNS\[\"(\w+)\"\]", block.text)
    plan = read_plan(ROOT / "plan.toml")
    trained = cells(plan, read_base(ROOT / plan.base), runs[name])
    confirms = isinstance(runs[name], saelab.Confirmation)  # the other arm is of an earlier run
    assert len({cell.id.arm for cell in trained}) == (1 if confirms else 2)


@pytest.mark.parametrize("block", OTHERS, ids=ids)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec"), names)
    assert set(names) - {"__builtins__"}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in WITH_SAE}))
def test_python_with_an_sae_runs(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A page's blocks are run one after the other, with a trained cell as `downloaded_sae`. Those
    that train nothing are run by tests/e2e/test_one_latent.py too, which is fast."""
    project = Project.finished_baseline(tmp_path / "project")
    shutil.copytree(project.first_cell(), project.folder / "downloaded_sae")
    shutil.copytree(ROOT / "configs", project.folder / "configs", dirs_exist_ok=True)
    monkeypatch.chdir(project.folder)
    names: dict[str, object] = {}
    of_page = [block for block in WITH_SAE if block.page == page]
    assert len(of_page) >= 3
    for block in of_page:
        exec(compile(block.text, str(block), "exec"), names)
    assert "def add(" in capsys.readouterr().out


def test_every_python_block_is_in_one_of_these() -> None:
    assert [block.page for block in TRAINING] == ["README.md"], (
        "tests/e2e/test_front.py runs README's"
    )
    assert len(WITH_HUB) == 1, "test_the_documented_calls_work runs the only one"
    groups = [TABLES, WITH_SAE, TRAINING, WITH_HUB, OTHERS]
    assert all(groups) and sum(map(len, groups)) == len(blocks("python"))
    assert len(PAGES) > 40
