"""The workflows for Linux, Windows and macOS: parsed, and each command that they run exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from saelab.cli import app

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES}
JOBS = {
    f"{name}: {job}": content
    for name, workflow in WORKFLOWS.items()
    for job, content in workflow["jobs"].items()
}
#: Programs that the machines of the workflow have.
INSTALLED = {"git", "make", "python", "saelab"}
#: Modules that `python -m` may name without being installed here, since the step before gets them.
FETCHED = {"build"}
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
SYSTEMS = {"ubuntu-latest", "windows-latest", "macos-latest"}


def commands(job: dict[str, Any]) -> Iterator[list[str]]:
    for step in job["steps"]:
        for line in str(step.get("run", "")).splitlines():
            if line.strip():
                yield shlex.split(line)


def test_there_are_workflows() -> None:
    assert "systems.yml" in WORKFLOWS
    assert len(list(commands(JOBS["systems.yml: tests"]))) > 5


@pytest.mark.parametrize("name", JOBS)
def test_each_step_does_one_thing_and_each_job_ends(name: str) -> None:
    assert JOBS[name]["timeout-minutes"] <= 120
    for step in JOBS[name]["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("name", JOBS)
def test_each_command_exists(name: str) -> None:
    ours = typer.main.get_command(app)
    for program, *arguments in commands(JOBS[name]):
        assert program in INSTALLED
        if program == "make":
            assert set(arguments) <= TARGETS
        elif program == "saelab" and not arguments[0].startswith("-"):
            command: Any = ours
            while getattr(command, "commands", None):
                command = command.commands[arguments.pop(0)]
            options = {option for parameter in command.params for option in parameter.opts}
            assert {a for a in arguments if a.startswith("--")} <= options
        elif program == "python":
            assert arguments[0] == "-m"
            assert arguments[1] in FETCHED or find_spec(arguments[1])


def test_make_runs_on_linux_alone() -> None:
    for job in JOBS.values():
        uses_make = any(program == "make" for program, *_ in commands(job))
        assert not uses_make or job["runs-on"] == "ubuntu-latest"


def test_every_system_is_tried_in_a_python_that_the_package_supports() -> None:
    matrix = JOBS["systems.yml: tests"]["strategy"]["matrix"]
    assert set(matrix["os"]) == SYSTEMS
    with (ROOT / "pyproject.toml").open("rb") as file:
        oldest = tomllib.load(file)["project"]["requires-python"].removeprefix(">=")
    tried = {*matrix["python"], *(more["python"] for more in matrix["include"])}
    assert min(tried, key=lambda version: int(version.split(".")[1])) == oldest


def test_packages_are_pinned_by_the_same_file_as_in_the_makefile() -> None:
    for program, *arguments in commands(JOBS["systems.yml: tests"]):
        if program == "python" and "install" in arguments:
            assert arguments[-2:] == ["-c", "constraints.txt"]
