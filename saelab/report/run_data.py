"""Reads the files of a run folder for figures and pages.

    final_info.json     means, standard errors and per-seed values of every arm; required
    manifest.json       title, baseline, target L0, arms in their order, smallest effect of interest
    metrics.parquet     every measured number, a missing one with its reason
    curves.parquet      scalars over training

A file that is not as the launch wrote it is refused (runs/folder.py). The last three may be
absent. Without metrics.parquet the per-seed values of final_info.json take its place, so that a
folder with that file alone still gives pictures.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saelab.runs.folder import RunFolder
from saelab.runs.random_code import complete_losses
from saelab.runs.schema import CONTROL, MARK, QUICK
from saelab.runtime.safe_text import visible

if TYPE_CHECKING:
    from saelab.verdict.across_settings import AcrossSettings
    from saelab.verdict.judge import Comparison

#: Arm -> group of final_info.json -> its content.
Info = dict[str, dict[str, Any]]


class Value(NamedTuple):
    """One number of one cell; `value` is None where `reason` says why it is missing."""

    arm: str
    seed: int
    level: float
    value: float | None
    reason: str


class Curve(NamedTuple):
    """One scalar of one cell over training: tokens int64 [n] ascending, values float64 [n]."""

    tokens: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        name: of the folder, for example 'run_1'.
        title: for people.
        info: final_info.json.
        manifest: manifest.json, {} without one.
        values: (metric, slice) -> values, those of single classes left out.
        curves: (scalar, arm) -> seed -> curve, at the target L0.
        across: every arm over the settings of the run; () without further settings.
    """

    name: str
    title: str
    info: Info
    manifest: dict[str, Any] = field(default_factory=dict)
    values: Mapping[tuple[str, str], list[Value]] = field(default_factory=dict)
    curves: Mapping[tuple[str, str], dict[int, Curve]] = field(default_factory=dict)
    across: Sequence[AcrossSettings] = ()

    @cached_property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with; the first arm where none is named."""
        name = self.manifest.get("baseline", "baseline")
        return name if name in self._all_arms else next(iter(self._all_arms), "")

    @cached_property
    def arms(self) -> tuple[str, ...]:
        """The baseline, then the others in the manifest's order; no controls."""
        others = [arm for arm in self._all_arms if arm != self.baseline]
        return (self.baseline, *others) if self.baseline else ()

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Control subjects in the order of their first number."""
        return tuple(arm for arm in self._measured_arms if arm.startswith(CONTROL))

    @cached_property
    def _all_arms(self) -> dict[str, None]:
        names = [*self.manifest.get("arms", ()), *self.info, *self._measured_arms]
        return {name: None for name in names if not name.startswith(CONTROL)}

    @cached_property
    def _measured_arms(self) -> dict[str, None]:
        return {value.arm: None for rows in self.values.values() for value in rows}

    @cached_property
    def target_l0(self) -> float | None:
        """L0 at which arms are compared, in latents per token; None where it is not recorded."""
        recorded = self.manifest.get("target_l0")
        return _choose_target(recorded, (v.level for rows in self.values.values() for v in rows))

    @cached_property
    def scalars(self) -> list[str]:
        """Names of the learned scalars that some arm's training was followed by, in the order of
        the file: those that have rows `convergence.<name>`."""
        begins = "convergence."
        names = [name.removeprefix(begins) for name, _ in self.values if name.startswith(begins)]
        return [name for name in names if any(n == name for n, _ in self.curves)]

    def meaning(self, scalar: str) -> str:
        """The meaning of a logged scalar; its name where the manifest has none."""
        return self._declared(scalar, "meaning") or visible(scalar)

    def unit(self, scalar: str) -> str:
        """The unit of a logged scalar; '' without one."""
        return self._declared(scalar, "unit")

    def _declared(self, scalar: str, what: str) -> str:
        return visible(self.manifest.get("scalars", {}).get(scalar, {}).get(what, ""))

    def is_target(self, level: float) -> bool:
        return _same_l0(level, self.target_l0)

    def at_target(self, metric: str, slice: str = "") -> dict[str, list[Value]]:
        """Values of the metric by arm at the target L0, missing ones included; and all controls."""
        by_arm: dict[str, list[Value]] = defaultdict(list)
        for value in self.values.get((metric, slice), ()):
            if self.is_target(value.level) or value.arm.startswith(CONTROL):
                by_arm[value.arm].append(value)
        return dict(by_arm)

    def numbers(self, metric: str, slice: str = "") -> dict[str, list[float]]:
        """Numbers of the metric by arm at the target L0; arms without one are left out."""
        by_arm = {arm: numbers_in(rows) for arm, rows in self.at_target(metric, slice).items()}
        return {arm: numbers for arm, numbers in by_arm.items() if numbers}

    def reason(self, metric: str, slice: str = "") -> str:
        """Most frequent reason why a value of the metric is missing."""
        rows = self.values.get((metric, slice), ())
        reasons = Counter(row.reason for row in rows if row.value is None)
        return reasons.most_common(1)[0][0] if reasons else "it was not measured"


def numbers_in(rows: Iterable[Value]) -> list[float]:
    """Numbers among the values; missing ones are left out."""
    return [row.value for row in rows if row.value is not None]


def load(folder: Path, title: str = "") -> Run:
    """Reads a run folder, see `run_data`."""
    return run_data(RunFolder(folder), title)


def run_data(
    run: RunFolder,
    title: str = "",
    comparisons: Sequence[Comparison] = (),
    across: Sequence[AcrossSettings] = (),
) -> Run:
    """Reads the data of a run folder that figures and pages need.

    Args:
        run: with at least a final_info.json.
        title: in place of the manifest's.
        comparisons: of the run's review, whose words take the place of those in final_info.json: an
            older version may have judged by other rules.
        across: of the review too; those in the manifest where it is empty.

    Raises: DamageError for a file that can't be read, SourceError without final_info.json.
    """
    info, manifest, name = dict(run.info), run.manifest, run.folder.name
    across = across or _read_across(manifest)
    for a in across:  # the figures of a single setting are of the plan's own base
        if a.arm in info:
            info[a.arm] = info[a.arm] | {"means": info[a.arm].get("means", {}) | a.means_of_base()}
    for c in comparisons:
        if c.arm in info:
            info[c.arm] = info[c.arm] | {"means": info[c.arm].get("means", {}) | c.means()}
    values = _read_values(run) or _values_from_info(info, run.target_level)
    if title and manifest.get("purpose") == QUICK:
        title = f"{MARK}: {title}"
    data = Run(name, title or manifest.get("title", name), info, manifest=manifest, values=values)
    return replace(data, curves=_read_curves(run, data.target_l0), across=across)


def _read_across(manifest: Mapping[str, Any]) -> Sequence[AcrossSettings]:
    if not manifest.get("across"):
        return ()
    from saelab.verdict.across_settings import read_across  # loads torch

    return read_across(manifest["across"])


def _values_from_info(info: Info, level: float) -> dict[tuple[str, str], list[Value]]:
    """Per-seed values of final_info.json; seeds are counted from 0, since it does not name them."""
    values: dict[tuple[str, str], list[Value]] = defaultdict(list)
    for arm, group in info.items():
        for metric, numbers in group.get("final_info_dict", {}).items():
            for i, number in enumerate(numbers if isinstance(numbers, list) else [numbers]):
                if number is None or isinstance(number, (int, float)):
                    reason = "null in final_info.json" if number is None else ""
                    values[metric, ""].append(Value(arm, i, level, number, reason))
    return dict(values)


def _read_values(run: RunFolder) -> dict[tuple[str, str], list[Value]]:
    values: dict[tuple[str, str], list[Value]] = defaultdict(list)
    for row in complete_losses(run.metrics):
        if ",class=" not in row["slice"]:
            value, cell = row["value"], (row["arm"], row["seed"], row["level"])
            number = None if value is None or not math.isfinite(value) else value
            reason = row["reason"] or "not finite"
            values[row["metric"], row["slice"]].append(Value(*cell, number, reason))
    return dict(values)


def _read_curves(run: RunFolder, target: float | None) -> dict[tuple[str, str], dict[int, Curve]]:
    points: dict[tuple[str, str], dict[int, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    target = _choose_target(target, (row["level"] for row in run.curves))
    for row in run.curves:
        value = row["value"]
        if _same_l0(row["level"], target) and value is not None and np.isfinite(value):
            points[row["name"], row["arm"]][row["seed"]][row["tokens"]] = value
    return {
        key: {seed: _curve(of_cell) for seed, of_cell in sorted(cells.items())}
        for key, cells in points.items()
    }


def _curve(points: dict[int, float]) -> Curve:
    tokens, values = zip(*sorted(points.items()), strict=True)
    return Curve(np.array(tokens), np.array(values, dtype=np.float64))


def _choose_target(recorded: float | None, levels: Iterable[float]) -> float | None:
    """Returns the recorded L0, or else the level with the most rows."""
    if recorded is not None:
        return float(recorded)
    counts = Counter(level for level in levels if level is not None)
    return float(counts.most_common(1)[0][0]) if counts else None


def _same_l0(level: float | None, target: float | None) -> bool:
    if level is None or target is None:
        return level is target
    return abs(level - target) <= 1e-6 * abs(target)
