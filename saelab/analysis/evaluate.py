"""Evaluates saved SAEs: the data of a base is opened once, for any number of SAEs.

    rows = [what every evaluation gives] + provenance of the data + which SAE it was

The training activations of the base are not harvested, since no evaluation reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saelab import formats
from saelab.analysis.export import without_context
from saelab.analysis.leave_one_out import LeaveOneOut
from saelab.analysis.saebench import result_of
from saelab.data import language_model
from saelab.data.activations.joined import widths
from saelab.data.probing.activations import ProbingData
from saelab.errors import MismatchError, SettingError
from saelab.evals import check_names
from saelab.evals.base import Row, Subject
from saelab.evals.core import CoreData
from saelab.evals.measure import EvalData, evaluate
from saelab.formats import Loaded
from saelab.launch.prepare import prepare, sae_probes_data
from saelab.runs.folder import METRICS, Member, RunFolder, run_cells
from saelab.runs.random_code import NO_RANDOM_CODE, complete_losses, random_code
from saelab.runs.schema import CellId
from saelab.runtime.torch_defaults import one_thread
from saelab.sae import SAE
from saelab.storage.atomic import write_json
from saelab.storage.parquet import write_rows
from saelab.study.plan import BaseConfig, base_of_run, read_base

#: Evaluations that SAEBench's result file is made from.
FOR_SAEBENCH = ("probing", "model_channels")
#: Evaluations that need the data sets of sae-probes.
SAE_PROBES = ("sae_probes", "sae_probes_channels")


class Bench:
    """Held-out data, probing data and the language model of a base.

    Args:
        base: model, texts, hook and evaluation.
        cache: folder of harvested activations.
        seed: of the probing examples.
    """

    def __init__(self, base: BaseConfig, cache: Path, seed: int = 0) -> None:
        prepared = prepare(base, cache, base.model.device, overlap=True, to_train=False)
        prepared.steps.close()
        self.base, self.cache, self.prepared = base, cache, prepared
        self.provenance = prepared.provenance
        self.provenance_of = prepared.provenance_of
        model = language_model.load(base.model) if base.activations is None else None
        self.data = EvalData(
            CoreData(prepared.held_out, model, base.evaluation.loss_contexts, base.model.device),
            ProbingData.load(prepared.probing) if prepared.probing else None,
            seed=seed,
            k_values=base.evaluation.probing.k_values,
            why_no_probing=prepared.why_no_probing,
            definition=base.evaluation.probing.definition,
            missing_entries=prepared.missing_entries,
            sae_probes=prepared.sae_probes,
        )

    @torch.no_grad()
    @one_thread()
    def rows(
        self,
        subject: Subject,
        evals: Sequence[str],
        random: Mapping[str, float | None] | str = NO_RANDOM_CODE,
    ) -> list[Row]:
        """Evaluates a subject.

        Args:
            subject: an SAE, or any object with encode and decode.
            evals: names of evaluations.
            random: losses of a random code on the same contexts, or why there are none.

        Raises: SettingError for an unknown evaluation; MismatchError for another width.
        """
        check_names(evals)
        if self.data.sae_probes is None and any(name in SAE_PROBES for name in evals):
            self._add_sae_probes()
        d = self.data.core.source.d
        if subject.d_in != d:
            remedy = f"the activations have {d}: evaluate it where it was trained"
            raise MismatchError(f"the SAE has d_in = {subject.d_in}, {remedy}")
        if isinstance(subject, SAE):
            _check_target(subject, widths(self.data.core.source)[1])
        rows = [row.as_dict() for row in evaluate(subject, self.data, evals)]
        return [Row(**row) for row in complete_losses(rows, random)]

    def _add_sae_probes(self) -> None:
        """Opens the data sets of sae-probes, which only an evaluation that names them needs."""
        model = self.data.core.model
        if model is not None:
            self.data.sae_probes = sae_probes_data(self.base, model, self.cache)
            self.prepared.of_sae_probes = self.data.sae_probes.provenance()


def _check_target(sae: SAE, targets: tuple[int, ...]) -> None:
    """Raises: MismatchError where a target of these widths is not what the SAE reconstructs."""
    if sae.dims.targets != targets:
        reads, needs = (
            f"a target of {' + '.join(map(str, each))} channels" if each else "its input as target"
            for each in (sae.dims.targets, targets)
        )
        remedy = "set hook_name and target_hook to those that it was trained with"
        raise MismatchError(f"the SAE has {reads}, the settings {needs}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The SAEs of a path that are evaluated, and how they are read.

    Args:
        path: a run folder, the directory of one SAE, or the name of one on the hub.
        format: of the directory; '' recognises it.
        arms, seeds: of a run, which of the cells at the plan's L0; all by default.
        allow_mismatch: evaluate an SAE on another model or hook than it was trained on.
        without_trace: set beta = 0 in a threshold that follows the context.
        leave_one_out: threshold of `LeaveOneOut`, which refines the codes; None leaves them.
    """

    path: Path
    format: str = ""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    allow_mismatch: bool = False
    without_trace: bool = False
    leave_one_out: float | None = None

    @cached_property
    def members(self) -> list[Member]:
        """The cells of a run folder; the directory alone, as a cell without name, otherwise."""
        cells = run_cells(self.path, self.arms, self.seeds)
        if cells is not None:
            return cells
        return [Member(formats.pinned(self.path, self.format), CellId("", -1, 0.0))]


def evaluate_to_files(
    choice: Choice,
    config: Path | None,
    evals: Sequence[str],
    changes: Mapping[str, Any],
    cache: Path,
    *,
    out: Path | None = None,
    saebench_json: Path | None = None,
) -> list[dict[str, Any]]:
    """Evaluates the chosen SAEs and writes their rows where asked, see `saelab eval`.

    Args:
        config: base settings, see `settings_of`.
        evals: names of evaluations; those of SAEBench's file are added if it is written.
        changes: dotted settings of the base and their values.
        cache: folder of harvested activations.
        out: file for the rows, .parquet or .json.
        saebench_json: file for SAEBench's result of the one SAE that is chosen.

    Returns: the rows of `evaluate_choice`.
    Raises: SettingError for an `out` of another kind, an unknown evaluation, or a result file of
        several SAEs; what `settings_of` and `evaluate_choice` raise.
    """
    if out is not None and out.suffix not in (".json", ".parquet"):
        raise SettingError("--out", str(out), "name a file that ends in .parquet or .json")
    if saebench_json is not None:
        if choice.leave_one_out is not None:
            remedy = "has no place in SAEBench's file: leave out --saebench-json"
            raise SettingError("--leave-one-out", choice.leave_one_out, remedy)
        if len(choice.members) > 1:
            remedy = "is of one SAE: choose it by --arm and --seed"
            raise SettingError("--saebench-json", str(saebench_json), remedy)
        evals = [*evals, *(name for name in FOR_SAEBENCH if name not in evals)]
    base, seed = settings_of(choice.path, config)
    base = base.patched(dict(changes))
    rows = list(evaluate_choice(choice, base, cache, evals, seed))
    if saebench_json is not None:
        write_json(saebench_json, saebench_file(choice, base, rows, seed))
    if out is not None:
        (write_json if out.suffix == ".json" else write_rows)(out, rows)
    return rows


def settings_of(path: Path, config: Path | None) -> tuple[BaseConfig, int]:
    """Finds the base settings to evaluate on, and the seed of the probing examples.

    Args:
        path: what is evaluated; a run, or a cell of one, has settings of its own.
        config: a TOML file, or a run folder whose settings and probing examples are taken.

    Raises: SettingError when there are no settings.
    """
    is_file = config is not None and config.is_file()
    run = RunFolder.of(path if config is None or is_file else config)
    seed = run.probing_seed if run is not None else 0
    if run is not None and not is_file:
        return base_of_run(run), seed
    if config is not None:
        return read_base(config), seed
    remedy = (
        f"{path} is not part of a run: name a TOML file (configs/embedded.toml) or a run folder"
    )
    raise SettingError("--config", None, remedy)


def place_of(base: BaseConfig, provenance: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """Returns the model and the hook point of the activations of a base; '' for the model of those
    that were made elsewhere.

    Args:
        provenance: of the activations, where they are open: a header names the hook point of those
            that were made elsewhere.
    """
    hook = base.hook_text if provenance is None else str(provenance["hook_name"] or "")
    return "" if base.activations is not None else base.model.path, hook


def evaluate_choice(
    choice: Choice, base: BaseConfig, cache: Path, evals: Sequence[str], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Evaluates the chosen SAEs; yields their rows as plain data with provenance.

    Raises: MismatchError for an SAE of another width, model or hook; what loading raises.
    """
    check_names(evals)
    run = RunFolder.of(choice.path)
    random = NO_RANDOM_CODE if run is None else random_code(run.with_files(METRICS).metrics)
    bench = Bench(base, cache, seed) if base.activations is not None else None
    place = place_of(base, bench and bench.provenance)
    for member in choice.members:
        loaded = formats.load(member.folder, choice.format)
        if not choice.allow_mismatch:
            loaded.origin.check(*place)
        mismatch = "; ".join(loaded.origin.differences(*place))
        subject = without_context(loaded.sae) if choice.without_trace else loaded.sae
        subject = subject.to(torch.device(base.model.device))
        if choice.leave_one_out is not None:
            subject = LeaveOneOut(subject, choice.leave_one_out)
        bench = bench or Bench(base, cache, seed)  # after the first checks: a harvest takes long
        columns = {**_identity(member, loaded, choice), "mismatch": mismatch}
        for row in bench.rows(subject, evals, random):
            values = row.of_cell(member.id).as_dict()
            yield values | columns | bench.provenance_of(row.definition)


def saebench_file(
    choice: Choice, base: BaseConfig, rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """Builds SAEBench's result of one SAE from its rows and those of the model's channels."""
    (member,) = choice.members
    sae = formats.load(member.folder, choice.format).sae
    plain = [Row(**{name: row[name] for name in Row.__dataclass_fields__}) for row in rows]
    return result_of(plain, sae, base, choice.path.name, seed)


def _identity(member: Member, loaded: Loaded, choice: Choice) -> dict[str, Any]:
    """Columns that say which SAE it was."""
    changed = choice.without_trace and loaded.sae.needs_contexts
    columns = {"subject": str(member.folder), "format": loaded.format, "without_trace": changed}
    return columns | {"leave_one_out": choice.leave_one_out}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for a terminal: for each arm the mean over its seeds of each value over all data, or
    the reason why it is missing."""
    lines: list[str] = []
    arms = dict.fromkeys(str(row["arm"]) for row in rows)
    for arm in arms:
        of_arm = [row for row in rows if row["arm"] == arm and not row["slice"]]
        if arm:
            seeds = len({row["seed"] for row in of_arm})
            lines.append(f"{arm} ({seeds} seed{'s' * (seeds > 1)})")
        for metric in dict.fromkeys(row["metric"] for row in of_arm):
            of_metric = [row for row in of_arm if row["metric"] == metric]
            present = [row["value"] for row in of_metric if row["value"] is not None]
            mean = f"{sum(present) / len(present):.4f}" if present else ""
            lines.append(f"{metric:32s} {mean or 'missing: ' + of_metric[0]['reason']}")
    return lines
