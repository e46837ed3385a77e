"""The cells of a launch that are still to be trained, as jobs for workers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from saelab.data.activations.joined import widths
from saelab.errors import MismatchError
from saelab.evals import of_control
from saelab.evals.measure import channels_control_rows
from saelab.launch import controls, progress_lines
from saelab.launch.cell_key import (
    Key,
    cell_folder,
    cell_key,
    check_machine,
    resume_folder,
)
from saelab.launch.cell_store import finish, is_finished
from saelab.launch.executors import JobSet, executor
from saelab.launch.executors.local import worker_count
from saelab.launch.jobs import Job, JobCell, WorkerData
from saelab.launch.prepare import LaunchData, prepare, source_path
from saelab.launch.seed_pairs import partners
from saelab.launch.worker import Worker
from saelab.preflight.launch_time import Measured, training_seconds
from saelab.preflight.preview import RunCheck
from saelab.progress import clock, progress
from saelab.progress.state import DONE, EVALUATE
from saelab.runs import schema
from saelab.runtime.counting import count
from saelab.seeding import study_seeds
from saelab.storage.cache import cache_folder, fetch, share
from saelab.study.experiment_file import load_experiment
from saelab.study.foreign_code import study_code
from saelab.study.plan import (
    BASELINE,
    BaseConfig,
    CellSpec,
    PlanConfig,
    frozen_control,
)
from saelab.study.task import GROUP, Launch
from saelab.training.resume import drop_damaged, remove_checkpoints


@dataclass(frozen=True, kw_only=True)
class PreparedLaunch:
    """A launch whose data is there.

    Args:
        task: the launch.
        base: its settings with the run's changes.
        prepared, data: what its cells are trained and measured on, here and for workers.
        content: what their numbers depend on besides their settings.
        beside: cells of controls.
        twins: cells of the A/A twin, which are among them; a single comparison has none.
        cache: where finished cells lie.
        code: hash of experiment.py and all that it imports, from before the harvest.
        modules: names of the arms that bring their own modules.
    """

    task: Launch
    base: BaseConfig
    prepared: LaunchData
    data: WorkerData
    content: dict[str, Any]
    beside: list[JobCell]
    twins: tuple[CellSpec, ...]
    cache: Path
    code: str
    modules: tuple[str, ...]

    @classmethod
    def of(cls, task: Launch, before: RunCheck, overlap: bool = False) -> PreparedLaunch:
        """Harvests what is missing; with `overlap` all but the activations to train on."""
        base, cache = before.base, cache_folder(task.root)
        modules = tuple(arm.name for arm in task.run.arms if arm.module)
        code = study_code(task.experiment, modules) if task.experiment else ""
        prepared = prepare(base, cache, base.model.device, overlap)
        data = _data(base, prepared, task)
        content = _data_content(base, prepared, data)
        twins = before.twins
        beside = [
            *(
                JobCell.of(twin, cell_key(twin, content | {"at_target": True}, data.device))
                for twin in twins
            ),
            *_controls(before.specs, content, prepared, data.device),
        ]
        return cls(
            task=task,
            base=base,
            prepared=prepared,
            data=data,
            content=content,
            beside=beside,
            twins=twins,
            cache=cache,
            code=code,
            modules=modules,
        )

    @cached_property
    def keys(self) -> dict[CellSpec, Key]:
        """Key of every cell of the task's run.

        Raises: MismatchError when the code that was imported is no longer that on the disk.
        """
        task = self.task
        if task.experiment is not None:
            _check_code(task.experiment, self.modules, self.code)
        specs = task.cells()
        measured = {there: self.content | {"at_target": there} for there in (False, True)}
        device = self.data.device
        return {
            spec: cell_key(spec, measured[spec.is_at_target(task.plan)], device) for spec in specs
        }

    def twin_places(self) -> dict[CellSpec, Path]:
        """Folder of each cell of the A/A twin."""
        keys = {control.id: control.key for control in self.beside if not control.control}
        return {twin: self.place(keys[twin.id]) for twin in self.twins}

    def place(self, key: Key) -> Path:
        """Folder of a finished cell; blocks until the training activations are complete."""
        return cell_folder(self.cache, key, self.prepared.train.digest)


def _check_code(experiment: Path, modules: Iterable[str], code: str) -> None:
    """Raises: MismatchError when `study_code` is no longer what it was."""
    if study_code(experiment, modules) != code:
        raise MismatchError(
            f"{experiment}, or a file that it imports, was changed after the launch had begun: "
            "start the same command again, which goes on with the cells of unchanged code"
        )


def _workers(task: Launch, device: str) -> int:
    return worker_count(device) if task.workers is None else task.workers


def _data(base: BaseConfig, prepared: LaunchData, task: Launch) -> WorkerData:
    return WorkerData(
        train=source_path(prepared.train),
        train_digest=prepared.train_digest,
        held_out=source_path(prepared.held_out),
        calibration=source_path(prepared.calibration) if prepared.calibration else None,
        foreign=base.activations is not None,
        probing=prepared.probing,
        why_no_probing=prepared.why_no_probing,
        model=base.model if base.activations is None else None,
        layout=base.layout,
        output_hooks=base.output_hooks,
        loss_contexts=base.evaluation.loss_contexts,
        snapshots=base.evaluation.snapshots,
        k_values=base.evaluation.probing.k_values,
        probing_seed=study_seeds(task.plan.study, "evaluation", 1)[0],
        definition=base.evaluation.probing.definition,
        missing_entries=prepared.missing_entries,
        device=base.model.device,
        provenance=prepared.provenance,
        read_ahead=base.harvest.read_ahead,
        extra=base.evaluation.extra,
        sae_probes=prepared.sae_probes,
    )


def _data_content(base: BaseConfig, prepared: LaunchData, data: WorkerData) -> dict[str, Any]:
    """All that a cell's numbers depend on besides its settings and training activations."""
    extra: dict[str, Any] = {"extra": sorted(data.extra)} if data.extra else {}  # else as before
    if data.sae_probes is not None:
        extra["sae_probes"] = data.sae_probes.content()
    return extra | {
        "held_out": prepared.held_out.digest,
        "calibration": prepared.calibration_digest,
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
    }


def _controls(
    specs: Sequence[CellSpec], content: dict[str, Any], prepared: LaunchData, device: str
) -> list[JobCell]:
    """Cells of the control subjects; the one that is trained comes first."""
    has_target = bool(widths(prepared.held_out)[1])
    first = next(spec for spec in specs if spec.id.arm == BASELINE)
    job_cells = []
    if trained := frozen_control(specs):
        frozen = controls.frozen_spec(trained)
        job_cells.append(JobCell.of(frozen, cell_key(frozen, content, device)))
    for name in (schema.CHANNELS, *controls.subjects(has_target)):
        if name != schema.CHANNELS or prepared.probing or prepared.sae_probes:
            key = replace(cell_key(first, content, device), control=schema.control_arm(name))
            job_cells.append(JobCell.of(first, key, control=name))
    return job_cells


@dataclass(frozen=True, kw_only=True)
class _Wave:
    """Part of a launch that is to be done now.

    Args:
        ready: the launch.
        specs: cells that are not in the cache.
        cached: how many are.
        jobs: of those cells and of the controls.
        tokens: that its cells, and the control that is trained, are trained on.
        controls: whether control subjects are among the jobs.
        twins: cells of the A/A twin among them.
        trained_controls: number of controls that are trained: the twin's cells, and the frozen
            decoder's.
    """

    ready: PreparedLaunch
    specs: list[CellSpec]
    cached: int
    jobs: list[Job]
    tokens: float
    controls: bool
    twins: list[CellSpec]
    trained_controls: int

    @property
    def measured(self) -> Measured:
        """Data that its cells are measured on."""
        ready = self.ready
        level = schema.level_of(ready.task.plan.target_l0)
        return Measured.of(ready.base, ready.prepared.held_out.d, level)

    @property
    def places(self) -> set[Path]:
        """Folders in which its cells and controls will lie."""
        return {self.ready.place(cell.key) for job in self.jobs for cell in job.cells}


def _wave(ready: PreparedLaunch, taken: Collection[Path] = ()) -> _Wave:
    """Collects what is neither in the cache nor taken by another run's wave."""
    data, keys = ready.data, ready.keys

    def is_open(key: Key) -> bool:
        if taken and ready.place(key) in taken:
            return False
        return not _done(ready.cache, key, data)

    specs = [spec for spec, key in keys.items() if is_open(key)]
    jobs = _jobs(ready, specs)
    beside = [control for control in ready.beside if is_open(control.key)]
    trained = [control for control in beside if not control.control]
    _tidy(ready, [*(keys[spec] for spec in specs), *(control.key for control in trained)])
    jobs += [_job(ready, [control]) for control in trained]
    if others := [control for control in beside if control.control]:
        jobs.append(_job(ready, others))
    trainings = [spec.train for spec in specs] + [control.train_config for control in trained]
    return _Wave(
        ready=ready,
        specs=specs,
        cached=len(keys) - len(specs),
        jobs=jobs,
        tokens=sum(config.tokens for config in trainings),
        controls=bool(beside),
        twins=[twin for twin in ready.twins if twin.id in {control.id for control in trained}],
        trained_controls=len(trained),
    )


def _tidy(ready: PreparedLaunch, unfinished: Collection[Key]) -> None:
    """Removes checkpoints of finished cells, and those of the others that are damaged."""
    trained = [control.key for control in ready.beside if not control.control]
    for key in [*ready.keys.values(), *trained]:
        tidy = drop_damaged if key in unfinished else remove_checkpoints
        tidy(resume_folder(ready.cache, key, ready.prepared.train, ready.data.foreign))


def _run(task: Launch, waves: Sequence[_Wave], workers: int, logs: Path) -> None:
    """Trains and evaluates what the waves hold."""
    jobs = [job for wave in waves for job in wave.jobs]
    if not jobs:
        return
    at_once = max(1, min(workers, len(jobs)))
    seconds = [
        training_seconds([*w.specs, *w.twins], w.measured, at_once, w.controls) for w in waves
    ]
    n_beside = sum(wave.trained_controls for wave in waves)
    beside = f" and {count(n_beside, 'trained control')}" if n_beside else ""
    if not task.quiet:
        print(
            f"{task.label}: {count(sum(len(wave.specs) for wave in waves), 'cell')} to train "
            f"({sum(wave.cached for wave in waves)} in the cache){beside}, "
            f"{count(workers, 'worker')}, "
            f"about {clock(sum(seconds))}",
            file=sys.stderr,
        )
    tokens = sum(wave.tokens for wave in waves) or 1.0
    bar = progress(f"{task.label}: train and evaluate", tokens, "tokens")
    with ExitStack() as harvests:
        steps = [harvests.enter_context(closing(wave.ready.prepared.steps)) for wave in waves]
        harvest = itertools.chain.from_iterable(steps)
        device = waves[0].ready.data.device
        executor(task.executor)(
            JobSet(
                function=_work,
                jobs=jobs,
                workers=workers,
                logs=logs,
                bar=bar,
                local_work=harvest,
                device=device,
            )
        )


def _job(ready: PreparedLaunch, members: list[JobCell]) -> Job:
    """One message to a worker; its cells have one seed."""
    return Job(
        cells=members,
        seed=members[0].id.seed,
        data=ready.data,
        cache=ready.cache,
        experiment=ready.task.experiment,
        run=ready.task.entry,
        code=ready.code,
        modules=ready.modules,
    )


def _jobs(ready: PreparedLaunch, specs: Sequence[CellSpec]) -> list[Job]:
    """Groups of cells with the same seed and batch size; the largest groups first.

    The last groups are split up, so that no worker waits long for another at the end.
    """
    keys, plan = ready.keys, ready.task.plan
    others = other_seeds(keys, plan)
    groups: dict[tuple[int, int, int], list[CellSpec]] = {}
    for spec in specs:
        key = (spec.id.seed, spec.train.batch_size, spec.train.tokens)
        groups.setdefault(key, []).append(spec)
    jobs = []
    for members in groups.values():
        for i in range(0, len(members), GROUP):
            job_cells = [
                JobCell.of(
                    spec,
                    keys[spec],
                    at_target=spec.is_at_target(plan),
                    others=tuple(keys[other] for other in others.get(spec, ())),
                )
                for spec in members[i : i + GROUP]
            ]
            jobs.append(_job(ready, job_cells))
    jobs.sort(key=lambda job: -len(job.cells))
    last = max(1, _workers(ready.task, ready.data.device))
    alone = [replace(job, cells=[cell]) for job in jobs[-last:] for cell in job.cells]
    return [*jobs[:-last], *alone]


def other_seeds(specs: Iterable[CellSpec], plan: PlanConfig) -> dict[CellSpec, list[CellSpec]]:
    """The cells of other seeds that each cell at the plan's L0 is compared with."""
    arms: dict[str, list[CellSpec]] = {}
    for spec in specs:
        if spec.is_at_target(plan):
            arms.setdefault(spec.id.arm, []).append(spec)
    return {one: others for arm in arms.values() for one, others in partners(arm).items()}


def _work(job: Job, advance: Any, state: dict[str, Any]) -> None:
    """One job in a worker; the opened data stays for the next one.

    Raises: MismatchError in a worker that has other kernels or other code of the user than the
        launch's process.
    """
    check_machine(job.cells[0].key.machine, job.data.device)
    if job.experiment is not None and state.get("code") != job.code:
        load_experiment(job.experiment)
        _check_code(job.experiment, job.modules, job.code)
        state["code"] = job.code
    if state.get("data") != job.data:
        state["data"], state["worker"] = job.data, Worker(job.data)
    worker: Worker = state["worker"]
    if job.cells[0].control:
        for control in job.cells:
            advance(0.0, progress_lines.line(control.display_id, EVALUATE))
            _control(worker, control, job.cache)
            advance(0.0, progress_lines.line(control.display_id, DONE))
    else:
        worker.run(job, advance)


def _control(worker: Worker, control: JobCell, cache: Path) -> None:
    """Evaluates a control subject that needs no training and writes its rows into the cache."""
    name, level = control.control, control.id.level
    if name == schema.CHANNELS:
        rows = channels_control_rows(worker.evaluation)
    else:
        setting = controls.Setting(worker.sample, control.sae_config, level, control.id.seed)
        made = controls.subjects(worker.sample.y is not None)[name](setting)
        rows = worker.evaluate(made, of_control(worker.data.extra))
    cell = replace(control.display_id, seed=-1)
    folder = worker.folder(cache, control.key)
    finish(folder, {"rows": [row.of_cell(cell).as_dict() for row in rows]})
    share(cache, folder)


def _done(cache: Path, key: Key, data: WorkerData) -> bool:
    """Returns True if a cell is in the cache, undamaged; none is before the activations are
    complete."""
    if data.train_digest is None:
        return False
    folder = cell_folder(cache, key, data.train_digest)
    return fetch(cache, folder, "cell.json") and is_finished(folder)
