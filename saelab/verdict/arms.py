"""Results of a run by arm, as the verdict takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saelab.evals.base import check_one_definition
from saelab.parts.base import Scalar
from saelab.study.plan import BASELINE, BaseConfig
from saelab.verdict.gate import GateResult, gate


@dataclass(frozen=True)
class CellGate:
    """What the gate sees of one cell; with the rows of the cell, its verdict can be made again."""

    arm: str
    seed: int
    level: float
    expected: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def result(self) -> GateResult:
        return gate(self.facts, self.expected)


@dataclass
class ArmResult:
    """All cells of one arm at the target L0, by seed; of its further levels the values alone.

    `settings` are those of the launch, None where cells are read again from a run folder.
    """

    name: str
    settings: BaseConfig | None = None
    against: str = BASELINE
    values: dict[int, dict[str, float]] = field(default_factory=dict)
    gates: dict[int, GateResult] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)
    levels: dict[int, dict[float, dict[str, float]]] = field(default_factory=dict)

    def add_level(
        self, seed: int, level: float, cell: Mapping[str, Any], expected: Sequence[str]
    ) -> None:
        """Keeps the values of a cell at a further level, unless the gate turns it away."""
        if gate(cell["facts"], expected).outcome not in ("invalid", "failed"):
            own = {row["metric"]: row["value"] for row in _whole(cell)}
            self.levels.setdefault(seed, {})[level] = own

    def add(self, seed: int, cell: Mapping[str, Any], expected: Sequence[str]) -> None:
        rows = _whole(cell)
        values = {row["metric"]: row["value"] for row in rows}
        for row in rows:
            earlier = self.definitions.setdefault(row["metric"], row["definition"])
            both = {"an earlier seed": earlier, f"seed {seed}": row["definition"]}
            check_one_definition(row["metric"], both)
        reported = {name for name, scalar in self._logged.items() if scalar.reported}
        last = {k: v for k, v in cell["last"].items() if k in reported and v is not None}
        loss = cell["last"].get("loss")
        self.facts[seed] = cell["facts"]
        self.gates[seed] = gate(cell["facts"], expected)
        self.values[seed] = values | last | ({} if loss is None else {"final_loss": loss})

    @property
    def _logged(self) -> Mapping[str, Scalar]:
        return self.settings.sae.logged if self.settings else {}

    def valid(self, seed: int) -> bool:
        return self.gates[seed].outcome != "invalid"

    def metric(self, name: str) -> dict[int, float | None]:
        """Seed -> value; null when invalid or not measured."""
        return {
            seed: values.get(name) if self.valid(seed) else None
            for seed, values in self.values.items()
        }

    def reference(self, name: str) -> dict[int, float | None]:
        """The same as a baseline: a cell that failed is nothing to compare with."""
        return {s: None if s in self.failed else v for s, v in self.metric(name).items()}

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


def _whole(cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a cell that have a number over all data."""
    return [row for row in cell["rows"] if not row["slice"] and row["value"] is not None]
