"""`saelab try` and the drivers that use it: scripted ones that behave as these tools do.

A loop of karpathy/autoresearch's kind edits one file, starts one command, greps two lines and keeps
or resets a commit. AI-Scientist v2 executes a node's file as a text, without a `__name__`, in a
process whose output is a queue; for other seeds it puts lines in front of the file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from projects import BASE, CHARACTERS, SMALLEST, Ended, Project, as_if_fresh, called, cli

from saelab.cli.outputs import schema_of
from saelab.data.text import stdlib
from saelab.drivers.ai_scientist_v2 import global_seed
from saelab.seeding import study_seeds
from saelab.storage.atomic import read_json
from saelab.verdict.decision import read_decision

PLAN = """\
study = "tried"
base = "configs/small.toml"
target_l0 = 16
levels = []
seeds = {seeds}
sesoi = {sesoi}
comparisons = {comparisons}
"""
CANDIDATE = 'from saelab.study.plan import Arm\n\nARM = Arm("{name}", {changes}, "an idea")\n'


def study(folder: Path, sesoi: float = 0.02, seeds: int = 3, comparisons: int = 10) -> Project:
    """A folder made by `saelab template`, with a base and plan that take seconds."""
    assert cli(folder.parent, "template", folder.name).code == 0
    project, base = Project(folder), BASE
    for old, new in SMALLEST.items():
        base = base.replace(old, new)
    project.write("plan.toml", PLAN.format(sesoi=sesoi, seeds=seeds, comparisons=comparisons))
    project.write("configs/small.toml", base)
    for split in CHARACTERS:
        project.write(f"{split}.txt", "\n".join(stdlib.texts(split))[:20_000])
    return project


def write(project: Project, name: str, changes: str) -> None:
    project.write("candidate.py", CANDIDATE.format(name=name, changes=changes))


def ledger(project: Project, name: str) -> list[dict]:
    file = project.folder / ".saelab" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_template_has_what_agents_read(tmp_path: Path) -> None:
    folder = study(tmp_path / "study").folder
    head = (folder / "SKILL.md").read_text(encoding="utf-8").split("---\n")
    assert head[0] == "" and [line.split(":")[0] for line in head[1].splitlines()] == [
        "name", "description"
    ]  # fmt: skip
    assert all(f"\n## {part}\n" in head[2] for part in ("Protocol", "Results", "Analysis"))
    program = (folder / "program.md").read_text(encoding="utf-8")
    for word in ("candidate.py", "decision:", "results.tsv", "budget_left", "crash"):
        assert word in program
    ideas = read_json(folder / "ai_scientist_v2" / "sae_variants.json")
    fields = {"Name", "Title", "Short Hypothesis", "Related Work", "Abstract", "Experiments"}
    assert all(set(idea) == fields | {"Risk Factors and Limitations"} for idea in ideas)
    topic = (folder / "ai_scientist_v2" / "sae_variants.md").read_text(encoding="utf-8")
    assert re.findall(r"^#+ (.*)$", topic, re.M) == ["Title", "Keywords", "TL;DR", "Abstract"]
    code = (folder / "ai_scientist_v2" / "sae_variants.py").read_text(encoding="utf-8")
    assert f'STUDY = "{folder}"' in code and '__main__"' not in code


@pytest.mark.slow
def test_a_candidate_is_judged_and_extended(tmp_path: Path) -> None:
    """Equal cells are one comparison; seeds are added only where the decision asked for them."""
    project = study(tmp_path / "study", sesoi=0.005, seeds=2, comparisons=100)
    write(project, "faster", '{"train.lr": 1.2e-2}')
    ended = cli(project.folder, "try")
    assert ended.code == 0, ended.err
    lines = ended.out.rstrip("\n").splitlines()
    assert sum(line.startswith("decision: ") for line in lines) == 1
    action, seeds, numbers = read_decision(lines[-1])
    means = read_json(project.folder / "tries/try_1/final_info.json")["faster"]["means"]
    assert (action, numbers["arm"], numbers["seeds"]) == ("more-seeds", "faster", 2), numbers
    assert seeds is not None and means["decision"] == f"more-seeds {seeds}"
    assert means["needed_seeds"] == seeds and means["budget_left"] == numbers["budget_left"] < 1
    assert numbers["low"] < numbers["effect"] < numbers["high"]
    assert float(lines[-2].removeprefix("val_fvu: ")) == pytest.approx(numbers["value"], abs=1e-6)
    write(project, "another name", '{"train.lr": 1.2e-2}')
    again = cli(project.folder, "try")
    assert "try_1 was the same candidate" in again.out
    repeated = read_decision(again.out)[2]
    assert [repeated[k] for k in ("effect", "level", "budget_left")] == [
        numbers[k] for k in ("effect", "level", "budget_left")
    ]
    as_json = cli(project.folder, "try", "--json")
    assert as_json.code == 0 and "val_fvu" in as_json.err
    data = json.loads(as_json.out)
    assert not list(Draft202012Validator(schema_of("try")).iter_errors(data))
    assert (data["name"], data["decision"]) == ("try_3", f"more-seeds {seeds}")
    assert data["value"] == numbers["value"]
    refused = cli(project.folder, "try", "--seeds", str(seeds + 1))
    assert refused.code == 2 and f"asked for {seeds}" in refused.last
    more = cli(project.folder, "try", "--seeds", str(seeds))
    assert more.code == 0 and "(4 in the cache)" in more.err
    extended = read_decision(more.out)[2]
    assert extended["seeds"] == seeds and extended["level"] == numbers["level"] / 2
    looks = [line["look"] for line in ledger(project, "comparisons.jsonl") if "look" in line]
    assert looks == [1, 2]
    runs = [a["run"] for a in json.loads(cli(project.folder, "attempts", "--json").out)]
    assert runs == ["try_1", "try_2", "try_3", "try_4"]
    plan = read_json(project.folder / "tries/try_4/manifest.json")
    assert plan["deviations"] == [] and plan["plan"]["seeds"] == 2 and len(plan["seeds"]) == seeds


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("X = 1\n", "defines no RUNS"),
        ("ARM = 3\n", "candidate.py: ARM = 3: define the candidate"),
        (CANDIDATE.format(name="baseline", changes="{}"), "is the name of the other arm"),
        (CANDIDATE.format(name="a", changes='{"train.lrr": 1}'), "did you mean 'lr'"),
        (CANDIDATE.format(name="a", changes="{}"), "exactly the settings of 'baseline'"),
    ],
)
def test_bad_candidates(tmp_path: Path, text: str, sentence: str) -> None:
    project = Project.make_smallest(tmp_path / "study")
    project.write("candidate.py", text)
    ended = cli(project.folder, "try")
    assert ended.code == 2 and sentence in ended.last and "decision:" not in ended.out
    assert not list(project.folder.glob("tries/*"))
    ended = cli(project.folder, "try", "--file=experiment.py", "--seeds=4", "--set=train.lr=5e-3")
    assert ended.code == 2 and "no try of this candidate asked for more seeds" in ended.last


# ---------------------------------------------------------------- karpathy/autoresearch


@dataclass
class Researcher:
    """Edits one file, starts one command, greps, and keeps a table; commits are texts here."""

    project: Project
    kept: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def idea(self, name: str, changes: str) -> str:
        before = (self.project.folder / "candidate.py").read_text(encoding="utf-8")
        write(self.project, name, changes)
        ended = self._command()
        status, value = self._read(ended)
        if status.startswith("more-seeds"):
            status, value = self._read(self._command("--seeds", status.split()[1]))
        if status == "keep":
            self.kept.append(name)
        else:
            self.project.write("candidate.py", before)
        self.rows.append([name, value, "0", status, name])
        return status

    def _command(self, *arguments: str) -> Ended:
        """`python try.py`, as its two lines do it."""
        return cli(self.project.folder, "try", "--limit", "300", *arguments)

    def _read(self, ended: Ended) -> tuple[str, str]:
        """Decision and value, as a driver finds them in the log by the first word of a line."""
        log = ended.out + ended.err
        found = dict(re.findall(r"^(val_fvu|decision): ([^{\n]*)", log, re.M))
        return found.get("decision", "crash").strip(), found.get("val_fvu", "0")


def test_a_loop_of_autoresearch(tmp_path: Path) -> None:
    project = study(tmp_path / "study")
    driver = Researcher(project)
    assert driver.idea("worse", '{"train.lr": 1e-3}') in ("discard", "more-seeds")
    assert driver.idea("better", '{"train.lr": 1.2e-2}') == "keep"
    assert driver.idea("typo", '{"train.lrr": 1.2e-2}') == "crash"
    assert driver.kept == ["better"]
    assert "better" in (project.folder / "candidate.py").read_text(encoding="utf-8")
    values = [float(row[1]) for row in driver.rows]
    assert values[0] > values[1] > values[2] == 0
    code = (project.folder / "try.py").read_text(encoding="utf-8")
    assert called(project.folder, lambda: exec(code, {"__name__": "__main__"}), "--help").code == 0


# ---------------------------------------------------------------- AI-Scientist v2


class Queue:
    """Stands for stdout and stderr: it can be written and flushed, and nothing else."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def write(self, text: str) -> None:
        self.said.append(text)

    def flush(self) -> None: ...


def test_global_seeds() -> None:
    """A generator that nobody has seeded starts from a number of 64 bits."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    assert global_seed() == 7
    torch.seed()
    assert global_seed() is None
    torch.set_rng_state(state)


def execute(folder: Path, code: str) -> str:
    """Executes a node's file as the driver's interpreter does; gives what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runfile.py").write_text(code, encoding="utf-8")
    queue, state = Queue(), torch.get_rng_state()

    def run() -> None:
        with patch("sys.stdout", queue), patch("sys.stderr", queue):
            exec(compile(code, "runfile.py", "exec"), {})

    with as_if_fresh():
        ended = called(folder, run)
    torch.set_rng_state(state)
    assert ended.code == 0, ended.err + "".join(queue.said)
    return "".join(queue.said)


def seeded(seed: int) -> str:
    return (
        f"import random\nimport numpy as np\nimport torch\n"
        f"random.seed({seed})\nnp.random.seed({seed})\ntorch.manual_seed({seed})\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 1, 2)])
def test_ai_scientist_v2(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    """A node with a part of its own, then its repeats with global seeds."""
    project = study(tmp_path / "study")
    code = (project.folder / "ai_scientist_v2" / "sae_variants.py").read_text(encoding="utf-8")
    values, sets = [], []
    for seed in (None, *seeds):
        workspace = tmp_path / f"node_{seed}"
        with patch("torch.initial_seed", lambda: 2**40) if seed is None else as_if_fresh():
            said = execute(workspace, code if seed is None else seeded(seed) + code)
        assert ("no global seed is set" if seed is None else f"global seed {seed}: ") in said
        value = float(re.search(r"^validation_loss = (\S+)", said, re.M)[1])  # type: ignore[index]
        data = np.load(workspace / "working" / "experiment_data.npy", allow_pickle=True).item()
        (result,) = data.values()
        assert {"metrics", "losses", "predictions", "ground_truth"} <= set(result)
        assert len(result["metrics"]["val"]) == 3 and len(result["losses"]["train"]) > 1
        assert np.mean(result["metrics"]["val"]) == pytest.approx(value, abs=1e-6)
        assert list((workspace / "working").glob("*.png"))
        values.append(value)
        sets.append(read_json(project.folder / "tries" / result["try"] / "manifest.json"))
    assert len(set(values)) == 1 + len(seeds)
    names = ["explore", *(f"explore/global seed {seed}" for seed in seeds)]
    assert [m["seeds"] for m in sets] == [study_seeds("tried", name, 3) for name in names]
    given = [line for line in ledger(project, "comparisons.jsonl") if "look" in line]
    assert len({line["cells"] for line in given}) == len(given) == 1 + len(seeds)
