"""Something else where a file or a folder belongs, and variables with odd values: one sentence
before anything is trained, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from projects import Ended, Project, called

from saelab.runs.folder import MANIFEST, SEALED
from saelab.storage.atomic import WriteError
from saelab.storage.cache import cache_folder
from saelab.study.plan import PlanConfig
from saelab.study.registry import register

#: Things that are no file and no folder to write to, by name.
ODD: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: (path / "inside").mkdir(parents=True),
    "link to nothing": lambda path: path.symlink_to("/nowhere/at/all"),
    "link to itself": lambda path: path.symlink_to(path),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "file": Path.touch,
}
#: Places beside the run folder that a launch writes, with what may not lie there.
PLACES = {
    ".run_1.lock": ("folder", "link to nothing", "link to itself", "pipe", "device"),
    ".saelab": ("link to nothing", "link to itself", "pipe", "device", "file"),
    ".saelab/attempts.jsonl": ("folder", "link to nothing", "link to itself", "pipe", "device"),
    "run_1": ("link to nothing", "link to itself", "pipe", "device", "file"),
    "run_1/cells": ("link to nothing", "link to itself", "device"),
    **{f"run_1/{name}": ("folder",) for name in (MANIFEST, *SEALED)},
}
CASES = [(place, odd) for place, odds in PLACES.items() for odd in odds]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.make_smallest(tmp_path_factory.mktemp("odd") / "project")


def refused(ended: Ended, project: Project, *words: str) -> None:
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err and 20 < len(ended.last) < 1500, ended.err
    for word in words:
        assert word in ended.last
    assert not project.finished_cells()


@pytest.mark.parametrize(("place", "odd"), CASES)
def test_something_else_lies_there(place: str, odd: str, template: Project, tmp_path: Path) -> None:
    project = template.copied(tmp_path / "project")
    path = project.folder / place
    path.parent.mkdir(exist_ok=True)
    ODD[odd](path)
    before = path.lstat()
    ended = project.call()
    refused(ended, project, Path(place).parts[0])
    assert path.lstat().st_ino == before.st_ino  # it is left to the user


LONG = "x" * 300
VARIABLES = {
    "SAELAB_CACHE": (
        *("/dev/null", "~no-such-user-here/x", "plan.toml", "plan.toml/cache", LONG, f"a/{LONG}"),
        *("nosuch://bucket/cache", "s3:/bucket/cache", "self", "://"),
    ),
    "SAELAB_WORKERS": ("two", "²", "-1", "1.5", "1e3", "9" * 5000, "100000", "٣", "0x10"),
    "SAELAB_CHECKPOINT_SECONDS": ("soon", "nan", "-1", "1s", "1_0s"),
    "SAELAB_MEMORY": ("much", "8 GBB", "²GB", "-1GB", "nan", "9" * 5000),
    "SAELAB_KERNELS": ("eagr", "1"),
    "SAELAB_PROGRESS": ("of", "0"),
    "SAELAB_EXECUTOR": ("rey", "²"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in VARIABLES for value in VARIABLES[name]]
)
def test_a_variable_with_an_odd_value(
    name: str, value: str, template: Project, tmp_path: Path
) -> None:
    project = template.copied(tmp_path / "project")
    (project.folder / "self").symlink_to("self")

    def check_and_launch() -> None:
        os.environ[name] = value
        project.main()

    ended = called(project.folder, check_and_launch, "--out_dir=run_1", workers="")
    refused(ended, project, name if "://" not in value else value)
    assert not (project.folder / "run_1").exists()


def test_a_cache_below_the_home_folder(
    template: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAELAB_CACHE", "~/cache")
    assert cache_folder(Path("study")) == tmp_path / "cache"


#: Setting -> the place in the project's files that is replaced by a name.
NAMED = {
    "base": ("plan.toml", '"configs/small.toml"', '"{}"'),
    "train_text": ("configs/small.toml", '"train.txt"', '"{}"'),
    "model": ("configs/small.toml", "[sae]", '[model]\npath = "./{}"\n[sae]'),
    "activations": ("configs/small.toml", "context = 32", 'activations = "{}"'),
}


@pytest.mark.parametrize("name", [LONG, "é" * 200, f"{LONG}/{LONG}", f"{LONG}/run_1"])
@pytest.mark.parametrize("setting", [*NAMED, "out_dir"])
def test_a_name_that_is_too_long(
    setting: str, name: str, template: Project, tmp_path: Path
) -> None:
    project = template.copied(tmp_path / "project")
    if setting != "out_dir":
        file, old, new = NAMED[setting]
        project.replace(file, old, new.format(name))
    refused(project.call(f"--out_dir={name if setting == 'out_dir' else 'run_1'}"), project)


def test_a_folder_in_place_of_the_registered_plan(tmp_path: Path) -> None:
    (tmp_path / ".saelab" / "plan.json").mkdir(parents=True)
    with pytest.raises(WriteError, match="it is a folder"):
        register(tmp_path, PlanConfig(study="s"))


def test_every_case_is_one_that_can_be_made(tmp_path: Path) -> None:
    for i, odd in enumerate(ODD):
        ODD[odd](tmp_path / str(i))
        assert os.path.lexists(tmp_path / str(i))
