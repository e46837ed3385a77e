"""Resolved base settings of every setting of a plan."""

from __future__ import annotations

from pathlib import Path

from saelab.errors import SettingError, naming_setting
from saelab.study.plan import BaseConfig, PlanConfig, Run, read_base
from saelab.study.settings import OF_PLAN


def setting_bases(
    plan: PlanConfig, base: BaseConfig, root: Path, run: Run
) -> dict[str, BaseConfig]:
    """Returns the base settings of each setting besides the plan's own, by name.

    Args:
        base: of the plan.
        root: folder of plan.toml.
        run: whose changes come on top of every setting, and could make two of them equal.

    Raises: SourceError for a missing file; SettingError for two settings of one name, for a change
        that is refused, or for a setting that equals another one.
    """
    bases: dict[str, BaseConfig] = {}
    equal = {base.patched(dict(run.changes)).digest(): OF_PLAN}
    for setting in plan.settings:
        if setting.name in bases:
            raise SettingError("settings.name", setting.name, "occurs twice: names must differ")
        with naming_setting(f"settings {setting.name!r}: "):
            found = base if setting.base is None else read_base(root / setting.base)
            bases[setting.name] = found.patched(dict(setting.changes))
            digest = bases[setting.name].patched(dict(run.changes)).digest()
        if digest in equal:
            same = equal[digest]
            whole = "the plan's own base" if same == OF_PLAN else f"the setting {same!r}"
            remedy = f"has exactly the settings of {whole}: change it or leave it out"
            raise SettingError("settings", setting.name, remedy)
        equal[digest] = setting.name
    return bases
