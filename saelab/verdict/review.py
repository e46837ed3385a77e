"""The verdict of finished runs, made again from the files in their folders; nothing is trained.

    metrics.parquet   every number of every cell, with its definition and where it was measured
    gate.json         the facts of every cell that the gate looks at
    manifest.json     plan, arms, purpose

A launch writes these files first and is then judged from them by the same function (`judge_files`).
Runs are shown together only where their plan, their definitions and what was measured on are the
same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from saelab import stats
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.runs.folder import GATE, INFO, MANIFEST, METRICS, REMEDY, RunFolder
from saelab.runs.random_code import complete_losses
from saelab.runs.schema import CONTROL, PROVENANCE, QUICK, CellId, level_of
from saelab.runtime.counting import count
from saelab.runtime.safe_text import visible
from saelab.study.plan import BASELINE, PlanConfig
from saelab.study.registry import changes, plan_hash
from saelab.study.settings import OF_PLAN
from saelab.verdict.across_settings import AcrossSettings, judge_across
from saelab.verdict.across_text import across_text
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.error_budget.hypotheses import OVER_SETTINGS
from saelab.verdict.error_budget.ledger import Budget
from saelab.verdict.final_info import judge_run
from saelab.verdict.gate import ORDER, Outcome
from saelab.verdict.judge import COVERS, Comparison, Difference
from saelab.verdict.losses_in_nats import HEADS, Losses, losses_of_run
from saelab.verdict.over_texts import OverTexts, over_texts
from saelab.verdict.rivals import Rival, find_rivals, rivals_sentence
from saelab.verdict.summary import align_columns, span_text
from saelab.verdict.twin import (
    Planted,
    counted_line,
    judge_planted,
    judge_twin,
    planted_line,
    twin_line,
)


@dataclass(frozen=True, kw_only=True)
class CellNote:
    """A cell that the gate has something to say about.

    Args:
        cell: its arm, seed and level.
        outcome: of the gate: 'invalid', 'relabelled' ...
        check: name of the check.
        expected: whether the run table says that it is expected.
        sentence: what was measured, the limit, and the remedy.
    """

    cell: str
    outcome: Outcome
    check: str
    expected: bool
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Review:
    """The verdict of one run, from its files.

    Args:
        run, title: of the run.
        exploratory: false for the confirmatory run.
        quick: whether this is the quick form of a run, which is no part of the study.
        plan: that the run was made under; `deviations` are those from the registered one then.
        comparisons, differences: of the primary metric, and of secondary ones without words.
        cells: what the gate found, worst first.
        definition: of the primary metric.
        provenance: where the primary metric was measured.
        sealed: whether the run's files carry checksums, with which they agree.
        rivals: controls that are as good as an arm on the primary metric, or better.
        budget: the study's error budget after this run; None outside a study.
        over_texts: interval over documents of each comparison, in their order.
        across: every arm over all settings; () for a plan without further settings.
        twin, planted: verdicts on the baseline at other seeds, on an effect of known size; or None.
        losses: of the language model, in nats; None where it has none.
    """

    run: str
    title: str
    exploratory: bool
    plan: PlanConfig
    deviations: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    differences: tuple[Difference, ...]
    cells: tuple[CellNote, ...]
    definition: str
    provenance: Mapping[str, Any]
    sealed: bool = True
    rivals: tuple[Rival, ...] = ()
    budget: Budget | None = None
    over_texts: tuple[OverTexts, ...] = ()
    across: tuple[AcrossSettings, ...] = ()
    twin: Comparison | None = None
    planted: Planted | None = None
    losses: Losses | None = None
    quick: bool = False

    @cached_property
    def plan_hash(self) -> str:
        return plan_hash(self.plan)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "run": self.run,
            "title": self.title,
            "exploratory": self.exploratory,
            "quick": self.quick,
            "sealed": self.sealed,
            "plan_hash": self.plan_hash,
            "deviations": list(self.deviations),
            "primary": self.plan.primary,
            "direction": self.plan.direction,
            "definition": self.definition,
            "covers": COVERS,
            "comparisons": [asdict(c) for c in self.comparisons],
            "differences": [asdict(d) for d in self.differences],
            "cells": [asdict(note) for note in self.cells],
            "rivals": [asdict(rival) for rival in self.rivals],
            "budget": asdict(self.budget) if self.budget else None,
            "over_texts": [asdict(one) for one in self.over_texts],
            **({"across": [asdict(one) for one in self.across]} if self.across else {}),
            "twin": asdict(self.twin) if self.twin else None,
            "planted": asdict(self.planted) if self.planted else None,
            "losses": asdict(self.losses) if self.losses else None,
        }


def complete_runs(root: Path) -> list[Path]:
    """The folders of all complete runs in `root`, by number.

    Raises: SourceError when there is none.
    """
    found = [file.parent for file in root.glob("run_*/final_info.json")]
    if not found:
        raise SourceError(f"no complete run in {root.resolve()}: name the folder of one")
    return sorted(found, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)] or [0])


def chosen_runs(folders: Sequence[Path] | None) -> list[Path]:
    """Returns the run folders that a command names; without any, all complete runs here.

    `run_*` of a shell also names the pictures run_1_verdict.png and so on: next to folders, files
    are left out.

    Raises: SourceError when none is named and none is here.
    """
    if not folders:
        return complete_runs(Path())
    return [folder for folder in folders if not folder.is_file()] or list(folders)


def review_all(folders: Sequence[Path]) -> list[Review]:
    """The verdicts of runs that may be shown together.

    Raises: MismatchError naming what differs between two runs; errors of `review`.
    """
    found = [review(folder) for folder in folders]
    for first, second in pairwise(found):
        if texts := differences_of(first, second):
            raise MismatchError(
                f"{first.run} and {second.run} are not compared, since they differ in "
                f"{'; '.join(texts)}: judge them one at a time"
            )
    return found


def review(folder: Path) -> Review:
    """The verdict of one finished run, see `review_run`."""
    return review_run(RunFolder(folder))


def review_run(run: RunFolder) -> Review:
    """The verdict of one finished run.

    Raises: SourceError when the run is not complete or was made by an older version; DamageError
        for a file that can't be read or was changed.
    """
    _check_files(run, INFO, MANIFEST, GATE, METRICS)
    _ = run.info  # which must be as it was written
    judged, manifest = judge_files(run), run.manifest
    plan, baseline = judged.plan, judged.arms[manifest["baseline"]]
    measured = next((r for r in run.metrics if r["metric"] == plan.primary and not r["slice"]), {})
    return Review(
        run=manifest["run"],
        title=manifest["title"],
        exploratory=judged.exploratory,
        quick=manifest["purpose"] == QUICK,
        plan=plan,
        deviations=tuple(manifest.get("deviations", ())),
        comparisons=tuple(judged.comparisons),
        differences=tuple(judged.differences),
        cells=tuple(_notes(judged.gates)),
        definition=baseline.definitions.get(plan.primary, "not measured"),
        provenance={name: measured.get(name) for name in PROVENANCE} if measured else {},
        sealed=run.sealed,
        rivals=tuple(judged.rivals),
        budget=stored_budget(manifest),
        over_texts=tuple(judged.over_texts),
        across=tuple(judged.across),
        twin=judged.twin,
        planted=judged.planted,
        losses=judged.losses,
    )


def stored_budget(manifest: Mapping[str, Any]) -> Budget | None:
    """The error budget that a run's manifest holds."""
    stored = manifest.get("budget")
    names = [one.name for one in fields(Budget)]
    return Budget(**{name: stored[name] for name in names if name in stored}) if stored else None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A run judged from its files.

    Args:
        plan, exploratory: the rules, and whether they were applied to exploratory seeds.
        arms: results of each arm.
        gates: facts of every cell, by its name.
        comparisons, differences: of the primary metric, and of secondary ones without words.
        twin: the verdict on the baseline at other seeds; None where the run has no twin.
        planted: the verdict on an effect of known size; None where none was planted.
        rivals: controls that are as good as an arm on the primary metric, or better.
        over_texts: interval over documents of each comparison, in their order.
        across: every arm over all settings; [] for a plan without further settings.
        losses: of the language model, in nats; None where it has none.
    """

    plan: PlanConfig
    exploratory: bool
    arms: Mapping[str, ArmResult]
    gates: Mapping[str, CellGate]
    comparisons: list[Comparison]
    differences: list[Difference]
    twin: Comparison | None
    planted: Planted | None
    rivals: list[Rival]
    over_texts: list[OverTexts]
    across: list[AcrossSettings]
    losses: Losses | None = None


def judge_files(run: RunFolder) -> Judged:
    """Judges a run from metrics.parquet, gate.json and manifest.json alone.

    Raises: SourceError when one of them is missing or was written by an older version; DamageError
        for a file that can't be read or was changed.
    """
    _check_files(run, MANIFEST, GATE, METRICS)
    manifest = run.required("plan", "arms", "purpose", "baseline", "run", "title")
    plan = PlanConfig.parse(manifest["plan"], where=f"{run.folder.name}/{MANIFEST}")
    gates = cell_gates(run)
    _check_named(manifest, gates, run.folder)
    if manifest.get("cells", gates).keys() != gates.keys():
        raise DamageError(f"{run.folder} has a {GATE} of other cells than {MANIFEST}: {REMEDY}")
    rows = complete_losses(run.metrics)
    arms = _arms(manifest["arms"], gates, rows, level_of(plan.target_l0))
    exploratory = manifest["purpose"] != "confirm"
    levels = {arm: each["level"] for arm, each in manifest.get("error_levels", {}).items()}
    comparisons, differences = judge_run(arms, plan, exploratory, levels)
    losses = losses_of_run(rows, arms)
    twin = list(_cell_gates(manifest.get("twin", {})).values())
    controls = [row for row in rows if row["arm"].startswith(CONTROL)]
    return Judged(
        plan=plan,
        exploratory=exploratory,
        arms=arms,
        gates=gates,
        comparisons=comparisons,
        differences=differences,
        twin=judge_twin(controls, twin, arms[BASELINE], plan),
        planted=judge_planted(controls, arms[BASELINE], plan, twin),
        rivals=find_rivals(arms, controls, plan),
        over_texts=over_texts(comparisons, arms, run.documents),
        across=_judge_settings(run, comparisons, plan, levels),
        losses=losses,
    )


def _judge_settings(
    run: RunFolder,
    comparisons: list[Comparison],
    plan: PlanConfig,
    levels: Mapping[str, float],
) -> list[AcrossSettings]:
    """Judges every arm over the settings, each of which is judged from its own files first.

    Args:
        levels: of the comparisons in the plan's own base and, under their names, over settings.
    """
    if not run.settings:
        return []
    of_settings = {name: judge_files(each).comparisons for name, each in run.settings.items()}
    over = {
        name.removesuffix(OVER_SETTINGS): level
        for name, level in levels.items()
        if name.endswith(OVER_SETTINGS)
    }
    return judge_across({OF_PLAN: comparisons} | of_settings, plan.direction, over)


def _check_files(run: RunFolder, *names: str) -> None:
    """Raises: SourceError when the run lacks one of the files."""
    for name in names:
        if not run.has(name):
            remedy = "name the folder of a complete run of this version"
            raise SourceError(f"{run.folder} holds no {name}: {remedy}")


def cell_gates(run: RunFolder) -> dict[str, CellGate]:
    """Facts of every cell in gate.json, by the cell's name."""
    return _cell_gates(run.gates)


def _cell_gates(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, CellGate]:
    """Facts of cells, by their names."""
    return {
        name: CellGate(
            id=CellId(cell["arm"], cell["seed"], cell["level"]),
            expected=tuple(cell["expected"]),
            facts=cell["facts"],
        )
        for name, cell in stored.items()
    }


def _check_named(manifest: Mapping[str, Any], gates: Mapping[str, CellGate], folder: Path) -> None:
    """Raises: DamageError when cells or comparisons are of arms that the run has not."""
    arms = manifest["arms"]
    others = [arm.get("against", BASELINE) for arm in arms.values()]
    of_cells = (cell.id.arm for cell in gates.values())
    for name in (BASELINE, manifest["baseline"], *others, *of_cells):
        if name not in arms:
            raise DamageError(f"{folder} has no arm {name!r}, but its files name it: {REMEDY}")


def _arms(
    names: Mapping[str, Mapping[str, Any]],
    gates: Mapping[str, CellGate],
    rows: Sequence[Mapping[str, Any]],
    target: float,
) -> dict[str, ArmResult]:
    """Results per arm at the target, as the launch had them."""
    by_cell: dict[CellId, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault(CellId(row["arm"], row["seed"], row["level"]), []).append(row)
    arms = {name: ArmResult(name, arm.get("against", BASELINE)) for name, arm in names.items()}
    for cell in gates.values():
        arm, measured = arms[cell.id.arm], by_cell.get(cell.id, [])
        if cell.id.level == target:
            arm.add(cell, measured)
        else:
            arm.add_level(cell, measured)
    return arms


def _notes(gates: Mapping[str, CellGate]) -> list[CellNote]:
    found = [
        CellNote(
            cell=cell,
            outcome=finding.outcome,
            check=finding.check,
            expected=finding.expected,
            sentence=finding.sentence,
        )
        for cell, known in gates.items()
        for finding in known.result.findings
    ]
    return sorted(found, key=lambda note: ORDER.index(note.outcome))


def differences_of(first: Review, second: Review) -> list[str]:
    """Lists the differences that keep two runs from being shown together."""
    found = [f"the plan ({text})" for text in changes(first.plan, second.plan)]
    if first.definition != second.definition:
        found.append(f"the definition ({first.definition} -> {second.definition})")
    found += [
        f"{name} ({first.provenance.get(name)} -> {second.provenance.get(name)})"
        for name in PROVENANCE
        if first.provenance.get(name) != second.provenance.get(name)
    ]
    return found


def counted(reviews: Sequence[Review]) -> str:
    """Counts the words of the twins and planted effects of several runs; '' for fewer than two."""
    if len(reviews) < 2:
        return ""
    return counted_line([one.twin for one in reviews], [one.planted for one in reviews])


# ---- in words --------------------------------------------------------------------------------


def text(found: Review) -> str:
    """Returns the text that `saelab verdict` prints for one run."""
    plan = found.plan
    explored = "quick, no part of the study" if found.quick else "exploratory"
    kind = explored if found.exploratory else "confirmatory"
    heading = (
        f"{found.run}: {found.title} ({kind})\n{plan.primary} ({found.definition}, "
        f"{plan.direction} is better), plan {found.plan_hash}"
    )
    if not found.sealed:
        heading += "\nits files carry no checksums: an older version made them, or another hand"
    parts = [heading, *(f"deviation from the registered plan: {d}" for d in found.deviations)]
    if found.across:
        parts += ["", across_text(found.across), "", f"in the plan's own base ({OF_PLAN}):"]
    if loud := rivals_sentence(found.rivals):
        parts += ["", loud]
    if found.comparisons:
        parts += ["", _table(found), ""]
        parts += [
            f"{c.arm}: {c.reason}; {texts.sentence(c)}"
            for c, texts in zip(found.comparisons, found.over_texts, strict=True)
        ]
    else:
        parts += ["", f"There is one arm, {BASELINE}, and nothing to compare it with."]
    if found.losses:
        table = align_columns([HEADS, *found.losses.lines()])
        parts += ["", found.losses.line(), "", table]
    checks = [twin_line(found.twin)] if found.twin else []
    checks += [planted_line(found.planted)] if found.planted else []
    parts += ["", *checks] if checks else []
    if found.budget:
        parts += ["", f"{found.budget.line()} (as it was after this run)"]
    if found.cells:
        parts += ["", "gate:", *_cell_lines(found.cells)]
    return visible("\n".join([*parts, "", COVERS]), keep="\n")


def _table(found: Review) -> str:
    heads = ["arm", "metric", "cells", "difference", "over seeds", "over texts", "coverage"]
    lines = [[*heads, "p", "r", "detectable", "seeds to tell", "verdict"]]
    for c, texts in zip(found.comparisons, found.over_texts, strict=True):
        numbers = [
            _signed(c.mean_diff),
            _span(c),
            _span(texts),
            f"{1 - c.level:.2%}",
            stats.format_p(c.p),
        ]
        numbers += [_plain(c.correlation), _plain(c.detectable)]
        needed = str(c.needed_seeds or "-")
        arm = c.arm if c.against == BASELINE else f"{c.arm} - {c.against}"
        lines.append([arm, c.metric, f"{c.n}/{c.n_baseline}", *numbers, needed, c.word])
    for d in found.differences:
        none = ["-", "95.00%", "-", "-", "-", "-"]
        lines.append([d.arm, d.metric, str(d.n), _signed(d.mean_diff), _span(d), *none, ""])
    return align_columns(lines)


def group_notes(cells: Sequence[CellNote]) -> list[tuple[str, str, bool, list[CellNote]]]:
    """Notes by arm, check and whether it was expected; one for each cell, of whose scalars several
    may be found."""
    groups: dict[tuple[str, str, bool], dict[str, CellNote]] = {}
    for note in cells:
        arm = CellId.parse(note.cell).arm
        groups.setdefault((arm, note.check, note.expected), {}).setdefault(note.cell, note)
    return [(*key, list(by_cell.values())) for key, by_cell in groups.items()]


def _cell_lines(cells: Sequence[CellNote]) -> list[str]:
    """One line for each check and arm, with how many cells it is about."""
    return [
        f"- {arm}, {check}{' (expected)' * expected}, {count(len(notes), 'cell')}: "
        f"{notes[0].sentence}"
        for arm, check, expected, notes in group_notes(cells)
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _span(c: Comparison | Difference | OverTexts) -> str:
    return span_text(c.low, c.high)
