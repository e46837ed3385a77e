"""Results of a run by arm, as the verdict takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from saelab.evals.base import check_one_definition
from saelab.evals.dictionary_consistency import OF_SEEDS
from saelab.runs.schema import PAIR, SCALAR, CellId
from saelab.study.plan import BASELINE
from saelab.verdict.agreement import (
    Agreement,
    agreement,
    replicates,
    replicates_of_means,
    without_seeds,
)
from saelab.verdict.gate import GateResult, gate


@dataclass(frozen=True, kw_only=True)
class CellGate:
    """Facts of one cell that the gate sees; with the cell's rows, its verdict can be made again."""

    id: CellId
    expected: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def result(self) -> GateResult:
        return gate(self.facts, self.expected)


@dataclass
class ArmResult:
    """All cells of one arm: those at the target L0 by seed, and the values at its further levels.

    `values` holds what was measured over all data and, under its plain name, the last logged value
    of each scalar. `pairs` holds what belongs to two seeds: metric -> both seeds -> value.
    """

    name: str
    against: str = BASELINE
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    gates: dict[int, GateResult] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    levels: dict[int, dict[float, dict[str, float]]] = field(default_factory=dict)
    pairs: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)

    def add_level(self, cell: CellGate, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps the values of a cell at a further level, unless the gate turns it away."""
        if cell.result.outcome not in ("invalid", "failed"):
            values = {row["metric"]: row["value"] for row in _over_all_data(rows)}
            self.levels.setdefault(cell.id.seed, {})[cell.id.level] = values

    def add(self, cell: CellGate, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps a cell at the target L0.

        Raises: MismatchError when a metric was measured by another definition than before.
        """
        seed, values = cell.id.seed, {}
        self._add_pairs(seed, rows := list(rows))
        for row in _over_all_data(rows):
            metric = row["metric"].removeprefix(SCALAR)
            values[metric] = row["value"]
            earlier = self.definitions.setdefault(metric, row["definition"])
            both = {"an earlier seed": earlier, f"seed {seed}": row["definition"]}
            check_one_definition(metric, both)
        self.facts[seed], self.gates[seed], self.values[seed] = cell.facts, cell.result, values

    def _add_pairs(self, seed: int, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if row["slice"].startswith(PAIR) and row["value"] is not None:
                other = int(row["slice"].removeprefix(PAIR))
                both = (min(seed, other), max(seed, other))
                self.pairs.setdefault(row["metric"], {})[both] = row["value"]

    def valid(self, seed: int) -> bool:
        return self.gates[seed].outcome != "invalid"

    def metric(self, name: str) -> dict[int, float | None]:
        """Seed -> value; null when invalid or not measured."""
        return {
            seed: values.get(name) if self.valid(seed) else None
            for seed, values in self.values.items()
        }

    def replicates(self, name: str) -> dict[int, float | None]:
        """Seed -> value, as `metric`, or the pseudo-value of a metric of pairs of seeds: numbers
        whose mean is the arm's and whose spread over seeds gives its error."""
        if name not in self.pairs:
            values = self.metric(name)
            return replicates_of_means(values) if name in OF_SEEDS else values
        return dict.fromkeys(self.values) | replicates(self._healthy_pairs(name))

    def agreement(self, name: str) -> Agreement | None:
        """The mean of a metric over pairs of healthy seeds, with its interval."""
        return agreement(self._healthy_pairs(name)) if name in self.pairs else None

    def _healthy_pairs(self, name: str) -> dict[tuple[int, int], float]:
        lost = self.failed | {seed for seed in self.values if not self.valid(seed)}
        return without_seeds(self.pairs[name], lost)

    @property
    def failed(self) -> set[int]:
        return {seed for seed, result in self.gates.items() if result.outcome == "failed"}

    @property
    def gate_summary(self) -> str:
        """The gate's word for the arm: 'ok', or each finding with the number of its seeds."""
        words: dict[str, int] = {}
        for result in self.gates.values():
            labels = [
                f"{finding.outcome}: {finding.check}" + (" (expected)" * finding.expected)
                for finding in result.findings
            ]
            for label in dict.fromkeys(labels):  # several scalars of a cell count once
                words[label] = words.get(label, 0) + 1
        total = len(self.gates)
        return "; ".join(f"{word} in {n} of {total}" for word, n in words.items()) or "ok"


def _over_all_data(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have a number over all data."""
    return [row for row in rows if not row["slice"] and row["value"] is not None]
