"""One launch from start to end: plan, data, cells, verdict, files.

    cells(plan) -> prepare (harvest) -> jobs in workers -> gate and verdict -> run folder

Where `harvest.overlap` says so, this process harvests the training activations while the workers
train on those that are there; a worker waits for a shard that is not (docs/decisions/0009).

A cell that is in the cache is not trained again. The run folder is filled at the end and
`final_info.json` is its last file, so an interrupted launch leaves no folder that looks complete,
and the same command goes on where it stopped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saelab.errors import SettingError, StudyFailure, nearest
from saelab.evals.sae_probes import metric_names
from saelab.launch.collect import collect
from saelab.launch.executors import LOCAL, executor_name
from saelab.launch.executors.environment import check_environment
from saelab.launch.record import Record
from saelab.launch.waves import (
    PreparedLaunch,
    _run,
    _Wave,
    _wave,
    _workers,
)
from saelab.preflight.launch_time import training_seconds
from saelab.preflight.memory import fit_workers, refuse
from saelab.preflight.preview import RunCheck, check, check_limit
from saelab.progress import clock
from saelab.progress.run import launch_progress, log_cells, log_progress
from saelab.progress.trackers import open_tracker
from saelab.runs.folder import MANIFEST, SEALED, SUMMARY, RunFolder
from saelab.runs.random_code import SHARE
from saelab.runs.schema import CELLS, MARK, QUICK, SETTINGS, CellId
from saelab.runtime import exhaustion
from saelab.runtime.counting import count
from saelab.runtime.main_guard import refuse_unguarded_script
from saelab.runtime.safe_text import visible
from saelab.runtime.torch_defaults import standard_torch
from saelab.storage.atomic import WriteError, read_sealed
from saelab.storage.cache import cache_folder, has_activations
from saelab.storage.links import refuse_links
from saelab.storage.lock import lock_folder
from saelab.study.checks import naming_arm
from saelab.study.plan import (
    BASELINE,
    BaseConfig,
    CellSpec,
    FromArm,
    ParallelConfig,
    PlanConfig,
    arm_settings,
    describe_probing,
    first_wave,
    later_arms,
    resolve,
    resolve_with_placeholders,
)
from saelab.study.registry import deviations as list_deviations
from saelab.study.registry import register
from saelab.study.task import GROUP, Launch
from saelab.training.curves import read_curve
from saelab.verdict.across_settings import AcrossSettings, general_comparisons
from saelab.verdict.across_text import across_text
from saelab.verdict.arms import ArmResult
from saelab.verdict.decision import Decision, decide_run, lines_to_print
from saelab.verdict.error_budget.hypotheses import (
    OVER_SETTINGS,
    hypotheses,
    hypotheses_over_settings,
    planned_comparisons,
)
from saelab.verdict.error_budget.ledger import (
    Allotted,
    allot,
    budget,
    lost_comparisons,
    next_level,
    record_results,
)
from saelab.verdict.final_info import CORE, add_budget, final_info, mark
from saelab.verdict.gate import check_expected
from saelab.verdict.judge import Comparison
from saelab.verdict.review import Judged, judge_files
from saelab.verdict.summary import table


@standard_torch()
def launch(task: Launch) -> list[Comparison]:
    """Runs one launch and writes its folder; prints the table of results.

    Raises: UsageError for bad input, StudyFailure when the baseline has no valid cell, BusyError
        while another launch has the same folder.
    """
    refuse_unguarded_script()
    with exhaustion.as_usage_error():
        _check_folder(task.out_dir)
        with lock_folder(task.out_dir, f"is making {task.label}"):
            return _launch(task)


def _launch(task: Launch) -> list[Comparison]:
    start = time.monotonic()
    check_open(task)
    before = check_launch(task)
    base = before.base
    cache = cache_folder(task.root)
    for line in [*([] if task.quiet else [before.needs.line()]), *before.warnings]:
        print(f"{task.label}: {visible(line)}", file=sys.stderr)
    task = _within_memory(task, before)
    if base.activations is None and not has_activations(cache):
        before.check_limit()
    deviations: tuple[str, ...] = ()
    if task.judged:
        deviations = _register(task)
    about = {"run": task.label, "title": task.run.title, "study": task.plan.study}
    with launch_progress(task.out_dir, about, base.tracker):
        outcome = _launched(task, before, deviations, start)
    if not task.quiet:
        _print_outcome(task, outcome, time.monotonic() - start)
    return outcome.judged.comparisons


@dataclass(frozen=True)
class _Outcome:
    """A launch that is judged: the table and the decisions that it prints."""

    judged: Judged
    table: str
    decisions: list[Decision]


def _register(task: Launch) -> tuple[str, ...]:
    """Registers plan and base settings as their files say, and returns what deviates from what is
    registered; options of the command line that changed them do too."""
    plan, base = task.planned_as or task.plan, task.based_on or task.base
    register(task.root, plan, base, task.table, task.setting)
    return list_deviations(task.root, task.plan, task.base, task.table, task.setting)


def _print_outcome(task: Launch, outcome: _Outcome, seconds: float) -> None:
    judged = outcome.judged
    print(visible(outcome.table, keep="\n"))
    print(f"\n{task.out_dir}: {count(len(judged.gates), 'cell')} in {clock(seconds)}")
    print(visible(_place_text(task, [gate.id for gate in judged.gates.values()])))
    print(visible(_next_text(task, judged)))
    for line in lines_to_print(outcome.decisions, task.run.arms):
        print(line)


def _place_text(task: Launch, ids: Sequence[CellId]) -> str:
    """Says where the trained SAEs of a launch lie."""
    folder = task.out_dir / CELLS
    if len(ids) == 1:
        return f"the trained SAE is in {folder / ids[0].folder}"
    example = folder / ids[0].folder
    return f"the trained SAEs are in {folder}, such as {example}"


def _next_text(task: Launch, judged: Judged) -> str:
    """Says what is to be read first, and which commands go on from there."""
    summary = task.out_dir / SUMMARY
    option = _experiment_option(task)
    if task.purpose == QUICK:
        report = f"`saelab report {task.out_dir} --out {task.out_dir}.html{option}`"
        return (
            f"{MARK}: few tokens, seeds and arms; read {summary}; next: {report}, "
            f"`saelab run {task.entry}` (the run itself)"
        )
    if task.judged:
        folder = task.out_dir
        return (
            f"read {summary}; next: `saelab report {folder}{option}` (one page with figures), "
            f"`python plot.py` (pictures), `saelab verdict {folder}` (the verdict again)"
        )
    first = next(iter(judged.gates.values())).id
    example = task.out_dir / CELLS / first.folder
    python = f"`saelab.load({str(example)!r})` in Python"
    return (
        f"read {summary}; next: `saelab latent {example} 7` (what a latent is active on), "
        f"`saelab report {task.out_dir}`, `saelab export`, {python}"
    )


def _experiment_option(task: Launch) -> str:
    """Returns the option of commands that load the trained SAEs, where their parts are defined in
    the study's experiment.py; '' elsewhere."""
    run = resolve_with_placeholders(task.run)
    sae_settings = (arm_settings(task.base, run, arm).sae for arm in run.arms)
    modules = {type(part).__module__ for sae in sae_settings for part in sae.all_parts()}
    if task.experiment is None or all(name.startswith("saelab.") for name in modules):
        return ""
    return f" --experiment {task.experiment.name}"


def _launched(
    task: Launch, before: RunCheck, deviations: tuple[str, ...], start: float
) -> _Outcome:
    """The launch after its checks: trains, measures, writes the run folder, judges it from there.

    Raises: as `launch`.
    """
    base = before.base
    overlap = (task.executor or executor_name()) == LOCAL and base.harvest.overlaps(
        base.model.device
    )
    ready = PreparedLaunch.of(task, before, overlap)
    if warning := ready.prepared.warning:
        print(f"{task.label}: {visible(warning)}", file=sys.stderr)
    if later_arms(task.run):
        early = replace(ready, task=replace(task, run=first_wave(task.run)))
        waiting = {arm.name for arm in later_arms(task.run)}
        ended = _trained(early, [spec for spec in before.specs if spec.id.arm in waiting])
        run = resolve(task.run, lambda found: _value(found, task.plan, ended))
        task = replace(task, run=run)
        # where they overlapped, the harvest is complete by now
        ready = replace(PreparedLaunch.of(task, before) if overlap else ready, task=task)
    folders = _trained(ready)
    log_progress({"stage": "verdict", "done": 0, "total": 1})
    collected = collect(ready, folders)
    levels = _allot(task, base, folders)
    record = Record(
        task=task,
        base=base,
        folders=folders,
        data=ready.prepared,
        deviations=_with_lost(task, deviations),
        levels=levels,
        twin=collected.twin,
    )
    record.write_measurements(collected.rows, collected.gates)
    judged = judge_files(RunFolder(task.out_dir))
    if task.judged:
        made = [*judged.comparisons, *map(_over_settings, judged.across)]
        record_results(task.root, task.label, levels, made)
    settings = {arm.name: arm_settings(task.base, task.run, arm) for arm in task.run.arms}
    hook_name = str(ready.prepared.provenance.get("hook_name", ""))
    left = budget(task.root, task.plan) if task.judged else None
    general = general_comparisons(judged.comparisons, judged.across)
    share = left.left if left else None
    decisions = decide_run(judged.arms, general, task.plan, share) if task.judged else []
    info = final_info(
        judged.arms,
        judged.comparisons,
        judged.differences,
        settings,
        hook_name,
        judged.across,
        decisions,
    )
    add_budget(info, left)
    if task.purpose == QUICK:
        mark(info, QUICK, MARK)
    record.write_verdict(judged, info, collected.rows, time.monotonic() - start, left)
    _check_baseline(task, judged.arms)
    probed = describe_probing(ready.base)
    shown = table(info, judged.comparisons, task.plan, collected.controls, judged.rivals, probed)
    if judged.across:
        shown += "\n\n" + across_text(judged.across)
    return _Outcome(judged, shown, decisions)


def _allot(task: Launch, base: BaseConfig, folders: Mapping[CellSpec, Path]) -> dict[str, Allotted]:
    """Level of each arm's comparison, from the study's error budget; {} outside a study."""
    asked = hypotheses(task.run, base, folders)
    if not (task.judged and asked):
        return {}
    if task.further_settings:
        further = [task.out_dir / SETTINGS / name for name in task.further_settings]
        asked += hypotheses_over_settings(asked, [RunFolder(folder) for folder in further])
    return allot(
        task.root,
        task.plan,
        asked,
        run=task.label,
        confirming=task.purpose == "confirm",
        planned=_planned(task),
    )


def _planned(task: Launch) -> int:
    """Comparisons that the study has planned, where its plan does not say."""
    return task.planned or planned_comparisons(task.table, len(task.plan.settings))


def _over_settings(a: AcrossSettings) -> Comparison:
    """The general word of an arm, as the ledger holds it."""
    return Comparison(
        arm=a.arm + OVER_SETTINGS,
        metric=a.metric,
        level=a.level,
        sesoi=a.sesoi,
        exploratory=a.exploratory,
        word=a.word,
    )


def _with_lost(task: Launch, deviations: tuple[str, ...]) -> tuple[str, ...]:
    """The deviations, with that of a ledger that lacks comparisons; it is printed too."""
    lost = lost_comparisons(task.root) if task.judged else ()
    for text in lost:
        print(f"{task.name}: {visible(text)}", file=sys.stderr)
    return (*deviations, *lost)


def check_open(task: Launch) -> None:
    """Raises: SettingError when the run is complete, unless it is to be replaced."""
    if (task.out_dir / "final_info.json").exists() and not task.force:
        raise SettingError(
            "out_dir", str(task.out_dir), "is a complete run: name another, or delete it first"
        )


def check_launch(task: Launch) -> RunCheck:
    """Describes what a launch will be; nothing is trained.

    Raises: UsageError for what is impossible.
    """
    check_environment(task.executor)
    specs = task.cells(resolve_with_placeholders(task.run))
    for arm in task.run.arms:
        with naming_arm(arm.name):
            check_expected(arm.expected)
    base = task.base.patched(dict(task.run.changes))
    if base.parallel != ParallelConfig():
        remedy = "splits one SAE of `saelab train`: cells of a run have a process each"
        raise SettingError("parallel", base.parallel.model_dump(), remedy)
    _check_primary(task.plan.primary, base)
    open_tracker(base.tracker, task.out_dir, {})
    return check(task, specs, _workers(task, base.model.device), _expected_level(task))


def _expected_level(task: Launch) -> float | None:
    """Level that the run's comparisons would get from the study's budget; None outside a study."""
    if not task.judged:
        return None
    return next_level(
        task.root,
        task.plan,
        max(len(task.run.arms) - 1, task.plan.family or 0),
        confirming=task.purpose == "confirm",
        planned=_planned(task),
    )


def _value(found: FromArm, plan: PlanConfig, folders: Mapping[CellSpec, Path]) -> Any:
    """Final value of an arm: the mean over its cells at the plan's L0, or its last cell's course.

    Raises: SettingError when the arm has no such value.
    """
    own = [spec for spec in folders if spec.id.arm == found.arm and spec.is_at_target(plan)]
    if found.path:
        points = read_curve(folders[own[-1]] / "curves.parquet", found.name)
    else:
        last = [read_sealed(folders[spec] / "cell.json")["last"].get(found.name) for spec in own]
        points = [value for value in last if value is not None]
    if not points:
        raise SettingError("FromArm.name", found.name, f"{found.arm} logs no such value: fix it")
    return tuple(points) if found.path else sum(points) / len(points)


def _within_memory(task: Launch, before: RunCheck) -> Launch:
    """The launch with as many workers as the memory here holds; the bits are those of any number.

    Raises: SettingError when it holds not even one.
    """
    workers = fit_workers(before.base, before.specs, before.workers, GROUP)
    if workers is None:
        refuse(before.base, before.specs, GROUP)
    elif workers < before.workers:
        fewer = f"{count(workers, 'worker')} instead of {before.workers}"
        print(f"{task.label}: {fewer}, which fits the memory here", file=sys.stderr)
        return replace(task, workers=workers)
    return task


def _check_folder(folder: Path) -> None:
    """Raises: UsageError when the run folder could not be made after training."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise SettingError("out_dir", str(folder), f"{there} is not a folder: name another")
    if folder.is_symlink():
        remedy = f"{folder} is a link, and so leads elsewhere: name another"
        raise SettingError("out_dir", str(folder), remedy)
    refuse_links(folder)
    for name in (MANIFEST, *SEALED):
        if (folder / name).is_dir():
            remedy = f"{folder / name} is a folder where a file belongs: move it, or name another"
            raise SettingError("out_dir", str(folder), remedy)
    if not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(f"{folder} can't be written in {there}: choose another folder")


def _check_primary(primary: str, base: BaseConfig) -> None:
    """Raises: SettingError when no evaluation of this launch gives the metric."""
    probing, measured = base.evaluation.probing, [*CORE, "mse", "ce_rise", SHARE]
    if base.activations is None and (probing.tables or probing.entries != "none"):
        measured += [f"sae_top_{k}_test_accuracy" for k in probing.k_values]
        measured.append("sae_test_accuracy")
    if base.activations is None and "sae_probes" in base.evaluation.extra:
        measured += metric_names(base.evaluation.sae_probes)
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
            f"{task.label}: the baseline has no valid cell ({why}): fix the baseline's settings"
        )


# ---- training --------------------------------------------------------------------------------


def train_together(tasks: Sequence[Launch]) -> None:
    """Trains the cells of several runs as one list, in which none stands twice; their launches then
    find them in the cache. Arms of a second wave are left to their launch.

    Raises: as a launch.
    """
    waves: list[_Wave] = []
    for task in tasks:
        early = replace(task, run=first_wave(task.run))
        ready = PreparedLaunch.of(early, check_launch(early))
        waves.append(_wave(ready, taken={place for wave in waves for place in wave.places}))
    labels = ", ".join(task.label for task in tasks)
    first = replace(tasks[0], name=labels, setting="")
    device, logs = waves[0].ready.data.device, waves[0].ready.cache / "logs"
    _run(first, waves, _workers(first, device), logs)


def _trained(ready: PreparedLaunch, later: Sequence[CellSpec] = ()) -> dict[CellSpec, Path]:
    """Folder of each cell of the task's run, all of them trained and evaluated.

    Args:
        later: cells of a second wave, which count towards the launch's time.
    """
    wave = _wave(ready)
    task, device = ready.task, ready.data.device
    log_cells(len(wave.specs), wave.cached)
    if wave.jobs:
        workers = _workers(task, device)
        at_once = max(1, min(workers, len(wave.jobs)))
        trained = [*wave.specs, *wave.twins, *later]
        whole = training_seconds(trained, wave.measured, at_once, wave.controls)
        check_limit(task.label, whole, task.limit)
        _run(task, [wave], workers, ready.cache / "logs")
    return {spec: ready.place(key) for spec, key in ready.keys.items()}
