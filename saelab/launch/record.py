"""The run folder: every file of a finished launch, `final_info.json` last: it makes it complete."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saelab.kernels import kernels_name
from saelab.launch.prepare import LaunchData
from saelab.runs.folder import (
    CURVES,
    DOCUMENTS,
    GATE,
    INFO,
    MANIFEST,
    METRICS,
    OF_CELLS,
    SUMMARY,
    seal_run,
)
from saelab.runs.schema import CELLS, CURVE_COLUMNS, CURVE_TYPES
from saelab.storage.atomic import explain_write_errors, remove_leftovers, write_json, write_text
from saelab.storage.cache import link_or_copy, package_digest, package_state
from saelab.storage.links import inside
from saelab.storage.parquet import join_tables, write_columns, write_rows
from saelab.study.plan import BASELINE, BaseConfig, CellSpec
from saelab.study.registry import Attempt, attempts, plan_hash
from saelab.training.curves import read_curves
from saelab.verdict.arms import CellGate
from saelab.verdict.error_budget.ledger import Allotted, Budget
from saelab.verdict.review import Judged
from saelab.verdict.summary import summary_text
from saelab.version import __version__

if TYPE_CHECKING:
    from saelab.study.task import Launch


#: Packages that a run's numbers depend on; their versions stand in its manifest.
PACKAGES = (
    *("torch", "numpy", "scipy", "scikit-learn", "transformers", "tokenizers", "safetensors"),
    *("datasets", "pyarrow"),
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The run folder of a launch, written in two steps: what was measured, then what that means.

    Args:
        task: what was asked for.
        base: its settings with the run's changes.
        folders: of every cell in the cache; its name is the cell's content hash.
        data: what the cells were trained and measured on.
        deviations: of the plan from the registered one.
        levels: of each arm's comparison, from the study's error budget.
        twin: facts of the A/A twin's cells.
    """

    task: Launch
    base: BaseConfig
    folders: Mapping[CellSpec, Path]
    data: LaunchData
    deviations: tuple[str, ...]
    levels: Mapping[str, Allotted] = field(default_factory=dict)
    twin: Mapping[str, CellGate] = field(default_factory=dict)

    def write_measurements(
        self, rows: Sequence[dict[str, Any]], gates: Mapping[str, CellGate]
    ) -> None:
        """Fills the run folder with everything that a verdict is made from; each file whole or not
        at all. Without final_info.json the run is not complete yet."""
        out = self.task.out_dir
        for name in (INFO, MANIFEST):  # of a run that is replaced, or of a launch that was killed
            (out / name).unlink(missing_ok=True)
        if self.task.force:
            shutil.rmtree(out / CELLS, ignore_errors=True)
        remove_leftovers(out)
        self._write_metrics(out / METRICS, rows)
        self._write_curves(out / CURVES)
        self._write_documents(out / DOCUMENTS)
        self._place_checkpoints(out / CELLS)
        write_json(out / GATE, _gates(gates))
        write_json(out / MANIFEST, self._manifest())

    def write_verdict(
        self,
        judged: Judged,
        info: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        seconds: float,
        budget: Budget | None = None,
    ) -> None:
        """Writes summary.md, the sealed manifest and, last, final_info.json.

        Args:
            budget: the study's error budget after this run.
        """
        text = summary_text(
            self.task, judged, self._missing(rows), self.deviations, self._earlier(), rows, budget
        )
        write_text(self.task.out_dir / SUMMARY, text)
        manifest = self._manifest() | {
            "comparisons": [asdict(comparison) for comparison in judged.comparisons],
            **({"across": [asdict(one) for one in judged.across]} if judged.across else {}),
            "aa_twin": asdict(judged.twin) if judged.twin else None,
            "planted": asdict(judged.planted) if judged.planted else None,
            **({"budget": asdict(budget)} if budget else {}),
            "seconds": round(seconds, 1),
        }
        seal_run(self.task.out_dir, manifest, info)

    def _write_metrics(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        provenance = self.data.provenance_of
        write_rows(path, [row | provenance(row["definition"]) for row in rows])

    def _write_curves(self, path: Path) -> None:
        columns: dict[str, list[Any]] = {name: [] for name in CURVE_COLUMNS}
        for spec, folder in self.folders.items():
            curves = read_curves(folder / CURVES)
            repeated = {name: [value] * len(curves) for name, value in spec.id.as_dict().items()}
            for name, values in (repeated | curves.to_pydict()).items():
                columns[name] += values
        write_columns(path, columns, CURVE_TYPES)

    def _write_documents(self, path: Path) -> None:
        """Joins the sums over documents of all cells that have them."""
        files = {spec.id: folder / DOCUMENTS for spec, folder in self.folders.items()}
        present = [(id.as_dict(), file) for id, file in files.items() if file.is_file()]
        path.unlink(missing_ok=True)
        if present:
            join_tables(path, present, CURVE_TYPES)

    def _missing(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Sentences on what no cell has of the printed table, each with its reason."""
        why, arms = self.data.why_no_probing, {arm.name for arm in self.task.run.arms}
        sentences = [f"Sparse probing: {why}."] if why else []
        losses = [r for r in rows if r["arm"] in arms and r["metric"] == "loss_recovered"]
        if losses and all(row["value"] is None for row in losses):
            sentences.append(f"Loss recovered: {losses[0]['reason']}.")
        return sentences

    def _earlier(self) -> list[Attempt]:
        """Attempts at this run before this one, which is the last in the ledger."""
        if not self.task.judged:
            return []
        return [a for a in attempts(self.task.root) if a.run == self.task.name][:-1]

    def _place_checkpoints(self, out: Path) -> None:
        for spec, folder in self.folders.items():
            for name in OF_CELLS:
                source, target = folder / name, inside(out, spec.id.folder / name)
                with explain_write_errors(target):
                    if source.is_file():
                        link_or_copy(source, target)
                    else:  # an earlier launch may have left one
                        target.unlink(missing_ok=True)

    def _manifest(self) -> dict[str, Any]:
        task, plan = self.task, self.task.plan
        probing, calibration = self.data.probing, self.data.calibration
        return {
            "run": task.label,
            **({"settings": list(further)} if (further := task.further_settings) else {}),
            "title": task.run.title,
            "study": plan.study,
            "baseline": BASELINE,
            "primary": plan.primary,
            "direction": plan.direction,
            "sesoi": plan.sesoi,
            "target_l0": plan.target_l0,
            "levels": sorted({spec.id.level for spec in self.folders}),
            "purpose": task.purpose,
            "seed_set": task.seed_set,
            "seeds": sorted({spec.id.seed for spec in self.folders}),
            "arms": {
                arm.name: {
                    "comment": arm.comment,
                    "changes": _plain(arm.changes),
                    "twin_of": arm.twin_of,
                    "against": arm.against,
                }
                for arm in task.run.arms
            },
            "scalars": _scalars(self.folders),
            "twin": _gates(self.twin),
            "cells": {spec.id.name: folder.name for spec, folder in self.folders.items()},
            "plan": plan.model_dump(mode="json"),
            "plan_hash": plan_hash(plan),
            "deviations": self.deviations,
            "error_levels": {arm: asdict(level) for arm, level in self.levels.items()},
            "base": self.base.model_dump(mode="json"),
            **({"clean_loss": asdict(loss)} if (loss := self.data.clean_loss) else {}),
            **({"model_source": source} if (source := self.data.model_source) else {}),
            "data": {
                "train": self.data.train.header,
                "held_out": self.data.held_out.header,
                "calibration": (
                    calibration.header if calibration else self.data.why_no_calibration
                ),
                "probing": probing.name if probing else self.data.why_no_probing,
            },
            "versions": {
                "saelab": __version__,
                "package_digest": package_digest(),
                "package": package_state(),
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
                "threads_per_worker": 1,
                "kernels": kernels_name(torch.device(self.base.model.device)),
                "cpu": torch.backends.cpu.get_cpu_capability(),
            },
        }


def _gates(gates: Mapping[str, CellGate]) -> dict[str, Any]:
    """The content of gate.json: facts and findings of every cell."""
    content = {}
    for name, cell in gates.items():
        result = cell.result
        content[name] = {
            **cell.id.as_dict(),
            "expected": cell.expected,
            "facts": cell.facts,
            "outcome": result.outcome,
            "findings": [asdict(finding) for finding in result.findings],
        }
    return content


def _scalars(specs: Iterable[CellSpec]) -> dict[str, dict[str, str]]:
    """Meaning and unit of every logged scalar; all meanings, where arms give one name several."""
    meanings: dict[str, dict[str, None]] = {}
    units: dict[str, str] = {}
    for spec in specs:
        for name, scalar in spec.sae.logged.items():
            unsigned = " (its sign is free, so final_info.json has its absolute value)"
            meaning = f"{scalar.meaning}{unsigned * scalar.free_sign}"
            meanings.setdefault(name, {})[meaning] = None
            units.setdefault(name, scalar.unit)
    return {n: {"meaning": ", or ".join(meanings[n]), "unit": units[n]} for n in meanings}


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in changes.items()
    }
