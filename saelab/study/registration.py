"""Base settings and run table as they are registered, and how later ones differ from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from saelab.errors import SettingError
from saelab.study.plan import Arm, BaseConfig, Confirmation, Run

#: Base settings on which no number depends.
UNREGISTERED_BASE = {"tracker", "parallel"}
#: What a registered value is called that one side does not have.
ABSENT = "none"


def describe_base(base: BaseConfig) -> dict[str, Any]:
    """Returns the base settings that are registered, as plain data."""
    return base.model_dump(mode="json", exclude=UNREGISTERED_BASE)


def describe_runs(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Returns what a run table asks for, as plain data; titles and comments are left out."""
    return {name: _describe_run(run) for name, run in runs.items()}


def _describe_run(run: Run) -> dict[str, Any]:
    described = {
        "changes": _plain(run.changes),
        "arms": {arm.name: _describe_arm(arm) for arm in run.arms},
    }
    if run.tuned:
        described |= {"tuned": True}
    if isinstance(run, Confirmation):
        described |= {"among": list(run.among), "leave": list(run.leave)}
    return described


def _describe_arm(arm: Arm) -> dict[str, Any]:
    names = ("changes", "primary", "against", "levels", "expected", "module")
    return {name: _plain(getattr(arm, name)) for name in names}


def _plain(value: Any) -> Any:
    """Returns a value in the form in which JSON gives it back; a function by its name."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def base_changes(old: Mapping[str, Any], new: BaseConfig, where: str = "base") -> list[str]:
    """Lists the differences of base settings, as in 'base.train.lr: 0.001 -> 0.002'.

    Args:
        old: as registered; settings that a newer version added have their defaults.
        where: name of the base settings.
    """
    try:
        before = describe_base(BaseConfig.parse(dict(old)))
    except SettingError:  # of an older version, which had other settings
        before = old
    return list(_value_changes(where, before, describe_base(new)))


def _value_changes(name: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _value_changes(f"{name}.{key}", old.get(key, ABSENT), new.get(key, ABSENT))
    elif old != new:
        yield f"{name}: {json.dumps(old)} -> {json.dumps(new)}"


def run_changes(old: Mapping[str, Any], runs: Mapping[str, Run]) -> list[str]:
    """Lists the differences of a run table from the registered one.

    Args:
        old: as registered.
    """
    new, lines = describe_runs(runs), []
    if added := [name for name in new if name not in old]:
        lines.append(f"added after registration: {', '.join(added)}")
    if removed := [name for name in old if name not in new]:
        lines.append(f"no longer in the run table: {', '.join(removed)}")
    for name in (name for name in new if name in old):
        before, after = dict(old[name]), dict(new[name])
        arms_before, arms_after = before.pop("arms"), after.pop("arms")
        lines += _value_changes(name, before, after)
        for arm in dict.fromkeys([*arms_before, *arms_after]):
            if arms_before.get(arm) != arms_after.get(arm):
                lines.append(f"{name}: arm {arm!r} {_how(arm, arms_before, arms_after)}")
    return lines


def _how(arm: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if arm not in before:
        return "added after registration"
    return "changed" if arm in after else "removed"
