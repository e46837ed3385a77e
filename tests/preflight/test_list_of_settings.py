"""`saelab settings`: every setting from the code, and a config resolved."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from projects import ROOT, cli

import saelab
from saelab.config import Frozen
from saelab.parts import TABLE
from saelab.preflight.list_of_settings import (
    BASE,
    PLAN,
    WIDE,
    Setting,
    all_settings,
    find_settings,
    lines_of_settings,
    resolved_lines,
)
from saelab.study.plan import BaseConfig, PlanConfig

ROWS = all_settings()
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def leaves(config: type[Frozen]) -> set[str]:
    """Returns the names of the fields of a class that hold no settings of their own."""
    return {
        name
        for name, field in config.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Frozen))
    }


def row_of(name: str, where: str = BASE) -> Setting:
    (row,) = [row for row in ROWS if (row.where, row.name) == (where, name)]
    return row


def test_every_field_of_base_plan_and_parts_is_listed_once() -> None:
    names = [(row.where, row.name) for row in ROWS]
    assert len(names) == len(set(names)) > 200
    for where, config in ((BASE, BaseConfig), (PLAN, PlanConfig)):
        listed = {name.split("[")[0].split(".")[0] for place, name in names if place == where}
        assert leaves(config) <= listed == set(config.model_fields)
    for seam, kinds in TABLE.items():
        for kind, config in kinds.items():
            if not config.__module__.startswith("saelab."):
                continue  # registered by another test of this process
            listed = {name for place, name in names if place == f"{seam} {kind}"}
            assert {"kind"} | listed >= leaves(config)


def test_every_setting_has_type_default_and_meaning() -> None:
    odd = [row for row in ROWS if not (row.type and row.default and row.meaning)]
    assert not odd
    assert not [row for row in ROWS if row.meaning.startswith("Settings of")]


def test_types_ranges_and_defaults_are_those_of_the_code() -> None:
    assert row_of("train.lr") == Setting(
        BASE, "train.lr", "number", "0.001", "> 0", "Adam's learning rate for the weights."
    )
    assert row_of("sae.d_sae").range == "> 0, <= 67,108,864"
    assert row_of("train.decay").range == ">= 0, <= 1"
    assert row_of("layout").range == '"rows" or "contexts"'
    assert row_of("activations").default == "not set"
    assert row_of("study", PLAN).default == "required"
    assert row_of("settings[].name", PLAN).type == "text"
    assert row_of("k", "activation topk").type == "whole number or text"
    assert row_of("sae.controllers").default.startswith('[{ kind = "l0_target"')


@pytest.mark.parametrize("columns", [60, 80, WIDE, 160])
def test_no_terminal_cuts_or_exceeds(columns: int) -> None:
    text = list(lines_of_settings(ROWS, columns))
    assert max(map(len, text)) <= columns
    whole = " ".join(" ".join(text).split())
    assert "…" not in whole and "Adam's learning rate for the weights." in whole
    if columns < WIDE:
        assert all(" ".join(row.meaning.split()) in whole for row in ROWS)


def test_names_choose(tmp_path: Path) -> None:
    assert {row.name.split(".")[0] for row in find_settings(["train"])} == {"train"}
    assert {row.where for row in find_settings(["l0_target"])} == {"controller l0_target"}
    ended = cli(tmp_path, "settings", "train.lrr")
    assert ended.code == 2 and "did you mean 'train.lr'" in ended.last
    rows = json.loads(cli(tmp_path, "settings", "train", "--json").out)
    assert {"where", "name", "type", "default", "range", "meaning"} == set(rows[0])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_a_resolved_config_is_the_same_config(config: Path) -> None:
    base = saelab.settings(config)
    text = "\n".join(resolved_lines(base))
    assert BaseConfig.parse(tomllib.loads(text)) == base


def test_show_says_what_is_not_the_default(tmp_path: Path) -> None:
    config = str(ROOT / "configs/embedded.toml")
    ended = cli(tmp_path, "settings", "--show", config, "--set", "train.decay=0.3")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert "train.lr = 0.008  # default: 0.001" in lines
    assert "train.decay = 0.3  # default: 0.2" in lines
    assert "train.warmup = 0.05" in lines and "# activations is not set" in lines
    both = cli(tmp_path, "settings", "train", "--show", config)
    assert both.code == 2 and "leave them out" in both.last
    alone = cli(tmp_path, "settings", "--set", "train.lr=1")
    assert alone.code == 2 and "--show" in alone.last
