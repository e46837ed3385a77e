"""Every command that README.md and the pages of docs/ show is run, in one small project that has
the files and runs that they name, unless its block says that it is not. A new command is found by
itself."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from code_blocks import BLOCKS, PAGES, commands_of
from local_hub import Hub, serve_to_this_process
from projects import BASE, ROOT, SMALLEST, Ended, Project, cli, run

from saelab.data.text import stdlib

INLINE = re.compile(r"`(saelab [^`]+)`")
#: What follows a command in its line.
COMMENT = re.compile(r"\s{2,}.*$|\s#.*$")
#: Names of commands; an inline mention of one without arguments is no command.
WORDS = re.compile(r"(?:saelab )?(?:plan |lm )?[a-z-]+")
#: A variable before a command.
VARIABLE = re.compile(r"[A-Z_]+=")
#: Placeholders in a documented command -> what stands in for them here.
STAND_INS = {"PATH": "run_1", "FOLDER": "downloaded_sae", "FILE": "result.json"}
STAND_INS |= {"CONFIG": "configs/synthetic/small.toml", "run_i": "run_1"}
#: What ends with 2 in a project where nothing asked for it, and how.
REFUSED = {"saelab try --seeds 12": "asked for"}
#: Those that train much, simulate or need a package of an extra.
SLOW = (
    "--simulate",
    "--trials",
    "saelab tune",
    "run_10",
    "--executor",
    "SAELAB_EXECUTOR",
    "synthetic",
    "plot.py",
)

ARMS = ("A1", "A2", "A2 permuted", "adaptive topk", "annealed k", "A", "B", "both")
ARMS += ("tau 0.1", "tau 1")
TABLE = """\
from saelab.launch.entry import main
from saelab.study.plan import Arm, Confirmation, Run

NAMES = {arms}
RATES = [{{"train.lr": 1e-3 + 1e-4 * i}} for i in range(len(NAMES))]
ARMS = [Arm("baseline"), *map(Arm, NAMES, RATES)]
RUNS = {{f"run_{{i}}": Run(f"Run {{i}}", ARMS) for i in range(10)}}
RUNS["run_11"] = Run("Run 11", ARMS)
RUNS["run_10"] = Confirmation("Confirmation", [Arm("baseline")])

if __name__ == "__main__":
    main(RUNS, __file__)
"""
PLAN = """\
study = "documented"
base = "configs/embedded.toml"
target_l0 = 16
levels = []
seeds = 2
seeds_other = 2
"""


def commands() -> Iterator[tuple[str, str]]:
    """Yields each documented command once, with the file that it is in first."""
    seen = set()
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        blocks = [one for one in BLOCKS if one.page == file.relative_to(ROOT).as_posix()]
        lines = [line for one in blocks if not one.reason for line in commands_of(one)]
        inline = [" ".join(match.split()) for match in INLINE.findall(text)]
        for command in [COMMENT.sub("", line) for line in [*lines, *inline]]:
            command = command.strip()
            if command.endswith("/") or (WORDS.fullmatch(command) and "`" + command in text):
                continue
            if command not in seen:
                seen.add(command)
                yield file.name, command


CASES = [
    pytest.param(command, id=f"{file}: {command}", marks=[pytest.mark.slow] * slow)
    for file, command in commands()
    for slow in [any(words in command for words in SLOW)]
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which the runs 0 to 9 are complete."""
    base = BASE
    for old, new in SMALLEST.items():
        base = base.replace(old, new)
    folder = tmp_path_factory.mktemp("documented") / "project"
    made = Project.make(folder, plan=PLAN, base=base)
    text = "\n".join(stdlib.texts("train"))
    made.write("train.txt", text[:400_000])
    made.write("experiment.py", TABLE.format(arms=ARMS))
    for name in ("configs/embedded.toml", "configs/pythia-70m.toml", "mine.toml"):
        made.write(name, base)
    (folder / "configs" / "synthetic").mkdir()
    for place in ("configs/gemma-2-2b.toml", "plot.py"):
        shutil.copyfile(ROOT / place, folder / place)
    tiny = (ROOT / "configs/synthetic/baselines.toml").read_text(encoding="utf-8")
    for old, new in (("2_048_000", "204_800"), ("16384", "2048")):
        assert tiny.count(old) == 1
        tiny = tiny.replace(old, new)
    made.write("configs/synthetic/small.toml", tiny)
    shutil.copyfile(
        ROOT / "configs/synthetic/absorption.toml", folder / "configs/synthetic/absorption.toml"
    )
    shutil.copyfile(ROOT / "saelab/assets/template/candidate.py.txt", folder / "candidate.py")
    for i in range(10):
        ended = made.call(f"--out_dir=run_{i}")
        assert ended.code == 0, ended.err
    for made_first in (
        ("train", "configs/embedded.toml", "--out_dir", "out"),
        ("export", "run_1", "--out", "exported", "--arm", "baseline"),
    ):
        ended = cli(folder, *made_first)
        assert ended.code == 0, ended.err
    shutil.copytree(folder / ended.out.splitlines()[0], folder / "downloaded_sae")
    return made


@pytest.fixture
def hub(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback with an SAE of the project, and the right to write there."""
    with serve_to_this_process(tmp_path / "cache", monkeypatch) as running:
        monkeypatch.setenv("HF_TOKEN", running.token)
        shutil.copytree(project.folder / "downloaded_sae", tmp_path / "site" / "A1")
        running.put("me/my-saes", tmp_path / "site")
        yield running


def expanded(folder: Path, word: str) -> list[str]:
    """Returns the names that a shell gives a command for a word."""
    return sorted(file.name for file in folder.glob(word)) if "*" in word else [word]


def carry_out(project: Project, command: str) -> Ended:
    words = [STAND_INS.get(word, word) for word in shlex.split(command)]
    variables = list(takewhile(VARIABLE.match, words))
    with patch.dict(os.environ, dict(one.split("=", 1) for one in variables)):
        return carry_out_words(project, words[len(variables) :])


def carry_out_words(project: Project, words: list[str]) -> Ended:
    words = [name for word in words for name in expanded(project.folder, word)]
    if "--simulate" in words and "--simulations" not in words:
        words += ["--simulations", "300"]  # of 20,000, which take minutes
    if words[:2] == ["saelab", "template"]:  # in a folder without a run_0 of another plan
        elsewhere = project.folder.with_name("elsewhere")
        elsewhere.mkdir(exist_ok=True)
        return cli(elsewhere, *words[1:])
    for option in ("--out", "--out_dir"):  # of a command that ran before
        if option in words and (folder := project.folder / words[words.index(option) + 1]).is_dir():
            shutil.rmtree(folder)
    if words[0] == "saelab":
        if words[1] == "run":  # complete runs, which their cells in the cache make again
            for name in (word for word in words[2:] if word.startswith("run_")):
                shutil.rmtree(project.folder / name, ignore_errors=True)
        return cli(project.folder, *words[1:])
    if words[1] == "plot.py":
        return run(project.folder, "plot.py")
    shutil.rmtree(project.folder / words[2].removeprefix("--out_dir="), ignore_errors=True)
    return project.call(*words[2:])


@pytest.mark.parametrize("command", CASES)
def test_a_documented_command_works(
    project: Project, command: str, request: pytest.FixtureRequest
) -> None:
    if "ray" in command:
        pytest.importorskip("ray")
    if "dictionary_learning" in command:
        write_dictionary(project.folder / "ae_folder")
    if "quick/run_1" in command and not (project.folder / "quick" / "run_1").is_dir():
        ended = cli(project.folder, "run", "run_1", "--quick")
        assert ended.code == 0, ended.err
    if "FILE" in command:
        write_result(project.folder)
    if "hub:" in command:
        request.getfixturevalue("hub")
    ended = carry_out(project, command)
    if command in REFUSED:
        assert ended.code == 2 and REFUSED[command] in ended.last, ended.err
        return
    assert ended.code == 0, f"{command}: {ended.out[-300:]} {ended.err[-1000:]}"


def write_dictionary(folder: Path) -> None:
    """Writes an SAE of the embedded model as dictionary_learning saves it."""
    folder.mkdir(exist_ok=True)
    draw, shape = torch.Generator().manual_seed(0), (64, 192)
    tensors = {
        "encoder.weight": torch.randn(shape, generator=draw),
        "encoder.bias": torch.zeros(64),
    }
    tensors |= {"decoder.weight": tensors["encoder.weight"].T.clone(), "bias": torch.zeros(192)}
    trainer = {"dict_class": "AutoEncoder", "lm_name": "embedded", "layer": 2}
    trainer |= {"submodule_name": "resid_post_layer_2", "activation_dim": 192}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    torch.save(tensors, folder / "ae.pt")


def write_result(folder: Path) -> None:
    """Writes SAEBench's result file of one of the project's SAEs."""
    options = ["--evals", "core,probing,model_channels", "--saebench-json", "result.json"]
    probing = {"entries": "embedded", "train_size": 20, "test_size": 10, "context": 32}
    for name, value in probing.items():
        options += ["--set", f"evaluation.probing.{name}={value}"]
    ended = cli(folder, "eval", "downloaded_sae", "--config", "mine.toml", *options)
    assert ended.code == 0, ended.err


def test_commands_are_found() -> None:
    found = [command for _, command in commands()]
    assert "saelab export run_1 --out for_saelens" in found and len(found) > 30
    assert not [command for command in found if "  " in command or "#" in command]
