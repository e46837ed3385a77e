"""The pages of docs/reference that are written from the code say what the code says."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import saelab
from saelab.parts import TABLE
from saelab.preflight.list_of_settings import Setting, all_settings

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def writer() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "docs" / "tools"))
        yield load_writer()


def load_writer() -> Any:
    spec = importlib.util.spec_from_file_location(
        "docs_reference", ROOT / "docs" / "tools" / "reference.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "parts.md", "commands.md", "json.md"])
def test_a_page_is_what_the_code_gives(writer: Any, name: str) -> None:
    written = (REFERENCE / name).read_text(encoding="utf-8")
    same = writer.PAGES[name]() == written
    assert same, f"{name} is stale: run `python docs/tools/reference.py`"


def registered_elsewhere() -> set[str]:
    """Returns parts that another test of this process has registered, as the pages name them."""
    return {
        f"{seam} {kind}"
        for seam, kinds in TABLE.items()
        for kind, config in kinds.items()
        if not config.__module__.startswith("saelab.")
    }


def test_every_setting_is_in_a_page() -> None:
    base = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    sections = (REFERENCE / "parts.md").read_text(encoding="utf-8").split("\n### ")
    parts = {name: text for name, _, text in (section.partition("\n") for section in sections)}
    rows = [row for row in all_settings() if row.where not in registered_elsewhere()]
    assert len(rows) > 200
    for row in rows:
        page = parts.get(row.where, base)
        assert f"\n| `{row.name}` |" in page, row


def test_examples_are_values_that_the_code_takes(writer: Any) -> None:
    """Every example sets its setting, to another value than the default."""
    text = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w.]+)` \| .* \| `([^`]*)` \| `([^`]+ = [^`]+)` \|", text, re.M)
    assert len(shown) > 50
    for name, default, line in shown:
        place = "plan.toml" if name in PLAN_NAMES else writer.BASE
        settings = writer.parse_file(place, line)
        value = settings
        for key in name.split("."):
            value = getattr(value, key)
        assert f"= {default}" not in line, line
        assert value is not None, line


PLAN_NAMES = {row.name for row in all_settings() if row.where == "plan.toml"}


def test_a_setting_without_an_example_is_named(writer: Any) -> None:
    unknown = Setting(writer.BASE, "new", "text", '"a"', "", "a setting that no rule knows.")
    with pytest.raises(ValueError, match="new: write an example"):
        writer.example_of_file(unknown, {})
    refused = Setting(writer.BASE, "train.lr", "number", "0.001", "> 0", "the rate.")
    assert writer.example_of_file(refused, {"train.lr": -1.0}) == "train.lr = 0.002"


def test_the_api_page_ends_with_the_signatures(writer: Any) -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    assert text == writer.with_signatures(text)
    assert "\nattach(model, sae, hook=None, *" in text


def test_the_api_page_has_every_public_name() -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: saelab\.(\w+)$", text, re.M)) == sorted(saelab.__all__)
