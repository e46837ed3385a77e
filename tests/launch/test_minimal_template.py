"""`saelab template --minimal`: three files, with which a run can be checked and launched."""

from __future__ import annotations

from pathlib import Path

from projects import cli

from saelab.study.plan import read_base, read_plan

ROOT = Path(__file__).parents[2]


def test_it_is_three_files_that_can_be_checked(tmp_path: Path) -> None:
    folder = tmp_path / "my study"
    ended = cli(tmp_path, "template", "my study", "--minimal")
    assert ended.code == 0, ended.err
    assert "saelab run run_1 --quick" in ended.out
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {"experiment.py", "plan.toml", "configs/embedded.toml"}
    assert read_plan(folder / "plan.toml").study == "my study"
    assert read_base(folder / "configs/embedded.toml") == read_base(ROOT / "configs/embedded.toml")
    checked = cli(folder, "plan", "check")
    assert checked.code == 0 and "run_1: Is a wider SAE better?" in checked.out, checked.err
    quick = cli(folder, "plan", "check", "--quick", "--json")
    assert quick.code == 0 and '"cells": 6' in quick.out


def test_it_has_no_run_0(tmp_path: Path) -> None:
    ended = cli(tmp_path, "template", "x", "--minimal", "--train")
    assert ended.code == 2 and "--minimal has no run_0" in ended.last
    assert not (tmp_path / "x").exists()
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine.txt").touch()
    ended = cli(tmp_path, "template", "y", "--minimal")
    assert ended.code == 2 and "not empty" in ended.last
