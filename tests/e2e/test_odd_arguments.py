"""Every command with something odd in place of each path that it takes: one sentence, exit code 2,
at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from projects import Project, cli

#: Stands for the odd path in a command.
P = "odd"
FILES = (
    *("manifest.json", "sae.json", "cfg.json", "config.json", "sae.safetensors"),
    *("final_info.json", "metrics.jsonl", "metrics.parquet", "plan.toml", "experiment.py"),
)


def filled(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Makes a folder with something odd under each name that a command reads."""

    def fill(path: Path) -> None:
        path.mkdir()
        for name in FILES:
            make(path / name)

    return fill


ODD: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "folder": Path.mkdir,
    "folders": filled(Path.mkdir),
    "pipes": filled(os.mkfifo),
    "devices": filled(lambda path: path.symlink_to("/dev/zero")),
    "link to nothing": lambda path: path.symlink_to("/nowhere/x"),
    "link to itself": lambda path: path.symlink_to(path),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 20),
}
CONFIG = "configs/small.toml"
READING = [
    *(
        ["verdict", P],
        ["report", P],
        ["difference", P, "rate", "baseline"],
        ["probing", P],
        ["watch", P, "--json"],
    ),
    *(["eval", P, "--config", CONFIG], ["eval", "run_1", "--config", P]),
    *(["export", P, "--out", "o"], ["saebench", P]),
    *(["train", P, "--out_dir", "o"], ["synthetic", P]),
    *(["plan", "cost", P], ["plan", "cost", CONFIG, "--rates", P]),
    *(["plan", "check", "--experiment", P], ["run", "run_1", "--experiment", P], ["run", P]),
]
WRITING = [["train", CONFIG, "--out_dir", P], ["template", P]]
#: Where a command that writes may write.
FREE = ("nothing", "folder", "folders", "pipes", "devices")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.make_smallest(tmp_path_factory.mktemp("odd") / "project")


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Ends a command that waits for a pipe."""

    def waited(number: int, frame: object) -> None:
        raise TimeoutError("the command waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("odd", [*ODD, "long"])
@pytest.mark.parametrize("command", READING + WRITING, ids=" ".join)
def test_one_sentence(command: list[str], odd: str, project: Project, tmp_path: Path) -> None:
    if command in WRITING and odd in FREE:
        pytest.skip("the command may write there")
    folder = project.copied(tmp_path / "project").folder
    if odd in ODD:
        ODD[odd](folder / P)
    ended = cli(folder, *("x" * 300 if word == P and odd == "long" else word for word in command))
    assert "Traceback" not in ended.err and "Usage:" not in ended.err
    damaged = command[0] == "saebench" and odd == "bytes"
    assert ended.code == (1 if damaged else 2), ended.err
    assert 15 < len(ended.last) < 1500
