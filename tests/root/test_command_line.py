"""The front of the command line: version, help, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from projects import cli

import saelab


def test_version(tmp_path: Path) -> None:
    ended = cli(tmp_path, "--version")
    assert (ended.code, ended.out.strip()) == (0, f"saelab {saelab.__version__}")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("words", [(), ("plan",), ("plan", "check"), ("run",)], ids=str)
def test_both_options_show_help(words: tuple[str, ...], option: str, tmp_path: Path) -> None:
    ended = cli(tmp_path, *words, option)
    assert ended.code == 0 and "-h, --help" in ended.out


@pytest.mark.parametrize("columns", [60, 80, 150])
def test_the_list_of_commands_is_whole_on_every_terminal(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = cli(tmp_path, "--help").out
    _, _, rest = out.partition("\n\n")
    assert "..." not in rest and max(map(len, out.splitlines())) <= columns
    text = " ".join(out.split())
    assert "Train, evaluate and judge all arms of a run (as `python experiment.py" in text
    assert "Judge finished runs from their files: differences, intervals, p and the four" in text


def test_a_wide_terminal_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert 120 < max(map(len, cli(tmp_path, "run", "-h").out.splitlines())) <= 150


def complete(words: str) -> list[str]:
    """Returns what bash is offered for the last of the words."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    environment = os.environ | asked | {"_SAELAB_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['saelab']; from saelab.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert not ended.stderr
    return ended.stdout.split()


def test_commands_and_options_are_completed() -> None:
    assert complete("saelab ver") == ["verdict"]
    assert "--executor" in complete("saelab run --ex")
    assert complete("saelab plan ch") == ["check"]
