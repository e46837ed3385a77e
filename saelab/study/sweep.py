"""Sweeps: an arm for each combination of settings, all on one stream, and the best of them.

    RUNS["run_11"] = Run("Rates", [Arm("baseline"), *grid({"train.lr": [1e-3, 2e-3]})])

is a run as any other, whose arms get their words. `saelab sweep` needs no run table, uses seeds
that no verdict uses, and names the best arm by the rule of tuning (`tuning.choose_best`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from saelab.errors import SettingError
from saelab.runtime.counting import count
from saelab.study.plan import BASELINE, Arm, BaseConfig, PlanConfig, Run, arm_settings
from saelab.study.tuning import choose_best, declare_twins

#: Arms of a sweep at most. Our choice: a table above it can't be read, and a typing error would
#: train for days.
MOST_ARMS = 256


def grid(over: Mapping[str, Sequence[Any]], together: bool = False) -> list[Arm]:
    """Returns an arm for each combination of values.

    Args:
        over: dotted setting -> its values, for example {"train.lr": [1e-3, 2e-3]}.
        together: the first values of all settings are one arm, the second ones the next, and so on,
            instead of all combinations.

    Raises: SettingError for a setting without values, lists of different lengths that go together,
        and more than MOST_ARMS arms.
    """
    for name, values in over.items():
        if not values:
            raise SettingError("--over", name, "name its values: --over train.lr=[1e-3,2e-3]")
    lengths = {name: len(values) for name, values in over.items()}
    if together and len(set(lengths.values())) > 1:
        raise SettingError("--together", lengths, "give all settings equally many values")
    n = max(lengths.values(), default=0) if together else math.prod(lengths.values())
    if n > MOST_ARMS:
        remedy = f"use at most {MOST_ARMS}: leave values out"
        raise SettingError("--over", count(n, "arm"), remedy)
    rows = zip(*over.values(), strict=True) if together else itertools.product(*over.values())
    labels = _labels(list(over))
    arms = []
    for row in rows:
        changes = dict(zip(over, row, strict=True))
        named = (f"{labels[name]} {_format_value(value)}" for name, value in changes.items())
        arms.append(Arm(", ".join(named), changes))
    return arms


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Last parts of dotted names; whole names where two end alike."""
    ends = Counter(name.rpartition(".")[2] for name in names)
    return {n: end if ends[end := n.rpartition(".")[2]] == 1 else n for n in names}


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping) and "kind" in value:
        others = {name: part for name, part in value.items() if name != "kind"}
        inner = ", ".join(f"{name} {_format_value(part)}" for name, part in others.items())
        return f"{value['kind']} ({inner})" if inner else str(value["kind"])
    if isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    return f"{value:g}" if isinstance(value, int | float) else json.dumps(value)


def sweep_run(over: Mapping[str, Sequence[Any]], base: BaseConfig, together: bool = False) -> Run:
    """Returns the run of a sweep: the config as it is, and the arms of `grid`.

    Raises: SettingError as `grid` does, and for a setting that must be one for all arms.
    """
    title = f"Sweep over {', '.join(over)}"
    arms = [replace(arm, primary=True) for arm in grid(over, together)]  # with all levels and seeds
    return declare_twins(Run(title, [Arm(BASELINE), *arms]), base)


def check_free_of_l0(run: Run, base: BaseConfig, plan: PlanConfig) -> None:
    """Refuses a sweep over what the L0 itself sets: its arms would all be the same.

    Raises: SettingError.
    """
    if plan.target_l0 is None:
        return
    settings = {arm.name: arm_settings(base, run, arm) for arm in run.arms}
    cells: dict[str, str] = {}
    for name, one in settings.items():
        at_target = one.patched({"sae": one.sae.at_l0(plan.target_l0)}).digest()
        other = cells.setdefault(at_target, name)
        if settings[other].digest() != one.digest():
            remedy = f"is {other!r} at an L0 of {plan.target_l0:g}: sweep over L0s by --levels"
            raise SettingError("--over", name, remedy)


def summarise(
    run: Run, plan: PlanConfig, info: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """Returns the best arm of a sweep and the numbers of every arm.

    Args:
        info: final_info.json of the sweep.

    Returns: the best arm, None where no arm can be it; and name -> changes, value of the primary
        metric, L0, and why the arm can't be the best ('' where it can).
    """
    nothing: Mapping[str, Any] = {"means": {}}  # an arm without any valid cell is not in `info`
    tried = {arm.name: info.get(arm.name, nothing) for arm in run.arms}
    best, left_out = choose_best(tried, plan, list(tried).index)
    rows = {}
    for arm in run.arms:
        means = tried[arm.name]["means"]
        rows[arm.name] = {
            "changes": dict(arm.changes),
            plan.primary: means.get(plan.primary),
            "l0": means.get("l0"),
            "left_out": left_out.get(arm.name, ""),
        }
    return best, rows
