"""The battery catches parts with one mistake each, by the check that is meant for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_parts import BROKEN, FromWeights, Rectifier, Term, case_of, config_of
from projects import as_if_fresh
from typer.testing import CliRunner

from saelab.checks.battery import lines_of, name_of, run_battery
from saelab.cli import app
from saelab.errors import SettingError
from saelab.parts import TABLE, register


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Puts the table back as it was."""
    before = {seam: dict(kinds) for seam, kinds in TABLE.items()}
    yield
    for seam, kinds in before.items():
        TABLE[seam].clear()
        TABLE[seam].update(kinds)


@pytest.mark.parametrize(
    ("seam", "check", "part"), BROKEN, ids=[part.__name__ for _, _, part in BROKEN]
)
def test_each_mistake_is_caught(seam: str, check: str, part: type[Any]) -> None:
    register(seam, config_of(part))
    case = case_of(seam, part)
    findings = [finding for finding in run_battery(case) if finding.mistake]
    failed = {finding.check for finding in findings}
    assert check in failed and "settings" not in failed, findings
    named = next(finding for finding in findings if finding.check == check)
    assert any(line.startswith("FAILS") for line in lines_of(findings))
    assert "\n" not in named.mistake
    assert len(named.mistake) > 30 and ": " in named.mistake


PLAIN: list[tuple[str, type[Any]]] = [("loss", Term), ("activation", Rectifier)]
PLAIN.append(("activation", FromWeights))


@pytest.mark.parametrize(("seam", "part"), PLAIN)
def test_the_parts_that_they_are_made_of_pass(seam: str, part: type[Any]) -> None:
    register(seam, config_of(part))
    findings = list(run_battery(case_of(seam, part)))
    assert not [finding for finding in findings if finding.mistake]
    assert {finding.check for finding in findings} >= {name for name in ("forget", "resume")}
    assert len(findings) > (17 if seam == "activation" else 12)


def test_a_start_that_has_no_effect_is_refused() -> None:
    register("activation", config_of(FromWeights))
    config = case_of("activation", FromWeights).settings(64, initial_l0=4)
    with pytest.raises(SettingError, match="initial_l0 = 4.*leave it out"):
        config.build(8)


FILE = """
from typing import Literal

import saelab
from saelab.parts.base import LossTerm, PartConfig


class MineConfig(PartConfig):
    kind: Literal["mine"] = "mine"

    def build(self, dims):
        return Mine()


class Mine(LossTerm):
    def loss(self, p):
        return (p.recon - p.target).square().mean(){end}


{register}
RUNS = {{}}
"""


@pytest.mark.parametrize(
    ("end", "register", "code", "words"),
    [
        ("", 'saelab.register("loss", MineConfig)', 0, ["ok", "loss-mine", "resume"]),
        (
            ".sum(1)",
            'saelab.register("loss", MineConfig)',
            2,
            ["FAILS  loss-mine  preactivations, loss,"],
        ),
        (
            ".oops",
            'saelab.register("loss", MineConfig)',
            2,
            ["no attribute 'oops' (experiment.py:17)"],
        ),
        ("", "", 2, ["registers no part", "saelab.register"]),
    ],
)
def test_the_command(end: str, register: str, code: int, words: list[str], tmp_path: Path) -> None:
    with as_if_fresh():
        file = tmp_path / "experiment.py"
        file.write_text(FILE.format(end=end, register=register))
        done = CliRunner().invoke(app, ["check-part", str(file)])
    assert done.exit_code == code and "Traceback" not in done.output
    assert all(word in done.output for word in words), done.output
    assert "\\n" not in done.output and done.output.count(words[-1]) == 1


def test_the_command_prints_the_list_where_a_check_fails_too(tmp_path: Path) -> None:
    with as_if_fresh():
        file = tmp_path / "experiment.py"
        file.write_text(FILE.format(end=".oops", register='saelab.register("loss", MineConfig)'))
        done = CliRunner().invoke(app, ["check-part", str(file), "--json"])
    rows = json.loads(done.stdout)
    failed = [row for row in rows if row["mistake"]]
    assert done.exit_code == 2 and 3 < len(failed) < len(rows)
    assert {row["place"] for row in failed} == {"experiment.py:17"}
    assert f"{len(failed)} of {len(rows)} checks fail: correct the part" in done.stderr


def test_every_check_has_something_that_it_catches() -> None:
    """But for those that hold by composition."""
    caught = {check for _, check, _ in BROKEN}
    assert caught >= {"per_latent", "forget", "saved_state", "loss", "update", "gradients", "pass"}
    assert caught >= {"export", "paths", "rows", "scalars", "parameters"}
    assert name_of(test_each_mistake_is_caught) == "test_each_mistake_is_caught"
