"""Evaluating saved SAEs: the data of a base opened once, for any number of subjects.

    rows = [what every evaluation gives] + provenance of the data + which SAE it was

The training activations of the base are not harvested: no evaluation reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab import formats
from saelab.analysis.export import without_context
from saelab.analysis.saebench import result_of
from saelab.data import language_model
from saelab.data.probing.activations import ProbingData
from saelab.errors import MismatchError, SettingError
from saelab.evals import check_names
from saelab.evals.base import Row, Subject
from saelab.evals.core import CoreData
from saelab.evals.measure import EvalData, evaluate
from saelab.formats import Loaded
from saelab.launch.prepare import prepare
from saelab.runs.folder import Member, RunFolder, run_cells
from saelab.runs.schema import CellId
from saelab.study.plan import BaseConfig


class Bench:
    """Held-out data, probing data and the language model of a base.

    Args:
        base: model, texts, hook and evaluation.
        cache: folder of harvested activations.
        seed: of the probing examples.
    """

    def __init__(self, base: BaseConfig, cache: Path, seed: int = 0) -> None:
        prepared = prepare(base, cache, base.model.device, overlap=True)
        prepared.steps.close()
        self.base, self.provenance = base, prepared.provenance
        self.provenance_of = prepared.provenance_of
        model = language_model.load(base.model) if base.activations is None else None
        self.data = EvalData(
            CoreData(prepared.held_out, model, base.evaluation.loss_contexts, base.model.device),
            ProbingData.load(prepared.probing) if prepared.probing else None,
            seed,
            base.evaluation.probing.k_values,
            prepared.why_no_probing,
            base.evaluation.probing.definition,
            prepared.missing_entries,
        )

    @torch.no_grad()
    def rows(self, subject: Subject, evals: Sequence[str]) -> list[Row]:
        """Raises: SettingError for an unknown evaluation; MismatchError for another width."""
        check_names(evals)
        d = self.data.core.source.d
        if subject.d_in != d:
            remedy = f"the activations have {d}: evaluate it where it was trained"
            raise MismatchError(f"the SAE has d_in = {subject.d_in}, {remedy}")
        return evaluate(subject, self.data, evals)


@dataclass(frozen=True)
class Choice:
    """Which SAEs of a path are evaluated, and how.

    Args:
        path: a run folder, or the directory of one SAE.
        format: of the directory; '' finds it.
        arms, seeds: of a run, which of the cells at the plan's L0; all by default.
        allow_mismatch: evaluate an SAE on another model or hook than it was trained on.
        without_trace: take beta = 0 in an adapting threshold.
    """

    path: Path
    format: str = ""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    allow_mismatch: bool = False
    without_trace: bool = False

    def members(self) -> list[Member]:
        """The cells of a run folder; the directory alone, as a cell without name, otherwise."""
        found = run_cells(self.path, self.arms, self.seeds)
        return [Member(self.path, CellId("", -1, 0.0))] if found is None else found


def settings_of(path: Path, config: Path | None) -> tuple[dict[str, Any] | Path, int]:
    """Where the base settings are, and the seed of the probing examples.

    Args:
        path: what is evaluated; a part of a run brings its settings along.
        config: a TOML file, or a run folder whose settings and probing examples are taken.

    Returns: settings as plain data or the TOML file that holds them; the seed.
    Raises: SettingError when there is nothing to take them from.
    """
    if config is not None and config.is_file():
        run = RunFolder.of(path)
        return config, run.probing_seed if run else 0
    run = RunFolder.of(config or path)
    if run is not None:
        return run.required("base")["base"], run.probing_seed
    if config is not None:
        return config, 0
    remedy = f"{path} is no part of a run: name a TOML file (configs/embedded.toml) or a run folder"
    raise SettingError("--config", None, remedy)


def evaluate_choice(
    choice: Choice, base: BaseConfig, cache: Path, evals: Sequence[str], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """All rows of all chosen SAEs, as plain data with their provenance.

    Raises: MismatchError for an SAE of another width, model or hook; what loading raises.
    """
    check_names(evals)
    bench = Bench(base, cache, seed) if base.activations is not None else None
    place = (base.model.path, base.hook_name)
    if bench is not None:
        place = ("", bench.provenance["hook_name"])
    for member in choice.members():
        found = formats.load(member.folder, choice.format)
        if not choice.allow_mismatch:
            found.origin.check(*place)
        bench = bench or Bench(base, cache, seed)  # after the first checks: a harvest takes long
        differences = "; ".join(found.origin.differences(*place))
        subject = without_context(found.sae) if choice.without_trace else found.sae
        subject = subject.to(torch.device(base.model.device))
        for row in bench.rows(subject, evals):
            own = row.of_cell(member.id).as_dict()
            about = {**_about(member, found, choice), "mismatch": differences}
            yield own | about | bench.provenance_of(row.definition)


def saebench_file(
    choice: Choice, base: BaseConfig, rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """SAEBench's result file of one SAE, from its rows and those of the model's channels."""
    (member,) = choice.members()
    found = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in rows]
    return result_of(
        found, formats.load(member.folder, choice.format).sae, base, choice.path.name, seed
    )


def _about(member: Member, found: Loaded, choice: Choice) -> dict[str, Any]:
    """Columns that say which SAE it was."""
    kind = formats.find(member.folder, choice.format)
    mark = choice.without_trace and found.sae.needs_contexts
    return {"subject": str(member.folder), "format": kind, "without_trace": mark}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for a terminal: of every arm the mean over its seeds of each value over all data, or
    the reason why it is missing."""
    lines: list[str] = []
    arms = dict.fromkeys(str(row["arm"]) for row in rows)
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm and not row["slice"]]
        if arm:
            seeds = len({row["seed"] for row in own})
            lines.append(f"{arm} ({seeds} seed{'s' * (seeds > 1)})")
        for metric in dict.fromkeys(row["metric"] for row in own):
            rows_of = [row for row in own if row["metric"] == metric]
            present = [row["value"] for row in rows_of if row["value"] is not None]
            mean = f"{sum(present) / len(present):.4f}" if present else ""
            lines.append(f"{metric:32s} {mean or 'missing: ' + rows_of[0]['reason']}")
    return lines
