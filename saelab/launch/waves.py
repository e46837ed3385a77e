"""The cells of a launch that are still to be trained, as jobs for workers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saelab.evals import probing_rows
from saelab.launch import controls, progress_lines
from saelab.launch import worker as celljob
from saelab.launch.cell_key import Key, cell_folder, cell_key, resume_folder
from saelab.launch.cell_store import finish, is_finished
from saelab.launch.executors import executor
from saelab.launch.executors.local import worker_count
from saelab.launch.prepare import LaunchData, prepare, source_path
from saelab.launch.seed_pairs import partners
from saelab.launch.worker import Job, Worker, WorkerData, as_job_cell, evaluation_cost
from saelab.preflight.cost import training_seconds
from saelab.preflight.preview import RunCheck
from saelab.progress import clock, progress
from saelab.progress.state import DONE, EVALUATE
from saelab.runs import schema
from saelab.sae import SAEConfig
from saelab.seeding import study_seeds
from saelab.storage.cache import cache_folder, fetch, share
from saelab.study.plan import (
    BASELINE,
    BaseConfig,
    CellSpec,
    PlanConfig,
    cells,
)
from saelab.study.task import GROUP, Launch
from saelab.training.optim import TrainConfig
from saelab.training.resume import drop_damaged, remove_checkpoints


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch whose data is there.

    Args:
        task: the launch.
        prepared, data: what its cells are trained and measured on, here and for workers.
        content: what their numbers depend on besides their settings.
        beside: cells of controls.
        cache: where finished cells lie.
    """

    task: Launch
    prepared: LaunchData
    data: WorkerData
    content: dict[str, Any]
    beside: list[dict[str, Any]]
    cache: Path

    @classmethod
    def of(cls, task: Launch, before: RunCheck, overlap: bool = False) -> PreparedLaunch:
        """Harvests what is missing; with `overlap` all but the activations to train on."""
        base, cache = before.base, cache_folder(task.root)
        prepared = prepare(base, cache, base.model.device, overlap)
        data = _data(base, prepared, task)
        content = _data_content(base, prepared, data)
        beside = _controls(before.specs, content, prepared)
        return cls(task, prepared, data, content, beside, cache)

    @cached_property
    def keys(self) -> dict[CellSpec, Key]:
        """Of every cell of the task's run."""
        task = self.task
        specs = cells(task.plan, task.base, task.run, task.purpose)
        measured = {there: self.content | {"at_target": there} for there in (False, True)}
        return {spec: cell_key(spec, measured[_at_target(spec, task.plan)]) for spec in specs}

    def place(self, key: Key) -> Path:
        """Of a finished cell; waits for the training activations to be complete."""
        return cell_folder(self.cache, key, self.prepared.train.digest)


def _at_target(spec: CellSpec, plan: PlanConfig) -> bool:
    return spec.level == (plan.target_l0 or 0)


def _workers(task: Launch, device: str) -> int:
    return worker_count(device) if task.workers is None else task.workers


def _data(base: BaseConfig, prepared: LaunchData, task: Launch) -> WorkerData:
    return WorkerData(
        train=source_path(prepared.train),
        train_digest=prepared.train_digest,
        held_out=source_path(prepared.held_out),
        foreign=base.activations is not None,
        probing=prepared.probing,
        why_no_probing=prepared.why_no_probing,
        model=base.model if base.activations is None else None,
        layout=base.layout,
        loss_contexts=base.evaluation.loss_contexts,
        snapshots=base.evaluation.snapshots,
        k_values=base.evaluation.probing.k_values,
        probing_seed=study_seeds(task.plan.study, "evaluation", 1)[0],
        definition=base.evaluation.probing.definition,
        missing_entries=prepared.missing_entries,
        device=base.model.device,
        provenance=prepared.provenance,
        read_ahead=base.harvest.read_ahead,
    )


def _data_content(base: BaseConfig, prepared: LaunchData, data: WorkerData) -> dict[str, Any]:
    """What the numbers of a cell depend on besides its settings and training activations."""
    return {
        "held_out": prepared.held_out.digest,
        "probing": prepared.probing.name if prepared.probing else None,
        "layout": data.layout,
        "loss_contexts": data.loss_contexts,
        "snapshots": data.snapshots,
        "k_values": data.k_values,
        "probing_seed": data.probing_seed,
        "probing_definition": data.definition,
        "missing_entries": data.missing_entries,
        "threads": 1,
        "device": data.device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _controls(
    specs: Sequence[CellSpec], content: dict[str, Any], prepared: LaunchData
) -> list[dict[str, Any]]:
    """Cells of the control subjects; the one that is trained comes first."""
    first = next(spec for spec in specs if spec.arm == BASELINE)
    found = []
    if first.module is None and not first.sae.tied:
        frozen = controls.frozen_spec(first)
        found.append(as_job_cell(frozen, cell_key(frozen, content)))
    for name in (schema.CHANNELS, *controls.SUBJECTS):
        if name != schema.CHANNELS or prepared.probing is not None:
            key = replace(cell_key(first, content), control=f"{schema.PREFIX}{name}")
            found.append(as_job_cell(first, key) | {"control": name})
    return found


@dataclass(frozen=True)
class _Wave:
    """What of a launch is to be done now.

    Args:
        ready: the launch.
        specs: cells that are not in the cache.
        cached: how many are.
        jobs: of those cells and of the controls.
        tokens: that they count for.
    """

    ready: PreparedLaunch
    specs: list[CellSpec]
    cached: int
    jobs: list[Job]
    tokens: float

    @property
    def places(self) -> set[Path]:
        """Where its cells and controls will lie."""
        return {self.ready.place(cell["key"]) for job in self.jobs for cell in job.cells}


def _wave(ready: PreparedLaunch, taken: Collection[Path] = ()) -> _Wave:
    """What is not in the cache, nor taken by another run's wave."""
    task, data, keys = ready.task, ready.data, ready.keys

    def is_open(key: Key) -> bool:
        if taken and ready.place(key) in taken:
            return False
        return not _done(ready.cache, key, data)

    specs = [spec for spec, key in keys.items() if is_open(key)]
    jobs = _jobs(task, specs, keys, data, ready.cache)
    beside = [control for control in ready.beside if is_open(control["key"])]
    trained = [control for control in beside if "control" not in control]
    _tidy(ready, [*(keys[spec] for spec in specs), *(control["key"] for control in trained)])
    for some in (trained, [control for control in beside if "control" in control]):
        if some:
            seed = some[0]["seed"]
            jobs.append(Job(some, seed, data, ready.cache, task.experiment, task.name))
    own = [spec.train for spec in specs]
    own += [TrainConfig.parse(control["train"]) for control in trained]
    tokens = sum(config.tokens + evaluation_cost(config) for config in own)
    return _Wave(ready, specs, len(keys) - len(specs), jobs, tokens)


def _tidy(ready: PreparedLaunch, unfinished: Collection[Key]) -> None:
    """Removes checkpoints of finished cells, and those of the others that are damaged."""
    trained = [control["key"] for control in ready.beside if "control" not in control]
    for key in [*ready.keys.values(), *trained]:
        tidy = drop_damaged if key in unfinished else remove_checkpoints
        tidy(resume_folder(ready.cache, key, ready.prepared.train, ready.data.foreign))


def _run(task: Launch, waves: Sequence[_Wave], workers: int, logs: Path) -> None:
    """Trains and evaluates what the waves hold."""
    jobs = [job for wave in waves for job in wave.jobs]
    if not jobs:
        return
    at_once = max(1, min(workers, len(jobs)))
    seconds = [training_seconds(w.specs, w.ready.prepared.held_out.d, at_once) for w in waves]
    print(
        f"{task.name}: {sum(len(wave.specs) for wave in waves)} cells to train "
        f"({sum(wave.cached for wave in waves)} in the cache), {workers} workers, "
        f"about {clock(sum(seconds))}",
        file=sys.stderr,
    )
    tokens = sum(wave.tokens for wave in waves) or 1.0
    bar = progress(f"{task.name}: train and evaluate", tokens, "tokens")
    with ExitStack() as harvests:
        steps = [harvests.enter_context(closing(wave.ready.prepared.steps)) for wave in waves]
        beside = itertools.chain.from_iterable(steps)
        device = waves[0].ready.data.device
        executor(task.executor)(_work, jobs, workers, logs, bar, beside, device)


def _jobs(
    task: Launch,
    specs: Sequence[CellSpec],
    keys: Mapping[CellSpec, Key],
    data: WorkerData,
    cache: Path,
) -> list[Job]:
    """Groups of cells with the same seed and batch size; the largest groups first.

    The last groups are split up, so that no worker waits long for another at the end.
    """
    others = _other_seeds(keys, task.plan)
    groups: dict[tuple[int, int, int], list[CellSpec]] = {}
    for spec in specs:
        key = (spec.seed, spec.train.batch_size, spec.train.tokens)
        groups.setdefault(key, []).append(spec)
    jobs = []
    for (seed, _, _), members in groups.items():
        for i in range(0, len(members), GROUP):
            some = members[i : i + GROUP]
            plain = [
                as_job_cell(spec, keys[spec])
                | {"probe": _at_target(spec, task.plan)}
                | {"others": [keys[other] for other in others.get(spec, ())]}
                for spec in some
            ]
            jobs.append(Job(plain, seed, data, cache, task.experiment, task.name))
    jobs.sort(key=lambda job: -len(job.cells))
    last = max(1, _workers(task, data.device))
    alone = [replace(job, cells=[cell]) for job in jobs[-last:] for cell in job.cells]
    return [*jobs[:-last], *alone]


def _other_seeds(specs: Iterable[CellSpec], plan: PlanConfig) -> dict[CellSpec, list[CellSpec]]:
    """The cells of other seeds that each cell at the plan's L0 is compared with."""
    arms: dict[str, list[CellSpec]] = {}
    for spec in specs:
        if _at_target(spec, plan):
            arms.setdefault(spec.arm, []).append(spec)
    return {one: others for arm in arms.values() for one, others in partners(arm).items()}


def _work(job: Job, advance: Any, state: dict[str, Any]) -> None:
    """One job in a worker; the opened data stays for the next one."""
    if job.experiment is not None:
        celljob.load_experiment(job.experiment)
    if state.get("data") != job.data:
        state["data"], state["worker"] = job.data, Worker(job.data)
    worker: Worker = state["worker"]
    if "control" in job.cells[0]:
        for control in job.cells:
            advance(0.0, progress_lines.line(control, EVALUATE))
            _control(worker, control, job.cache)
            advance(0.0, progress_lines.line(control, DONE))
    else:
        worker.run(job, advance)


def _control(worker: Worker, control: dict[str, Any], cache: Path) -> None:
    name = control["control"]
    if name == schema.CHANNELS:
        rows = probing_rows(None, worker.evaluation, prefix="llm")
    else:
        config = SAEConfig.parse(control["sae"])
        setting = controls.Setting(worker.sample, config, control["level"], control["seed"])
        rows = worker.evaluate(controls.SUBJECTS[name](setting), probe=True)
    arm = f"{schema.PREFIX}{name}"
    own = [row.of_cell(arm, -1, control["level"]).as_dict() for row in rows]
    folder = worker.folder(cache, control["key"])
    finish(folder, {"rows": own})
    share(cache, folder)


def _done(cache: Path, key: Key, data: WorkerData) -> bool:
    """Whether a cell is in the cache, undamaged; none is before the activations are complete."""
    if data.train_digest is None:
        return False
    folder = cell_folder(cache, key, data.train_digest)
    return fetch(cache, folder, "cell.json") and is_finished(folder)
