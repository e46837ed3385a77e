"""`[[settings]]` of plan.toml: what is read, resolved and registered."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from saelab.errors import SettingError, SourceError
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells, read_base
from saelab.study.registry import changes, plan_hash, register, registered_settings
from saelab.study.setting_bases import setting_bases
from saelab.study.settings import MOST_SETTINGS
from saelab.study.task import Launch

ROOT = Path(__file__).parents[2]
TEXT = """
study = "s"

[[settings]]
name = "early"
changes = { hook_name = "blocks.1.hook_resid_post" }

[[settings]]
name = "other"
base = "other.toml"
changes = { "sae.d_sae" = 512, "train.lr" = 1e-3 }
"""
RUN = Run("a run", [Arm("baseline")])


def plan(text: str = TEXT) -> PlanConfig:
    return PlanConfig.parse(tomllib.loads(text), where="plan.toml")


def test_a_setting_is_a_base_with_changes(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("context = 32\n[sae]\nd_sae = 64\n")
    bases = setting_bases(plan(), BaseConfig(), tmp_path, RUN)
    assert list(bases) == ["early", "other"]
    assert bases["early"] == BaseConfig().patched({"hook_name": "blocks.1.hook_resid_post"})
    assert (bases["other"].context, bases["other"].sae.d_sae) == (32, 512)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "other"', 'name = "early"', ("settings.name = 'early'", "occurs twice")),
        ('name = "other"', 'name = "base"', ("settings.1.name", "the plan's own base")),
        ('name = "other"', 'name = "a/b"', ("settings.1.name", "names a folder")),
        ('name = "other"', "", ("settings.1.name", "required")),
        ("changes =", "change =", ("settings.0.change", "did you mean 'changes'")),
        ("hook_name", "hook_nam", ("settings 'early': hook_nam", "did you mean 'hook_name'")),
        ('"sae.d_sae" = 512', '"sae.d_sae" = "x"', ("settings 'other': sae.d_sae", "integer")),
        ("blocks.1.", "blocks.2.", ("settings = 'early'", "of the plan's own base", "leave it")),
        (
            '{ "sae.d_sae" = 512, "train.lr" = 1e-3 }',
            '{ context = 128, hook_name = "blocks.1.hook_resid_post" }',
            ("settings = 'other'", "exactly the settings of the setting 'early'"),
        ),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, old: str, new: str, words: tuple[str]) -> None:
    (tmp_path / "other.toml").write_text("context = 32\n")
    assert TEXT.count(old) == 1 or old in ("changes =", "blocks.1.")
    with pytest.raises(SettingError) as error:
        setting_bases(plan(TEXT.replace(old, new, 1)), BaseConfig(), tmp_path, RUN)
    for word in words:
        assert word in str(error.value), error.value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"other\.toml does not exist"):
        setting_bases(plan(), BaseConfig(), tmp_path, RUN)


def test_settings_that_only_a_run_makes_equal_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("context = 32\n")
    same = Run("a run", [Arm("baseline")], {"hook_name": "blocks.1.hook_resid_post"})
    with pytest.raises(SettingError, match="'early': has exactly the settings of the plan's own"):
        setting_bases(plan(), BaseConfig(), tmp_path, same)


def test_too_many_settings_are_refused() -> None:
    names = [{"name": f"s{i}", "changes": {"train.lr": 1e-3 + i}} for i in range(MOST_SETTINGS)]
    assert len(PlanConfig.parse({"study": "s", "settings": names}).settings) == MOST_SETTINGS
    with pytest.raises(SettingError, match="settings"):
        PlanConfig.parse({"study": "s", "settings": [*names, {"name": "more"}]})


def test_settings_are_registered_and_a_plan_without_them_keeps_its_hash(tmp_path: Path) -> None:
    without = plan('study = "s"')
    assert "settings" not in registered_settings(without)  # as in versions that knew none
    assert plan_hash(plan()) != plan_hash(without)
    assert register(tmp_path, without) == ()
    (deviation,) = register(tmp_path, plan())
    assert deviation.startswith("settings: [] -> ") and "early" in deviation
    (back,) = changes(plan(), without)
    assert back.startswith("settings: [{") and back.endswith(" -> []")


def test_every_setting_has_a_name_and_seeds_of_its_own() -> None:
    task = Launch(
        name="run_1", run=RUN, plan=plan(), base=BaseConfig(), out_dir=Path("x"), root=Path()
    )
    assert (task.label, task.seed_stream) == ("run_1", "explore")
    early = Launch(**(vars(task) | {"setting": "early"}))
    assert (early.label, early.seed_stream) == ("run_1/settings/early", "explore/early")


@pytest.mark.parametrize(("page", "names"), [("README.md", 2), ("docs/verdict.md", 3)])
def test_settings_in_the_documentation_can_be_used(page: str, names: int) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if "[[settings]]" in block)
    documented, base = plan(f'study = "s"\n{block}'), read_base(ROOT / "configs/embedded.toml")
    bases = setting_bases(documented, base, ROOT, RUN)
    assert len(bases) == names
    for resolved in bases.values():
        assert cells(documented, resolved, RUN)
