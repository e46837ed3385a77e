"""One launch from start to end: plan, data, cells, verdict, files.

    cells(plan) -> prepare (harvest) -> jobs in workers -> gate and verdict -> run folder

Where `harvest.overlap` says so, this process harvests the training activations while the workers
train on those that are there; a worker waits for a shard that is not (docs/decisions/0009).

A cell that is in the cache is not trained again. The run folder is filled at the end and
`final_info.json` is its last file, so an interrupted launch leaves no folder that looks complete,
and the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saelab.errors import SettingError, StudyFailure, nearest
from saelab.evals import probing_rows
from saelab.evals.core import CoreData
from saelab.launch import controls, progress_lines
from saelab.launch import worker as celljob
from saelab.launch.cell_store import finish, is_finished
from saelab.launch.executors import LOCAL, chosen, executor
from saelab.launch.executors.local import one_thread, worker_count
from saelab.launch.prepare import Prepared, prepare, source_path
from saelab.launch.record import Record
from saelab.launch.seed_pairs import compare, partners, rows_of_seeds
from saelab.launch.worker import (
    GROUP,
    PROBED,
    Data,
    Job,
    Key,
    Worker,
    as_job_cell,
    cell_folder,
    cell_key,
    curve,
    evaluation_cost,
    resume_folder,
)
from saelab.preflight.estimate import training_seconds
from saelab.preflight.memory import fitting, refuse
from saelab.preflight.preview import RunCheck, check, check_limit
from saelab.progress import clock, progress
from saelab.progress.run import tell, tell_cells, told
from saelab.progress.state import DONE, EVALUATE
from saelab.progress.trackers import open_tracker
from saelab.runtime import exhaustion
from saelab.runtime.safe_text import visible
from saelab.sae import SAEConfig
from saelab.seeding import study_seeds
from saelab.storage.atomic import WriteError, read_sealed
from saelab.storage.cache import cache_folder, fetch, has_activations, share
from saelab.storage.lock import held
from saelab.study.plan import (
    BASELINE,
    BaseConfig,
    CellSpec,
    Found,
    ParallelConfig,
    PlanConfig,
    Run,
    arm_settings,
    cells,
    first_wave,
    later_arms,
    preview,
    resolved,
)
from saelab.study.registry import register
from saelab.training.optim import TrainConfig
from saelab.training.resume import drop_damaged, remove_checkpoints
from saelab.verdict.final_info import (
    CORE,
    ArmResult,
    CellGate,
    final_info,
    judge_planted,
    judge_run,
)
from saelab.verdict.judge import Comparison
from saelab.verdict.summary import table

#: A launch that is expected to take longer is refused: a driver would kill it at 7200 s.
LONGEST = 7000.0


@dataclass(frozen=True)
class Launch:
    """What to do and where.

    Args:
        name: of the run, 'run_3'.
        run: its arms.
        out_dir: the run folder to make.
        root: folder of plan.toml; the cache lies there.
        experiment: the file with the run table, for workers that need its parts.
        purpose: 'explore', 'confirm' or 'tune': which seeds.
        force: replace a complete run.
        limit: seconds that the launch may be expected to take.
        workers: processes; 0 works in this one, None takes one per core.
        executor: where the cells are trained, see `executors`; '' for what SAELAB_EXECUTOR names.
    """

    name: str
    run: Run
    plan: PlanConfig
    base: BaseConfig
    out_dir: Path
    root: Path
    experiment: Path | None = None
    purpose: str = "explore"
    force: bool = False
    limit: float = LONGEST
    workers: int | None = None
    executor: str = ""

    @property
    def judged(self) -> bool:
        """Whether it is a run of a study: a single comparison or a tuning registers nothing."""
        return self.experiment is not None and self.purpose != "tune"


@dataclass(frozen=True)
class Ready:
    """A launch whose data is there.

    Args:
        task: the launch.
        prepared, data: what its cells are trained and measured on, here and for workers.
        content: what their numbers depend on besides their settings.
        beside: cells of controls.
        cache: where finished cells lie.
    """

    task: Launch
    prepared: Prepared
    data: Data
    content: dict[str, Any]
    beside: list[dict[str, Any]]
    cache: Path

    @classmethod
    def of(cls, task: Launch, before: RunCheck, overlap: bool = False) -> Ready:
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


def launch(task: Launch) -> list[Comparison]:
    """Runs one launch and writes its folder; prints the table of results.

    Raises: UsageError for bad input, StudyFailure when the baseline has no valid cell, BusyError
        while another launch has the same folder.
    """
    _check_folder(task.out_dir)
    with exhaustion.named(), held(task.out_dir, f"is making {task.name}"):
        return _launch(task)


def _launch(task: Launch) -> list[Comparison]:
    start = time.monotonic()
    check_open(task)
    before = checked(task)
    base = before.base
    cache = cache_folder(task.root)
    for line in [before.needs.line(), *before.warnings]:
        print(f"{task.name}: {visible(line)}", file=sys.stderr)
    task = _within_memory(task, before)
    if base.activations is None and not has_activations(cache):
        before.check_limit()
    deviations = register(task.root, task.plan) if task.judged else ()
    about = {"run": task.name, "title": task.run.title, "study": task.plan.study}
    with told(task.out_dir, about, base.tracker):
        record, of_controls = _launched(task, before, cache, deviations, start)
    shown = table(record.info, record.comparisons, task.plan, of_controls)
    print(visible(shown, kept="\n"))
    taken = clock(time.monotonic() - start)
    print(f"\n{task.out_dir}: {len(record.folders)} cells in {taken}")
    return list(record.comparisons)


def _launched(
    task: Launch, before: RunCheck, cache: Path, deviations: tuple[str, ...], start: float
) -> tuple[Record, list[dict[str, Any]]]:
    """The launch after its checks: what it left in its folder, and the rows of its controls.

    Raises: as `launch`.
    """
    base = before.base
    overlap = (task.executor or chosen()) == LOCAL and base.harvest.overlaps(base.model.device)
    ready = Ready.of(task, before, overlap)
    if later_arms(task.run):
        early = replace(ready, task=replace(task, run=first_wave(task.run)))
        waiting = {arm.name for arm in later_arms(task.run)}
        ended = _trained(early, [spec for spec in before.specs if spec.arm in waiting])
        run = resolved(task.run, lambda found: _value(found, task.plan, ended))
        task = replace(task, run=run)
        # where they overlapped, the harvest is complete by now
        ready = replace(Ready.of(task, before) if overlap else ready, task=task)
    folders = _trained(ready)
    tell({"stage": "verdict", "done": 0, "total": 1})
    prepared = ready.prepared
    places = [ready.place(control["key"]) for control in ready.beside]
    places += _planted(ready, folders)
    of_controls = _control_rows(places)
    arms, rows, gates = _collect(
        task, folders, random_band(of_controls, base.evaluation.probing.test_size), cache
    )
    rows += of_controls
    comparisons, differences = judge_run(arms, task.plan, task.purpose != "confirm")
    info = final_info(arms, comparisons, differences, prepared.provenance)
    planted = judge_planted(of_controls, arms[BASELINE], task.plan)
    record = Record(
        task, base, folders, arms, rows, gates, prepared, comparisons, info, deviations, planted
    )
    record.write(time.monotonic() - start)
    _check_baseline(task, arms)
    return record, of_controls


def check_open(task: Launch) -> None:
    """Raises: SettingError when the run is complete, unless it is to be replaced."""
    if (task.out_dir / "final_info.json").exists() and not task.force:
        raise SettingError(
            "out_dir", str(task.out_dir), "is a complete run: name another, or delete it first"
        )


def checked(task: Launch) -> RunCheck:
    """What a launch will be; nothing is trained.

    Raises: UsageError for what is impossible.
    """
    specs = cells(task.plan, task.base, preview(task.run), task.purpose)
    base = task.base.patched(dict(task.run.changes))
    if base.parallel != ParallelConfig():
        remedy = "splits one SAE of `saelab train`: cells of a run have a process each"
        raise SettingError("parallel", base.parallel.model_dump(), remedy)
    _check_primary(task.plan.primary, base)
    open_tracker(base.tracker, task.out_dir, {})
    return check(task, specs, _workers(task, base.model.device))


def _value(found: Found, plan: PlanConfig, folders: Mapping[CellSpec, Path]) -> Any:
    """What the arm ended with: the mean over its cells at the plan's L0, or its last cell's course.

    Raises: SettingError when the arm has no such value.
    """
    own = [spec for spec in folders if spec.arm == found.arm and _at_target(spec, plan)]
    if found.path:
        points = curve(folders[own[-1]] / "curves.parquet", found.name)
    else:
        last = [read_sealed(folders[spec] / "cell.json")["last"].get(found.name) for spec in own]
        points = [value for value in last if value is not None]
    if not points:
        raise SettingError("Found.name", found.name, f"{found.arm} logs no such value: mend it")
    return tuple(points) if found.path else sum(points) / len(points)


def _at_target(spec: CellSpec, plan: PlanConfig) -> bool:
    return spec.level == (plan.target_l0 or 0)


def _within_memory(task: Launch, before: RunCheck) -> Launch:
    """The launch with as many workers as the memory here holds; the bits are those of any number.

    Raises: SettingError when it holds not even one.
    """
    workers = fitting(before.base, before.specs, before.workers, GROUP)
    if workers is None:
        refuse(before.base, before.specs, GROUP)
    elif workers < before.workers:
        told = f"{workers or 'no'} worker{'s' * (workers > 1)} instead of {before.workers}"
        print(f"{task.name}: {told}, which fits the memory here", file=sys.stderr)
        return replace(task, workers=workers)
    return task


def _workers(task: Launch, device: str) -> int:
    return worker_count(device) if task.workers is None else task.workers


def _check_folder(folder: Path) -> None:
    """Raises: UsageError when the run folder could not be made after training."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise SettingError("out_dir", str(folder), f"{there} is no folder: name another")
    for inside in (folder, folder / "cells"):
        if inside.is_symlink():
            remedy = f"{inside} is a link, and so leads elsewhere: name another"
            raise SettingError("out_dir", str(folder), remedy)
    if not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(f"{folder} can't be written in {there}: choose another folder")


def _check_primary(primary: str, base: BaseConfig) -> None:
    """Raises: SettingError when no evaluation of this launch gives the metric."""
    probing, measured = base.evaluation.probing, [*CORE, "mse"]
    if base.activations is None and (probing.tables or probing.entries != "none"):
        measured += [f"sae_top_{k}_test_accuracy" for k in probing.k_values]
        measured.append("sae_test_accuracy")
    if primary not in measured:
        hint = nearest(primary, measured)
        known = f"use one of {', '.join(measured)} (probing needs evaluation.probing)"
        remedy = f"is not measured in this launch{hint}: {known}"
        raise SettingError("primary", primary, remedy)


def _check_baseline(task: Launch, arms: Mapping[str, ArmResult]) -> None:
    """Raises: StudyFailure when no cell of the baseline is valid and has a number."""
    baseline = arms[BASELINE]
    if all(value is None for value in baseline.metric(task.plan.primary).values()):
        reasons = sorted({result.summary() for result in baseline.gates.values()})
        worst = [
            f"seed {s}: {g.findings[0].sentence}" for s, g in baseline.gates.items() if g.findings
        ]
        why = "; ".join([*reasons, *worst[:1]])
        raise StudyFailure(
            f"{task.name}: the baseline has no valid cell ({why}): mend the baseline's settings"
        )


# ---- training --------------------------------------------------------------------------------


def _data(base: BaseConfig, prepared: Prepared, task: Launch) -> Data:
    return Data(
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


def _data_content(base: BaseConfig, prepared: Prepared, data: Data) -> dict[str, Any]:
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
    specs: Sequence[CellSpec], content: dict[str, Any], prepared: Prepared
) -> list[dict[str, Any]]:
    """Cells of the control subjects; the one that is trained comes first."""
    first = next(spec for spec in specs if spec.arm == BASELINE)
    found = []
    if first.module is None and not first.sae.tied:
        frozen = controls.frozen_spec(first)
        found.append(as_job_cell(frozen, cell_key(frozen, content)))
    for name in (controls.CHANNELS, *controls.SUBJECTS):
        if name != controls.CHANNELS or prepared.probing is not None:
            key = replace(cell_key(first, content), control=f"{controls.PREFIX}{name}")
            found.append(as_job_cell(first, key) | {"control": name})
    return found


def _planted(ready: Ready, folders: Mapping[CellSpec, Path]) -> list[Path]:
    """Where the planted effect of each trained baseline cell at the target lies, made here."""
    places, plan = [], ready.task.plan
    core = CoreData(ready.prepared.held_out, None, device=ready.data.device)
    for spec, folder in folders.items():
        wanted = spec.arm == BASELINE and _at_target(spec, plan)
        if not wanted or not (folder / "sae.json").is_file() or len(places) >= plan.seeds_other:
            continue
        key = cell_key(spec, ready.content)
        place = ready.place(replace(key, control=f"{controls.PREFIX}{controls.PLANTED}"))
        if not is_finished(place):
            with one_thread():
                made = controls.planted(folder, core, spec.seed, spec.level)
            finish(place, made)
        places.append(place)
    return places


def train_together(tasks: Sequence[Launch]) -> None:
    """Trains the cells of several runs as one list, in which none stands twice; their launches then
    find them in the cache. Arms of a second wave are left to their launch.

    Raises: as a launch.
    """
    waves: list[_Wave] = []
    for task in tasks:
        early = replace(task, run=first_wave(task.run))
        ready = Ready.of(early, checked(early))
        waves.append(_wave(ready, taken={place for wave in waves for place in wave.places}))
    first = replace(tasks[0], name=", ".join(task.name for task in tasks))
    device, logs = waves[0].ready.data.device, waves[0].ready.cache / "logs"
    _run(first, waves, _workers(first, device), logs)


def _trained(ready: Ready, later: Sequence[CellSpec] = ()) -> dict[CellSpec, Path]:
    """Where each cell of the task's run lies, all of them trained and evaluated.

    Args:
        later: cells of a second wave, which count towards the launch's time.
    """
    wave = _wave(ready)
    task, device = ready.task, ready.data.device
    tell_cells(len(wave.specs), wave.cached)
    if wave.jobs:
        workers = _workers(task, device)
        at_once = max(1, min(workers, len(wave.jobs)))
        width = ready.prepared.held_out.d
        whole = training_seconds([*wave.specs, *later], width, at_once)
        check_limit(task.name, whole, task.limit)
        _run(task, [wave], workers, ready.cache / "logs")
    return {spec: ready.place(key) for spec, key in ready.keys.items()}


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

    ready: Ready
    specs: list[CellSpec]
    cached: int
    jobs: list[Job]
    tokens: float

    @property
    def places(self) -> set[Path]:
        """Where its cells and controls will lie."""
        return {self.ready.place(cell["key"]) for job in self.jobs for cell in job.cells}


def _wave(ready: Ready, taken: Collection[Path] = ()) -> _Wave:
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


def _tidy(ready: Ready, unfinished: Collection[Key]) -> None:
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
    data: Data,
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
    if name == controls.CHANNELS:
        rows = probing_rows(None, worker.evaluation, prefix="llm")
    else:
        config = SAEConfig.parse(control["sae"])
        setting = controls.Setting(worker.sample, config, control["level"], control["seed"])
        rows = worker.evaluate(controls.SUBJECTS[name](setting), probe=True)
    arm = f"{controls.PREFIX}{name}"
    own = [row.of_cell(arm, -1, control["level"]).as_dict() for row in rows]
    folder = worker.folder(cache, control["key"])
    finish(folder, {"rows": own})
    share(cache, folder)


def _done(cache: Path, key: Key, data: Data) -> bool:
    """Whether a cell is in the cache, undamaged; none is before the activations are complete."""
    if data.train_digest is None:
        return False
    folder = cell_folder(cache, key, data.train_digest)
    return fetch(cache, folder, "cell.json") and is_finished(folder)


# ---- collecting ------------------------------------------------------------------------------


def _collect(
    task: Launch, folders: Mapping[CellSpec, Path], shared: Mapping[str, Any], cache: Path
) -> tuple[dict[str, ArmResult], list[dict[str, Any]], dict[str, CellGate]]:
    """Results per arm at the target L0, all rows of all cells, and what the gate sees of each.

    Args:
        shared: facts for the gate that are the same for all cells at the target.
    """
    arms = {
        arm.name: ArmResult(
            arm.name, arm_settings(task.base, task.run, arm).model_dump(mode="json"), arm.against
        )
        for arm in task.run.arms
    }
    rows: list[dict[str, Any]] = []
    other_seeds = _other_seeds(folders, task.plan)
    gates: dict[str, CellGate] = {}
    for spec, folder in folders.items():
        cell = read_sealed(folder / "cell.json")
        if spec in other_seeds:
            others = [folders[other] for other in other_seeds[spec]]
            cell["rows"] += _against(cache, folder, others)
        own = {"arm": spec.arm, "seed": spec.seed, "level": spec.level}
        rows += [row | own for row in cell["rows"]]
        if _at_target(spec, task.plan):
            cell["facts"] |= shared
        gates[spec.name] = CellGate(**own, expected=spec.expected, facts=cell["facts"])
        if _at_target(spec, task.plan):
            arms[spec.arm].add(spec.seed, cell, spec.expected)
        else:
            arms[spec.arm].add_level(spec.seed, spec.level, cell, spec.expected)
    return arms, rows, gates


def random_band(rows: Sequence[dict[str, Any]], texts: int) -> dict[str, float]:
    """Where probing accuracy of a random dictionary lies: the untrained baseline's, with two
    standard errors of a share over the test texts to either side; {} without probing.

    Args:
        rows: of controls.
        texts: test texts of a class.
    """
    name = f"{controls.PREFIX}untrained"
    own = [row for row in rows if (row["arm"], row["metric"]) == (name, PROBED)]
    classes = sum(",class=" in row["slice"] for row in own)
    whole = [row["value"] for row in own if not row["slice"] and row["value"] is not None]
    if not whole or not classes:
        return {}
    error = 2 * math.sqrt(whole[0] * (1 - whole[0]) / (classes * texts))
    return {"random_control_low": whole[0] - error, "random_control_high": whole[0] + error}


def _against(cache: Path, folder: Path, others: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of a cell beside other seeds. Its worker has compared most pairs: not those of cells
    that other launches left in the cache, nor after an interruption."""
    with one_thread():
        for other in others:
            compare(cache, folder, other)
    return [row.as_dict() for row in rows_of_seeds(cache, folder, others)]


def _control_rows(folders: Iterable[Path]) -> list[dict[str, Any]]:
    return [row for folder in folders for row in read_sealed(folder / "cell.json")["rows"]]
