"""Gathers what the finished cells of a launch measured: rows of metrics.parquet and gate facts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.evals.base import Row, number_or_reason
from saelab.evals.core import CoreData
from saelab.launch import controls
from saelab.launch.cell_facts import PROBED
from saelab.launch.cell_key import cell_key
from saelab.launch.cell_store import finish, is_finished
from saelab.launch.seed_pairs import compare, rows_of_pairs, rows_of_seeds
from saelab.launch.waves import PreparedLaunch, other_seeds
from saelab.runs import schema
from saelab.runs.random_code import complete_losses
from saelab.runs.schema import MOVED, MOVED_SPREAD, SCALAR, SCALARS_DEFINITION, UNSIGNED_DEFINITION
from saelab.runtime.torch_defaults import one_thread
from saelab.storage.atomic import read_sealed
from saelab.study.plan import BASELINE, CellSpec
from saelab.verdict.arms import CellGate

#: Seeds from which a spread is computed. Our choice.
FEWEST_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Measurements of a launch.

    Args:
        rows: every row of every cell and control subject, as plain data.
        controls: those of the control subjects.
        gates: facts of every cell for the gate, by the cell's name.
        twin: the same of the A/A twin's cells, which are control subjects.
    """

    rows: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    gates: dict[str, CellGate]
    twin: dict[str, CellGate]


def collect(ready: PreparedLaunch, folders: Mapping[CellSpec, Path]) -> Collected:
    """Reads the finished cells and makes what is measured between them.

    Args:
        folders: of every cell in the cache.
    """
    places = [ready.place(control.key) for control in ready.beside]
    of_controls = _control_rows([*places, *_plant_effects(ready, folders)])
    test_size = ready.base.evaluation.probing.test_size
    band = random_band(of_controls, test_size)
    plan = ready.task.plan
    partners = other_seeds(folders, plan)
    rows: list[dict[str, Any]] = []
    gates: dict[str, CellGate] = {}
    made = {spec: read_sealed(folder / "cell.json") for spec, folder in folders.items()}
    spreads = scalar_spreads({spec: cell["facts"] for spec, cell in made.items()})
    for spec, folder in folders.items():
        cell = made[spec]
        others = {other.id.seed: folders[other] for other in partners.get(spec, ())}
        measured = [*cell["rows"], *(row.as_dict() for row in _scalar_rows(spec, cell["last"]))]
        if spec in partners:
            measured += _seed_rows(ready.cache, folder, others, ready.base.evaluation.extra)
        rows += [row | spec.id.as_dict() for row in measured]
        facts = cell["facts"] | spreads[spec] | (band if spec.is_at_target(plan) else {})
        gates[spec.id.name] = CellGate(id=spec.id, expected=spec.expected, facts=facts)
    complete = complete_losses([*rows, *of_controls])
    return Collected(
        rows=complete,
        controls=[row for row in complete if row["arm"].startswith(schema.CONTROL)],
        gates=gates,
        twin=_twin_gates(ready, band),
    )


def _twin_gates(ready: PreparedLaunch, band: Mapping[str, float]) -> dict[str, CellGate]:
    """Facts of the A/A twin's cells, which the gate looks at as at those of an arm."""
    made = {spec: read_sealed(place / "cell.json") for spec, place in ready.twin_places().items()}
    facts = {spec: cell["facts"] for spec, cell in made.items()}
    spreads = scalar_spreads(facts)
    return {
        spec.id.name: CellGate(
            id=spec.id, expected=spec.expected, facts={**facts[spec], **spreads[spec], **band}
        )
        for spec in made
    }


def scalar_spreads(
    facts: Mapping[CellSpec, Mapping[str, Any]],
) -> dict[CellSpec, dict[str, float]]:
    """Cell -> facts on how much the distance that each learned scalar moved differs between the
    seeds of its arm and level (standard deviation); none with fewer than `FEWEST_SEEDS`."""
    groups: dict[tuple[str, float], list[CellSpec]] = {}
    for spec in facts:
        groups.setdefault((spec.id.arm, spec.id.level), []).append(spec)
    spreads: dict[CellSpec, dict[str, float]] = {}
    for members in groups.values():
        names = dict.fromkeys(n for spec in members for n in facts[spec] if n.startswith(MOVED))
        own: dict[str, float] = {}
        for name in names:
            moved = [value for m in members if (value := facts[m].get(name)) is not None]
            if len(moved) >= FEWEST_SEEDS:
                own[f"{MOVED_SPREAD}{name.removeprefix(MOVED)}"] = statistics.stdev(moved)
        spreads |= dict.fromkeys(members, own)
    return spreads


def _scalar_rows(spec: CellSpec, last: Mapping[str, float | None]) -> Iterator[Row]:
    """Rows of the last logged value of each scalar that the parts report, and of the loss; of a
    scalar whose sign is free the absolute value, since a mean over both signs is none of them."""
    logged = spec.sae.logged
    names = {name: f"{SCALAR}{name}" for name, s in logged.items() if s.reported}
    for name, metric in (names | {"loss": "final_loss"}).items():
        if name in last:
            value, reason = last[name], "it was not finite at the last step"
            unsigned = name in logged and logged[name].free_sign
            definition = UNSIGNED_DEFINITION if unsigned else SCALARS_DEFINITION
            if unsigned and value is not None:
                value = abs(value)
            yield number_or_reason(metric, reason if value is None else value, definition)


def _plant_effects(ready: PreparedLaunch, folders: Mapping[CellSpec, Path]) -> list[Path]:
    """Makes the planted-effect control of trained cells of the A/A twin, or of the baseline's at
    the target where there is no twin; returns their folders."""
    places, plan = [], ready.task.plan
    core = CoreData(ready.prepared.held_out, None, device=ready.data.device)
    own = {s: f for s, f in folders.items() if s.id.arm == BASELINE and s.is_at_target(plan)}
    for spec, folder in (ready.twin_places() or own).items():
        if not (folder / "sae.json").is_file() or len(places) >= plan.seeds_other:
            continue
        key = cell_key(spec, ready.content, ready.data.device)
        place = ready.place(replace(key, control=schema.control_arm(schema.PLANTED)))
        if not is_finished(place):
            with one_thread():
                made = controls.plant_effect(folder, core, spec.id)
            finish(place, made)
        places.append(place)
    return places


def random_band(rows: Sequence[dict[str, Any]], texts: int) -> dict[str, float]:
    """Range of a random dictionary's probing accuracy: the untrained baseline's, with two
    standard errors of a share over the test texts to either side; {} without probing.

    Args:
        rows: of controls.
        texts: test texts of a class.
    """
    name = schema.control_arm(schema.UNTRAINED)
    own = [row for row in rows if (row["arm"], row["metric"]) == (name, PROBED)]
    classes = sum(",class=" in row["slice"] for row in own)
    whole = [row["value"] for row in own if not row["slice"] and row["value"] is not None]
    if not whole or not classes:
        return {}
    error = 2 * math.sqrt(whole[0] * (1 - whole[0]) / (classes * texts))
    return {"random_control_low": whole[0] - error, "random_control_high": whole[0] + error}


def _seed_rows(
    cache: Path, folder: Path, others: Mapping[int, Path], extra: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of a cell beside other seeds. Its worker has compared most pairs: not those of cells
    that other launches left in the cache, nor after an interruption."""
    with one_thread():
        for other in others.values():
            compare(cache, folder, other)
    rows = rows_of_seeds(cache, folder, list(others.values()), extra)
    return [row.as_dict() for row in (*rows, *rows_of_pairs(cache, folder, others))]


def _control_rows(folders: Iterable[Path]) -> list[dict[str, Any]]:
    return [row for folder in folders for row in read_sealed(folder / "cell.json")["rows"]]
