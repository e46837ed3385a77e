"""One job of a launch: a few cells of one seed, trained on one stream, evaluated, written.

A finished cell is a folder of the cache under its content hash:

    sae.safetensors, sae.json    the trained SAE (module.safetensors for a user's own module)
    curves.parquet               every logged value over training, thinned
    snapshots.safetensors        decoders kept over training (of a cell at the plan's L0)
    latents.parquet              what is known of each latent (likewise)
    documents.parquet            sums of its core metrics for each held-out document (likewise)
    cell.json                    rows, facts for the gate, failure if any, and the checksums of all
                                 other files; written last (finished.py)

While a cell is trained its checkpoints lie in resume/<key>/ of the cache (training/resume.py).
A finished cell at the plan's L0 is then compared with those of its arm's other seeds (seeds.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab import checkpoint
from saelab.data import language_model
from saelab.data.activations.joined import Paths
from saelab.data.activations.store import MemorySource
from saelab.data.probing.activations import ProbingData
from saelab.errors import CellFailure
from saelab.evals import of_cell
from saelab.evals.base import Row, Subject, Training
from saelab.evals.core import CoreData, measure_reconstruction
from saelab.evals.dictionary_matching import largest_cosines
from saelab.evals.measure import EvalData, evaluate
from saelab.launch.cell_facts import (
    MEASURED,
    PROBED,
    _curve_facts,
    _weights_facts,
    code_std,
    input_facts,
    largest_weight,
    not_finite,
    part_facts,
    removes_mean,
)
from saelab.launch.cell_key import Key, cell_folder, resume_folder
from saelab.launch.cell_store import finish
from saelab.launch.controls import linear_subject
from saelab.launch.executors import Advance
from saelab.launch.jobs import Job, JobCell, WorkerData, evaluation_cost
from saelab.launch.latent_table import FILE, write_latents
from saelab.launch.prepare import open_source
from saelab.launch.progress_lines import Reports
from saelab.launch.seed_pairs import compare
from saelab.runs.folder import DOCUMENTS
from saelab.runs.schema import MOVED, REACH
from saelab.runtime.torch_defaults import standard_torch
from saelab.sae import SAE
from saelab.storage.atomic import write_atomically
from saelab.storage.cache import share, shared_twin
from saelab.storage.parquet import write_columns
from saelab.storage.remote import Remote
from saelab.study.experiment_file import arm_of
from saelab.training.calibration_text import CalibrationText
from saelab.training.cell import TrainingCell
from saelab.training.curves import logged_columns, write_curves
from saelab.training.loop import Cell
from saelab.training.module_cell import ModuleCell
from saelab.training.resume import ResumableCell, remove_checkpoints, restore_cell
from saelab.training.sample import initial_sample
from saelab.training.spliced_model import SplicedModel
from saelab.training.train import train_members

#: Files of a finished cell besides its weights and latents.
CURVES, SNAPSHOTS = "curves.parquet", "snapshots.safetensors"


class Worker:
    """State that a process keeps between jobs: the opened data and the language model."""

    @standard_torch()
    def __init__(self, data: WorkerData) -> None:
        self.data = data
        growing = data.train_digest is None
        self.train = open_source(data.train, data.foreign, "train", growing, data.read_ahead)
        self.sample = initial_sample(self.train).to(data.device)
        self.input_facts = input_facts(self.train)
        self.calibration = _calibration_text(data)
        model = language_model.load(data.model) if data.model else None
        self.spliced = SplicedModel(model, data.output_hooks) if model else None
        held_out = open_source(data.held_out, data.foreign, "held_out", ahead=data.read_ahead)
        self.evaluation = EvalData(
            CoreData(held_out, model, data.loss_contexts, data.device),
            ProbingData.load(data.probing) if data.probing else None,
            seed=data.probing_seed,
            k_values=data.k_values,
            why_no_probing=data.why_no_probing,
            definition=data.definition,
            missing_entries=data.missing_entries,
            sae_probes=data.sae_probes,
        )

    @cached_property
    def linear_facts(self) -> dict[str, float]:
        """Share of the target's variance that a linear map of the input explains on held-out text;
        {} where the input is reconstructed."""
        if self.sample.y is None:
            return {}
        measured = measure_reconstruction(linear_subject(self.sample), self.evaluation.core)
        return {"linear_explained_variance": 1 - measured.fvu}

    @standard_torch()
    def run(self, job: Job, advance: Advance) -> None:
        """Trains and evaluates the job's cells; `advance` takes tokens and lines."""
        members = [self._restored(job, sent) for sent in job.cells]
        ids = [sent.display_id for sent in job.cells]
        reports = Reports([member.cell for member in members], ids, advance)
        layout, text = self.data.layout, self.calibration
        failures = train_members(members, self.train, job.seed, layout, reports.steps, text)
        for member, sent in zip(members, job.cells, strict=True):
            cell, failure = member.cell, failures.get(member.cell.name)
            reports.evaluating(cell)
            largest = largest_cosines(cell.sae.W_dec) if isinstance(cell.sae, SAE) else None
            rows = self._rows(cell, sent.at_target, failure)
            facts = self._facts(cell, sent, rows, largest)
            if failure:
                facts["nonfinite_step"] = failure.step
            folder = self.folder(job.cache, sent.key)
            names = self._write_latents(folder, cell) if sent.at_target and not failure else []
            names += self._write_documents(folder) if sent.at_target and not failure else []
            names += self._write_weights(folder, cell, sent)
            self._write(folder, cell, sent, rows, facts, member.seconds, names)
            share(job.cache, folder)
            kept = self._resume_folder(job, sent)
            remove_checkpoints(kept, shared_twin(job.cache, kept))
            for other in sent.others:
                compare(job.cache, folder, self.folder(job.cache, other))
            advance(evaluation_cost(cell.config))
            reports.done(cell, rows, failure)

    def _restored(self, job: Job, sent: JobCell) -> ResumableCell:
        """A cell where it stopped, or at its start."""
        folder = self._resume_folder(job, sent)
        return restore_cell(lambda: self._build(job, sent), folder, shared_twin(job.cache, folder))

    def _resume_folder(self, job: Job, sent: JobCell) -> Path:
        return resume_folder(job.cache, sent.key, self.train, self.data.foreign)

    def folder(self, cache: Path, key: Key) -> Path:
        """Folder of a finished cell; blocks until the training activations are complete."""
        return cell_folder(cache, key, self.data.train_digest or self.train.digest)

    @torch.no_grad()
    def evaluate(
        self, subject: Subject, names: Sequence[str], training: Training | None = None
    ) -> list[Row]:
        """Rows of the named evaluations; of a cell's own training where it is given."""
        return evaluate(subject, self.evaluation, names, training)

    def _rows(self, cell: TrainingCell, at_target: bool, failure: CellFailure | None) -> list[Row]:
        """All rows of a cell that can be had before other seeds are trained."""
        training = Training(
            cell.log,
            failure.step if failure else None,
            cell.snapshots,
            cell.config.warmup * cell.config.tokens,
        )
        names = of_cell(at_target, self.data.extra, failed=failure is not None)
        return self.evaluate(cell.sae, names, training)

    def _write_latents(self, folder: Path, cell: TrainingCell) -> list[str]:
        """Returns the names of the files that were written."""
        density = self.evaluation.core.density
        if cell.snapshots is None or density is None:
            return []
        write_latents(folder / FILE, cell.sae, density)
        if not cell.snapshots.tokens:
            return [FILE]
        cell.snapshots.save(folder / SNAPSHOTS)
        return [FILE, SNAPSHOTS]

    def _write_documents(self, folder: Path) -> list[str]:
        """Returns the names of the files that were written."""
        sums = self.evaluation.core.text_sums
        if sums is None:
            return []
        write_columns(folder / DOCUMENTS, sums.columns())
        return [DOCUMENTS]

    def _write_weights(self, folder: Path, cell: TrainingCell, sent: JobCell) -> list[str]:
        """Returns the names of the files that were written."""
        sae: Any = cell.sae
        if isinstance(sae, SAE):
            checkpoint.save(sae, folder, {**self.data.provenance, **sent.id.as_dict()})
            return ["sae.safetensors", "sae.json"]
        state = sae.state_dict().items()
        tensors = {n: t.detach().cpu().clone() for n, t in state if isinstance(t, torch.Tensor)}
        file = folder / "module.safetensors"
        write_atomically(file, lambda temporary: save_file(tensors, temporary))
        return [file.name]

    def _build(self, job: Job, sent: JobCell) -> TrainingCell:
        name, sae, config = sent.id.name, sent.sae_config, sent.train_config
        if sent.own_module:
            assert job.experiment is not None
            arm = arm_of(job.experiment, job.run, sent.id.arm)
            assert arm.module is not None
            return ModuleCell(name, arm.module, sae.d_sae, config, self.sample, job.seed)
        snapshots = self.data.snapshots * sent.at_target
        cell = Cell(name, sae, config, self.sample, job.seed, snapshots)
        cell.use_model(self.spliced)
        return cell

    def _facts(
        self, cell: TrainingCell, sent: JobCell, rows: list[Row], largest: Tensor | None
    ) -> dict[str, Any]:
        values = {row.metric: row.value for row in rows if not row.slice and row.value is not None}
        constant = [row.value for row in rows if row.metric == "probing_constant"]
        hook = self.data.provenance["hook_name"] or None
        return {
            **{name: values.get(name) for name in MEASURED},
            "target_l0": sent.id.level or None,
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
            "l0_before_settling": None if cell.settled is None else cell.settled.before,
            "raised_thresholds": None if cell.settled is None else cell.settled.amount,
            **self.input_facts,
            **self.linear_facts,
            "largest_weight": largest_weight(cell.sae),
            **_weights_facts(cell.sae, largest),
            **_curve_facts(cell.log),
            **{f"{MOVED}{name}": moved for name, moved in cell.scalar_distance().items()},
            **{f"{REACH}{name}": share for name, share in cell.scalar_reach().items()},
            **part_facts(cell),
        }

    def _write(
        self,
        folder: Path,
        cell: TrainingCell,
        sent: JobCell,
        rows: list[Row],
        facts: dict[str, Any],
        seconds: float,
        names: list[str],
    ) -> None:
        """Finishes the cell's folder, in which the files of these names are written already."""
        own = [row.of_cell(sent.id).as_dict() for row in rows]
        write_curves(folder / CURVES, cell)
        last = {
            name: _finite(values[cell.log.length - 1]) for name, values in logged_columns(cell.log)
        }
        record = {
            "settings": {
                "sae": sent.sae,
                "train": sent.train,
                "level": sent.id.level,
                "seed": sent.id.seed,
            },
            "rows": own,
            "facts": {name: _finite(value) for name, value in facts.items()},
            "last": last,
            "seconds": round(seconds, 3),
        }
        finish(folder, record, [*names, CURVES])


def _calibration_text(data: WorkerData) -> CalibrationText | None:
    if data.calibration is None:
        return None
    source = open_source(data.calibration, data.foreign, "held_out", ahead=data.read_ahead)
    if isinstance(data.calibration, (Paths, Remote)):  # read once, not at every measurement
        shards = [source.shard(i) for i in range(source.n_shards)]
        source = MemorySource(shards, source.header)
    return CalibrationText(source)


def _finite(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
