"""--json: one JSON value on stdout for every command, as `saelab schema` describes it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from projects import Project, cli

from saelab.cli import COMMANDS, app, lm_group, plan_group
from saelab.cli.outputs import OUTPUTS, error_schema, schema_of

GROUPS = {id(app): "", id(plan_group): "plan ", id(lm_group): "lm "}
NAMES = [GROUPS[id(group)] + name for group, name, _ in COMMANDS]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project.make_smallest(tmp_path_factory.mktemp("json") / "project")
    ended = cli(made.folder, "run", "run_1", "--json")
    assert ended.code == 0, ended.err
    check("run", ended.out)
    assert "train" in ended.err
    return made


def check(command: str, out: str) -> Any:
    """Checks an output against its schema, and that the schema has a meaning for every field."""
    data, schema = json.loads(out), schema_of(command)
    Draft202012Validator.check_schema(schema)
    errors = [error.message for error in Draft202012Validator(closed(schema)).iter_errors(data)]
    assert not errors, errors[:3]
    return data


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without room for fields that it does not name."""
    shut = copy.deepcopy(schema)
    for one in [shut, *shut.get("$defs", {}).values()]:
        if "properties" in one:
            one.setdefault("additionalProperties", False)
    return shut


def test_the_script_of_the_page_reads_a_run(project: Project) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/json.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    called = script.replace('["saelab",', '[sys.executable, "-m", "saelab",')
    assert called != script
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{called}"],
        cwd=project.folder,
        capture_output=True,
        text=True,
    )
    (comparison,) = check("verdict", cli(project.folder, "verdict", "run_1", "--json").out)[0][
        "comparisons"
    ]
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"run_1 {comparison['arm']} {comparison['word']}")


def test_later_versions_may_add_fields() -> None:
    schema = schema_of("latent")
    assert '"additionalProperties": false' not in json.dumps(schema)
    assert closed(schema)["additionalProperties"] is False


def test_every_command_has_json_and_a_schema() -> None:
    from typer.main import get_command

    assert sorted(OUTPUTS) == sorted(NAMES)
    root: Any = get_command(app)
    for name in NAMES:
        command: Any = root
        for word in name.split():
            command = command.commands[word]
        assert any("--json" in option.opts for option in command.params), name


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for title, one in [("", schema), *schema.get("$defs", {}).items()]:
        for name, field in one.get("properties", {}).items():
            yield f"{title}.{name}", field


@pytest.mark.parametrize("command", OUTPUTS)
def test_every_field_has_a_meaning(command: str) -> None:
    assert not [name for name, field in fields(schema_of(command)) if not field.get("description")]


ASKED = [
    ("verdict", ("run_1",)),
    ("plan check", ()),
    ("plan cost", ("configs/small.toml", "--tokens", "100000")),
    ("attempts", ()),
    ("watch", ("run_1",)),
    ("report", ("run_1", "--cells", "0")),
    ("difference", ("run_1", "rate", "baseline")),
    ("probing", ("run_1",)),
    ("eval", ("run_1", "--evals", "core", "--arm", "baseline")),
    ("export", ("run_1", "--out", "exported", "--arm", "baseline")),
    ("push", ("run_1", "hub:me/saes", "--dry-run", "--arm", "baseline", "--out", "pushed")),
    ("parts", ()),
    ("parts", ("jumprelu",)),
    ("parts", ("kl",)),
    ("settings", ("train",)),
    ("settings", ("--show", "configs/small.toml")),
    ("template", ("study", "--minimal")),
    ("schema", ()),
]


@pytest.mark.parametrize(("command", "arguments"), ASKED, ids=str)
def test_stdout_is_what_the_schema_says(
    command: str, arguments: tuple[str, ...], project: Project
) -> None:
    ended = cli(project.folder, *command.split(), *arguments, "--json")
    assert ended.code == 0, ended.err
    check(command, ended.out)


def test_simulated_rows() -> None:
    from dataclasses import asdict

    from saelab.verdict.simulation.rows import Row

    row = asdict(Row(promise="p", cells="c", studies=100, observed=0.1, low=0.0, high=0.2)) | {
        "kept": True
    }
    check("verdict", json.dumps([row]))


def test_a_latent_and_a_steered_text(project: Project) -> None:
    cell = str(project.first_cell().relative_to(project.folder))
    ended = cli(project.folder, "latent", cell, "3", "--json")
    assert ended.code == 0, ended.err
    assert check("latent", ended.out)["latent"] == 3
    asked = ("--latent", "3", "--by", "4", "--prompt", "def", "--tokens", "2", "--json")
    ended = cli(project.folder, "steer", cell, *asked)
    assert ended.code == 0, ended.err
    assert check("steer", ended.out)["prompt"] == "def"


def test_a_training(project: Project) -> None:
    asked = ("configs/small.toml", "--out_dir", "out", "--json")
    ended = cli(project.folder, "train", *asked)
    assert ended.code == 0, ended.err
    data = check("train", ended.out)
    assert data["means"]["fvu"] > 0 and all(
        (project.folder / f).is_dir() for f in data["cells"].values()
    )


@pytest.mark.parametrize(
    ("arguments", "kind", "setting"),
    [
        (("verdict", "nowhere"), "SourceError", None),
        (
            ("train", "configs/small.toml", "--out_dir", "x", "--set", "train.lr=-1"),
            "SettingError",
            "train.lr",
        ),
        (("parts", "relo"), "SettingError", "NAME"),
        (("plan", "check", "run_9"), "SettingError", None),
    ],
    ids=str,
)
def test_a_refusal_is_an_object_and_one_sentence(
    arguments: tuple[str, ...], kind: str, setting: str | None, project: Project
) -> None:
    ended = cli(project.folder, *arguments, "--json")
    assert ended.code == 2
    data = json.loads(ended.out)
    assert not list(Draft202012Validator(error_schema()).iter_errors(data))
    problem = data["error"]
    assert problem["type"] == kind and problem["exit_code"] == 2
    assert problem["message"] in ended.err and "Traceback" not in ended.err
    if setting:
        assert problem["setting"] == setting and problem["remedy"]


def test_without_json_stdout_stays_empty_when_refused(project: Project) -> None:
    ended = cli(project.folder, "verdict", "nowhere")
    assert ended.code == 2 and not ended.out


def test_a_number_that_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    from saelab.cli.common import show

    show(True, {"a": float("nan"), "b": [float("inf"), (1.5,)]}, ())
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, [1.5]]}
