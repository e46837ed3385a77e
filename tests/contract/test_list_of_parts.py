"""`saelab parts`: every registered part and every preset, and what is said of one."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from saelab.checks.examples import cases
from saelab.checks.list_of_parts import describe
from saelab.cli import app
from saelab.parts.presets import PRESETS
from saelab.sae import SAEConfig


def answer(*words: str) -> str:
    done = CliRunner().invoke(app, ["parts", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_part_is_listed_with_a_line_about_it() -> None:
    listed = json.loads(answer("--json"))
    first = cases(64, first=True, with_model=True)
    every = [(case.seam, case.kind) for case in first]
    every += [("preset", name) for name in PRESETS]
    assert [(part["seam"], part["kind"]) for part in listed] == every
    # a part that another test registered in this process may have no docstring
    own = [(c.seam, c.kind) for c in first if not type(c.part).__module__.startswith("saelab.")]
    about = {place: part["about"] for place, part in zip(every, listed, strict=True)}
    assert not [place for place in about if len(about[place]) <= 10 and place not in own]
    assert len(answer().splitlines()) == len(every)


def test_one_part() -> None:
    text = answer("abs_topk")
    assert "2510.00404" in text and "k = 32" in text
    assert "on several processes: yes" in text and "written for other tools: yes" in text
    assert "must stand beside it" in answer("scalar_prior")


@pytest.mark.parametrize("kind", sorted({case.kind for case in cases(64, with_model=True)}))
def test_each_can_be_described(kind: str) -> None:
    parts = [part for part in describe(kind) if part["seam"] != "preset"]
    assert parts and all(part["about"] and "lr" in part["settings"] for part in parts)


def test_a_preset_says_what_it_stands_for() -> None:
    text = answer("gated")
    assert text.startswith("preset gated\nRajamanoharan et al. 2024a (2404.16014)")
    assert 'constraints = [{ kind = "unit_norm" }]' in text
    assert "differs from its source: b_enc is a third bias" in text
    assert "activation gated" in text  # the part of this name is described as well
    assert "losses" in json.loads(answer("bricken", "--json"))[0]["settings"]


def test_an_unknown_name_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["parts", "jumprelo"])
    assert done.exit_code == 2 and "did you mean 'jumprelu'" in done.output
    assert "Traceback" not in done.output


def test_constraints_say_whether_rows_have_norm_1() -> None:
    for weight, keeps in (("decoder", True), ("encoder", False)):
        parts = {"constraints": [{"kind": "unit_norm", "weight": weight}, "frozen"]}
        sae = SAEConfig.parse({"d_sae": 8, **parts}).build(4)
        assert [part.fixes_decoder_norms for part in sae.config.constraints] == [keeps, True]
