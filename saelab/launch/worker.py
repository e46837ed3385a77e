"""One job of a launch: a few cells of one seed, trained on one stream, evaluated, written.

A finished cell is a folder of the cache under its content hash:

    sae.safetensors, sae.json    the trained SAE (module.safetensors for a user's own module)
    curves.parquet               every logged value over training, thinned
    snapshots.safetensors        decoders kept over training (of a cell at the plan's L0)
    latents.parquet              what is known of each latent (likewise)
    cell.json                    rows, facts for the gate, failure if any, and the checksums of all
                                 other files; written last (finished.py)

While a cell is trained its checkpoints lie in resume/<key>/ of the cache (training/resume.py).
A finished cell at the plan's L0 is then compared with those of its arm's other seeds (seeds.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab import checkpoint
from saelab.data import language_model
from saelab.data.activations.stream import Layout, batches
from saelab.data.language_model import ModelConfig
from saelab.data.probing.activations import ProbingData
from saelab.data.probing.saebench import Definition
from saelab.evals import EvalData, evaluate
from saelab.evals.base import Row, Subject
from saelab.evals.convergence import convergence
from saelab.evals.core import CoreData
from saelab.evals.decoder_cosines import decoder_rows
from saelab.evals.dictionary_consistency import (
    OF_CHANCE,
    OF_SNAPSHOTS,
    chance_rows,
    no_agreement,
    snapshot_rows,
)
from saelab.evals.dictionary_matching import chance, largest_cosines
from saelab.evals.latent_lifetimes import survival_rows
from saelab.evals.training_stability import stability
from saelab.launch.cell_facts import (
    MEASURED,
    PROBED,
    _balance_facts,
    _curve_facts,
    _weights_facts,
    code_std,
    input_facts,
    not_finite,
    removes_mean,
)
from saelab.launch.cell_key import Key, cell_folder, resume_folder
from saelab.launch.cell_store import finish
from saelab.launch.executors import Advance
from saelab.launch.latent_table import FILE, write_latents
from saelab.launch.prepare import open_source
from saelab.launch.progress_lines import Reports
from saelab.launch.seed_pairs import compare
from saelab.runs.schema import REACH
from saelab.sae import SAE, SAEConfig
from saelab.storage.atomic import write_atomically
from saelab.storage.cache import share, shared_twin
from saelab.storage.remote import Place
from saelab.study.experiment_file import load_experiment
from saelab.study.plan import CellSpec
from saelab.training.curves import _logged, write_curves
from saelab.training.loop import Cell
from saelab.training.module_cell import ModuleCell
from saelab.training.optim import TrainConfig
from saelab.training.resume import Kept, remove_checkpoints, restore_cell, train_kept
from saelab.training.sample import initial_sample

#: What is measured of a cell at the plan's L0.
AT_TARGET = (
    "core",
    "probing",
    "sensitivity",
    "consistency",
    "positions",
    "truth",
    "absorption",
)


@dataclass(frozen=True)
class WorkerData:
    """What every job of a launch shares; plain data, so that it can be sent to a worker.

    `train_digest` is None while the activations to train on are still being harvested; `read_ahead`
    is in bytes, see `HarvestConfig`.
    """

    train: Place
    train_digest: str | None
    held_out: Place
    foreign: bool
    probing: Path | None
    why_no_probing: str
    model: ModelConfig | None
    layout: Layout
    loss_contexts: int
    snapshots: int
    k_values: tuple[int, ...]
    probing_seed: int
    definition: Definition
    missing_entries: dict[str, str]
    device: str
    provenance: dict[str, Any]
    read_ahead: int


@dataclass(frozen=True)
class Job:
    """Cells of one seed, with their cache keys; `experiment` is the file of the run table."""

    cells: list[dict[str, Any]]
    seed: int
    data: WorkerData
    cache: Path
    experiment: Path | None
    run: str


def as_job_cell(spec: CellSpec, key: Key) -> dict[str, Any]:
    """A cell as plain data for a worker."""
    return {
        "arm": spec.arm,
        "seed": spec.seed,
        "level": spec.level,
        "sae": spec.sae.model_dump(mode="json"),
        "train": spec.train.model_dump(mode="json"),
        "own_module": spec.module is not None,
        "probe": True,
        "others": [],
        "key": key,
    }


# ---- in a worker -----------------------------------------------------------------------------


class Worker:
    """What a process keeps between jobs: the opened data and the language model."""

    def __init__(self, data: WorkerData) -> None:
        self.data = data
        growing = data.train_digest is None
        self.train = open_source(data.train, data.foreign, "train", growing, data.read_ahead)
        self.sample = initial_sample(self.train).to(data.device)
        self.input_facts = input_facts(self.train)
        model = language_model.load(data.model) if data.model else None
        held_out = open_source(data.held_out, data.foreign, "held_out", ahead=data.read_ahead)
        self.evaluation = EvalData(
            CoreData(held_out, model, data.loss_contexts, data.device),
            ProbingData.load(data.probing) if data.probing else None,
            data.probing_seed,
            data.k_values,
            data.why_no_probing,
            data.definition,
            data.missing_entries,
        )

    def run(self, job: Job, advance: Advance) -> None:
        """Trains and evaluates the job's cells; `advance` takes token-steps and lines."""
        members = [self._restored(job, plain) for plain in job.cells]
        config = members[0].cell.config
        reports = Reports([member.cell for member in members], job.cells, advance)
        failures = train_kept(
            members,
            lambda start: batches(self.train, job.seed, config.batch_size, self.data.layout, start),
            reports.steps,
        )
        for member, plain in zip(members, job.cells, strict=True):
            cell, failure = member.cell, failures.get(member.cell.name)
            reports.evaluating(cell)
            largest = largest_cosines(cell.sae.W_dec) if isinstance(cell.sae, SAE) else None
            rows = stability(cell.log, failure.step if failure else None)
            if not failure:
                rows += self._rows(cell, plain["probe"], largest)
            facts = self._facts(cell, plain, rows, largest)
            if failure:
                facts["nonfinite_step"] = failure.step
            folder = self.folder(job.cache, plain["key"])
            if plain["probe"] and not failure:
                self._write_latents(folder, cell)
            self._write(folder, cell, plain, rows, facts, member.seconds)
            share(job.cache, folder)
            kept = self._resume_folder(job, plain)
            remove_checkpoints(kept, shared_twin(job.cache, kept))
            for other in plain["others"]:
                compare(job.cache, folder, self.folder(job.cache, other))
            advance(evaluation_cost(config))
            reports.done(cell, rows, failure)

    def _restored(self, job: Job, plain: dict[str, Any]) -> Kept:
        """A cell where it stopped, or at its start."""
        folder = self._resume_folder(job, plain)
        return restore_cell(lambda: self._build(job, plain), folder, shared_twin(job.cache, folder))

    def _resume_folder(self, job: Job, plain: dict[str, Any]) -> Path:
        return resume_folder(job.cache, plain["key"], self.train, self.data.foreign)

    def folder(self, cache: Path, key: Key) -> Path:
        """Where a finished cell lies; waits for the training activations to be complete."""
        return cell_folder(cache, key, self.data.train_digest or self.train.digest)

    @torch.no_grad()
    def evaluate(self, subject: Subject, probe: bool) -> list[Row]:
        """Core metrics, and all others where the cell is at the plan's L0."""
        return evaluate(subject, self.evaluation, AT_TARGET if probe else ("core",))

    def _rows(self, cell: Cell, probe: bool, largest: Tensor | None) -> list[Row]:
        """All rows of a trained cell."""
        rows = self.evaluate(cell.sae, probe) + convergence(cell.log)
        if probe:
            rows += [*decoder_rows(largest), *survival_rows(cell.sae), *self._agreement(cell)]
        return rows

    def _agreement(self, cell: Cell) -> list[Row]:
        """The decoder beside its own snapshots, and what chance gives."""
        if cell.snapshots is None:
            reason = "only an SAE made of parts has decoder rows"
            return no_agreement(reason, (*OF_SNAPSHOTS, *OF_CHANCE))
        kept, config = cell.snapshots, cell.config
        expected = chance(cell.sae.d_sae, cell.sae.d_in, self.data.probing_seed)
        settled = config.warmup * config.tokens
        rows = snapshot_rows(kept.tokens, kept.decoders, settled, expected[0])
        return rows + chance_rows(expected)

    def _write_latents(self, folder: Path, cell: Cell) -> None:
        density = self.evaluation.core.density
        if cell.snapshots is None or density is None:
            return
        write_latents(folder / FILE, cell.sae, density)
        if cell.snapshots.tokens:
            cell.snapshots.save(folder / "snapshots.safetensors")

    def _build(self, job: Job, plain: dict[str, Any]) -> Cell:
        config = TrainConfig.parse(plain["train"])
        name = f"{plain['arm']}/seed {plain['seed']}/L0 {plain['level']:g}"
        if plain["own_module"]:
            assert job.experiment is not None
            runs = load_experiment(job.experiment).RUNS
            arm = next(arm for arm in runs[job.run].arms if arm.name == plain["arm"])
            d_sae = SAEConfig.parse(plain["sae"]).d_sae
            return ModuleCell(name, arm.module, d_sae, config, self.sample, job.seed)
        sae, snapshots = SAEConfig.parse(plain["sae"]), self.data.snapshots * plain["probe"]
        return Cell(name, sae, config, self.sample, job.seed, snapshots)

    def _facts(
        self, cell: Cell, plain: dict[str, Any], rows: list[Row], largest: Tensor | None
    ) -> dict[str, Any]:
        values = {row.metric: row.value for row in rows if not row.slice and row.value is not None}
        constant = [row.value for row in rows if row.metric == "probing_constant"]
        hook = self.data.provenance["hook_name"] or None
        return {
            **{name: values.get(name) for name in MEASURED},
            "target_l0": plain["level"] or None,
            "d_sae": cell.sae.d_sae,
            "d_in": cell.sae.d_in,
            "steps": cell.steps_done,
            "tokens": cell.tokens,
            "hook_sae": hook,
            "hook_activations": hook,
            "hook_evaluation": hook,
            "probing_constant": float(all(constant)) if constant else None,
            "data_passes": cell.config.tokens / max(1, sum(self.train.shard_counts)),
            "planned_passes": 1.0,
            "code_std": code_std(cell.sae, self.evaluation.core) if rows else None,
            "centred": float(removes_mean(cell)),
            "probing_accuracy": values.get(PROBED),
            "not_finite": not_finite(rows),
            **self.input_facts,
            **_weights_facts(cell.sae, largest),
            **_curve_facts(cell.log),
            **{f"{REACH}{name}": share for name, share in cell.moved().items()},
            **_balance_facts(cell),
        }

    def _write(
        self,
        folder: Path,
        cell: Cell,
        plain: dict[str, Any],
        rows: list[Row],
        facts: dict[str, Any],
        seconds: float,
    ) -> None:
        origin = {"arm": plain["arm"], "seed": plain["seed"], "level": plain["level"]}
        sae: Any = cell.sae
        if isinstance(sae, SAE):
            checkpoint.save(sae, folder, {**self.data.provenance, **origin})
        else:
            state = sae.state_dict().items()
            tensors = {n: t.detach().cpu().clone() for n, t in state if isinstance(t, torch.Tensor)}
            file = folder / "module.safetensors"
            write_atomically(file, lambda temporary: save_file(tensors, temporary))
        own = [row.of_cell(plain["arm"], plain["seed"], plain["level"]).as_dict() for row in rows]
        write_curves(folder / "curves.parquet", cell)
        last = {name: _finite(values[cell.log.length - 1]) for name, values in _logged(cell.log)}
        record = {
            "settings": {name: plain[name] for name in ("sae", "train", "level", "seed")},
            "rows": own,
            "facts": {name: _finite(value) for name, value in facts.items()},
            "last": last,
            "seconds": round(seconds, 3),
        }
        finish(folder, record)


def evaluation_cost(config: TrainConfig) -> float:
    """What evaluating a cell counts for in the progress bar, in token-steps. Our measurement."""
    return 0.5 * config.tokens


def _finite(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
