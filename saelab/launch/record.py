"""The run folder: every file of a finished launch, `final_info.json` last: it makes it complete."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saelab.kernels import kernels_name
from saelab.launch.prepare import LaunchData
from saelab.runs.folder import seal_run
from saelab.storage.atomic import sweep, write_atomically, write_json, write_text, writing
from saelab.storage.cache import package_digest, package_state, place
from saelab.study.plan import BASELINE, BaseConfig, CellSpec
from saelab.study.registry import Attempt, attempts, plan_hash
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.final_info import Planted
from saelab.verdict.judge import Comparison
from saelab.verdict.summary import control_lines, summary_text
from saelab.version import __version__

if TYPE_CHECKING:
    from saelab.study.task import Launch


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of one shape as a Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


#: Packages that a run's numbers depend on; their versions stand in its manifest.
PACKAGES = (
    *("torch", "numpy", "scipy", "scikit-learn", "transformers", "tokenizers", "safetensors"),
    *("datasets", "pyarrow"),
)


@dataclass(frozen=True)
class Record:
    """Everything that a finished launch leaves behind.

    Args:
        task: what was asked for.
        base: its settings with the run's changes.
        folders: of every cell in the cache; its name is the cell's content hash.
        arms: results per arm at the target L0.
        rows: every evaluation row of every cell and control.
        gates: what the gate sees of every cell.
        prepared: the data.
        comparisons, info: the verdict, and the content of final_info.json.
        deviations: of the plan from the registered one.
        planted: the verdict on an effect of known size.
    """

    task: Launch
    base: BaseConfig
    folders: Mapping[CellSpec, Path]
    arms: Mapping[str, ArmResult]
    rows: Sequence[dict[str, Any]]
    gates: Mapping[str, CellGate]
    prepared: LaunchData
    comparisons: Sequence[Comparison]
    info: dict[str, Any]
    deviations: tuple[str, ...]
    planted: Planted | None

    def write(self, seconds: float) -> None:
        """Fills the run folder; each file whole or not at all."""
        out = self.task.out_dir
        if self.task.force:  # nothing of the replaced run may stay beside the new one
            for name in ("final_info.json", "manifest.json"):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "cells", ignore_errors=True)
        sweep(out)
        self._write_metrics(out / "metrics.parquet")
        self._write_curves(out / "curves.parquet")
        self._place_checkpoints(out / "cells")
        of_controls = control_lines(self.rows, self.planted)
        text = summary_text(
            self.task,
            self.arms,
            self.comparisons,
            self._missing(),
            self.deviations,
            self._earlier(),
            of_controls,
        )
        write_text(out / "summary.md", text)
        write_json(out / "gate.json", self._gates())
        seal_run(out, self._manifest(seconds), self.info)

    def _write_metrics(self, path: Path) -> None:
        provenance = self.prepared.provenance_of
        write_rows(path, [row | provenance(row["definition"]) for row in self.rows])

    def _write_curves(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for spec, folder in self.folders.items():
            curves = pq.read_table(folder / "curves.parquet")
            cell = {"arm": spec.arm, "seed": spec.seed, "level": float(spec.level)}
            kinds = (pa.string(), pa.int64(), pa.float64())
            for i, (name, value) in enumerate(cell.items()):
                column = pa.array([value] * len(curves), kinds[i])
                curves = curves.add_column(i, name, column)
            tables.append(curves)
        whole = pa.concat_tables(tables)
        write_atomically(path, lambda temporary: pq.write_table(whole, temporary))

    def _missing(self) -> list[str]:
        """What no cell has of the printed table, with its reason."""
        why = self.prepared.why_no_probing
        found = [f"Sparse probing: {why}."] if why else []
        own = [r for r in self.rows if r["arm"] in self.arms and r["metric"] == "loss_recovered"]
        if own and all(row["value"] is None for row in own):
            found.append(f"Loss recovered: {own[0]['reason']}.")
        return found

    def _earlier(self) -> list[Attempt]:
        """Attempts at this run before this one, which is the last in the ledger."""
        if not self.task.judged:
            return []
        return [a for a in attempts(self.task.root) if a.run == self.task.name][:-1]

    def _gates(self) -> dict[str, Any]:
        """Facts and findings of every cell."""
        found = {}
        for name, cell in self.gates.items():
            result = cell.result
            findings = [asdict(finding) for finding in result.findings]
            found[name] = asdict(cell) | {"outcome": result.outcome, "findings": findings}
        return found

    def _place_checkpoints(self, out: Path) -> None:
        for spec, folder in self.folders.items():
            target = out / spec.arm / f"seed{spec.seed}-l0_{spec.level:g}"
            for place_ in (target, target.parent):
                if place_.is_symlink():  # it would lead out of the run
                    place_.unlink()
            for name in ("sae.safetensors", "sae.json", "module.safetensors", "latents.parquet"):
                source = folder / name
                if source.is_file():
                    with writing(target / name):
                        place(source, target / name)

    def _manifest(self, seconds: float) -> dict[str, Any]:
        task, plan = self.task, self.task.plan
        probing = self.prepared.probing
        return {
            "run": task.name,
            "title": task.run.title,
            "study": plan.study,
            "baseline": BASELINE,
            "primary": plan.primary,
            "direction": plan.direction,
            "sesoi": plan.sesoi,
            "target_l0": plan.target_l0,
            "levels": sorted({spec.level for spec in self.folders}),
            "purpose": task.purpose,
            "seeds": sorted({spec.seed for spec in self.folders}),
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
            "cells": {spec.name: folder.name for spec, folder in self.folders.items()},
            "plan": plan.model_dump(mode="json"),
            "plan_hash": plan_hash(plan),
            "deviations": self.deviations,
            "base": self.base.model_dump(mode="json"),
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "planted": asdict(self.planted) if self.planted else None,
            "data": {
                "train": self.prepared.train.header,
                "held_out": self.prepared.held_out.header,
                "probing": probing.name if probing else self.prepared.why_no_probing,
            },
            "versions": {
                "saelab": __version__,
                "package_digest": package_digest(),
                "package": package_state(),
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
                "threads_per_worker": 1,
                "kernels": kernels_name(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
            },
            "seconds": round(seconds, 1),
        }


def _scalars(specs: Iterable[CellSpec]) -> dict[str, dict[str, str]]:
    """Meaning and unit of every logged scalar; all meanings, where arms give one name several."""
    meanings: dict[str, dict[str, None]] = {}
    units: dict[str, str] = {}
    for spec in specs:
        for name, scalar in spec.sae.logged.items():
            meanings.setdefault(name, {})[scalar.meaning] = None
            units.setdefault(name, scalar.unit)
    return {n: {"meaning": ", or ".join(meanings[n]), "unit": units[n]} for n in meanings}


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
        for name, value in changes.items()
    }
