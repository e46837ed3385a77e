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

import ast
import functools
import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab import checkpoint, stats
from saelab.config import digest
from saelab.data import language_model
from saelab.data.activations.store import Source
from saelab.data.activations.stream import Layout, batches
from saelab.data.language_model import ModelConfig
from saelab.data.probing.saebench import Definition
from saelab.errors import SettingError, SourceError
from saelab.evals import EvalData, evaluate
from saelab.evals.base import NOT_FINITE, Row, Subject, needs_contexts
from saelab.evals.convergence import FEWEST, convergence
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
from saelab.evals.probing import ProbingData
from saelab.evals.training_stability import LARGE, spikes, stability
from saelab.kernels import kernels_name
from saelab.launch.cell_store import finish
from saelab.launch.executors import Advance
from saelab.launch.latent_table import FILE, write_latents
from saelab.launch.prepare import open_source
from saelab.launch.progress_lines import Reports
from saelab.launch.seed_pairs import compare
from saelab.parts.base import Dims
from saelab.parts.losses.similarity import LEARNED, Similarity
from saelab.sae import SAE, SAEConfig
from saelab.storage.atomic import write_atomically
from saelab.storage.cache import package_digest, share, shared_twin
from saelab.storage.remote import Place
from saelab.study.plan import CellSpec
from saelab.training.loop import Cell, Log
from saelab.training.module_cell import ModuleCell
from saelab.training.optim import TrainConfig
from saelab.training.resume import Kept, remove_checkpoints, restored, train_kept
from saelab.verdict.gate import REACH

#: Cells of one seed that share a pass over the stream in one job.
GROUP = 3
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
#: What the gate compares with the random controls.
PROBED = "sae_top_5_test_accuracy"
#: Metrics that the gate looks at under their own names.
MEASURED = ("l0", "explained_variance", "loss_recovered", "dead_share")
#: Held-out rows on which a code is asked whether it is constant, and contexts that the activations
#: are described by. Our choice.
CODE_ROWS, INPUT_CONTEXTS = 512, 512
#: Points kept of each curve.
CURVE_POINTS = 200
#: Rows of the first shard that initialise every cell of a launch.
SAMPLE_ROWS = 65_536


@dataclass(frozen=True)
class Data:
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
    data: Data
    cache: Path
    experiment: Path | None
    run: str


@dataclass(frozen=True)
class Key:
    """What a cell's content hash is made of, but for the training activations.

    Their digest is known once they are complete, so a worker may train first and hash then.

    Args:
        settings: of the SAE and its training, seed and level.
        data: what else the cell's numbers depend on.
        code: that computes them.
        control: name of a control subject, '' for a cell.
    """

    settings: list[Any]
    data: dict[str, Any]
    code: list[str]
    control: str = ""

    def hash(self, train: str) -> str:
        """The content hash, with the digest of the training activations."""
        own = digest([*self.settings, self.data | {"train": train}, self.code])
        return digest([self.control, own]) if self.control else own


def cell_key(spec: CellSpec, data: dict[str, Any]) -> Key:
    """The key of a cell: settings, seed, data, and the code that computes it."""
    code = [package_digest(), torch.__version__, kernels_name(), *_foreign_code(spec)]
    sae, training = spec.sae.model_dump(mode="json"), spec.train.model_dump(mode="json")
    return Key([sae, training, spec.seed, spec.level], data, code)


def _foreign_code(spec: CellSpec) -> list[str]:
    """Code outside the package that the cell runs: the files that define its parts and module."""
    owners: list[Any] = [spec.module] if spec.module else []
    config = spec.sae
    groups = (config.losses, config.controllers, config.constraints, config.observers)
    parts = [config.activation, config.scaling, *(part for group in groups for part in group)]
    for part in parts:
        if part is not None and not type(part).__module__.startswith("saelab."):
            owners += [type(part), type(part.build(Dims(2, config.d_sae)))]
    files = {_file_of(owner) for owner in owners}
    return [_code(file, spec.arm if spec.module else None) for file in sorted(files)]


def _file_of(owner: Any) -> Path:
    """The file that defines a class, a function or what a callable is made of.

    Raises: SettingError when there is none, as for code typed into an interpreter.
    """
    while isinstance(owner, functools.partial):
        owner = owner.func
    owner = owner if isinstance(owner, (type, FunctionType)) else type(owner)
    try:
        return Path(inspect.getfile(owner)).resolve(strict=True)
    except (TypeError, OSError):
        remedy = "its source can't be read, so its cells can't be told from older ones: keep it "
        raise SettingError("code", owner.__qualname__, f"{remedy}in a file") from None


def _code(file: Path, arm: str | None) -> str:
    """A file's code without comments and without its run table; of that, the entry of `arm`."""
    kept: list[ast.AST] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not _of_table(node):
            kept.append(node)
        elif arm is not None:
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            kept += [call for call in calls if _names(call, arm)] or [node]
    return "\n".join(map(ast.unparse, kept))


def _of_table(node: ast.stmt) -> bool:
    """Whether a statement fills RUNS, or is the file's `if __name__ == "__main__"`."""
    places = [getattr(node, name, None) for name in ("target", "test")]
    places += getattr(node, "targets", [])
    inside = [part for place in places if place is not None for part in ast.walk(place)]
    return any(isinstance(part, ast.Name) and part.id in ("RUNS", "__name__") for part in inside)


def _names(call: ast.Call, arm: str) -> bool:
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(value, ast.Constant) and value.value == arm for value in values)


def cell_folder(cache: Path, key: Key, train: str) -> Path:
    """A cell's place in the cache, with the digest of the training activations."""
    return cache / "cells" / key.hash(train)


def resume_folder(cache: Path, key: Key, train: Source, foreign: bool) -> Path:
    """Where a cell's checkpoints lie while it is trained; known before its training activations are
    complete, by all that decides them."""
    return cache / "resume" / key.hash(train.digest if foreign else digest(train.header))


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


def load_experiment(path: Path) -> ModuleType:
    """Imports experiment.py from its file (which registers its own parts).

    Raises: SourceError when the file is missing or defines no RUNS.
    """
    name = "saelab_experiment"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path):
        return sys.modules[name]
    if not path.is_file():
        raise SourceError(f"{path} does not exist: run in the folder that holds experiment.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "RUNS"):
        raise SourceError(f"{path} defines no RUNS: keep the run table under that name")
    return module


# ---- in a worker -----------------------------------------------------------------------------


class Worker:
    """What a process keeps between jobs: the opened data and the language model."""

    def __init__(self, data: Data) -> None:
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
        return restored(lambda: self._build(job, plain), folder, shared_twin(job.cache, folder))

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
            "centred": float(centred(cell)),
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


def initial_sample(source: Source) -> torch.Tensor:
    """Raw rows [n, d_in] of the first shard: they initialise every cell of a launch.

    One that is not finite is left out: the cell that meets it in training stops there.
    """
    rows = source.shard(0).rows()[0][:SAMPLE_ROWS].float()
    return rows[rows.isfinite().all(1)]


@torch.no_grad()
def code_std(subject: Any, data: CoreData) -> float:
    """The largest standard deviation of a latent over some held-out rows; 0 is a constant code."""
    if needs_contexts(subject):
        x, _, starts = data.apart
        starts = starts[: 1 + max(1, int((starts <= CODE_ROWS).sum()) - 1)]
        code = subject.encode(x[: int(starts[-1])].to(data.device), starts.to(data.device))
    else:
        code = subject.encode(data.rows[0][:CODE_ROWS].to(data.device))
    return float(code.float().std(0, correction=0).max())


def centred(cell: Cell) -> bool:
    """Whether the cell's SAE takes a mean off its input; a user's own module is not asked."""
    sae = cell.sae
    return isinstance(sae, SAE) and (sae.config.centre or sae.scaling is not None)


def not_finite(rows: Iterable[Row]) -> str | None:
    """Names of the whole-text metrics that the gate looks at and that came out not finite."""
    judged = ("fvu", *MEASURED, PROBED)
    bad = [r.metric for r in rows if not r.slice and r.reason.startswith(NOT_FINITE)]
    return ", ".join(name for name in judged if name in bad) or None


def input_facts(source: Source) -> dict[str, float | None]:
    """What the gate asks of the activations: norm(mean) / norm(std) of the rows that count, and the
    share of variance at the first position of each context where it counts too."""
    shard = source.shard(0)
    x, mask = shard.x[:INPUT_CONTEXTS].float(), shard.mask[:INPUT_CONTEXTS]
    rows = x[mask]
    off = (x - rows.mean(0)).square().sum(2) * mask
    several = x.shape[1] > 1
    return {
        "mean_over_std": float(rows.mean(0).norm() / rows.std(0).norm()),
        "bos_masked": float(not mask[:, 0].any()),
        "bos_variance_share": float(off[:, 0].sum() / off.sum()) if several else None,
    }


def _weights_facts(sae: Any, largest: Tensor | None) -> dict[str, float]:
    """Of an SAE; `largest` as `largest_cosines` gives them, None for a module, whose weights may
    have any names and shapes."""
    if largest is None:
        return {}
    zero = not bool(sae.W_enc.any()) or not bool(sae.W_dec.any())
    twins = int((largest > 0.95).sum())
    return {"weights_zero": float(zero), "near_duplicate_share": twins / len(largest)}


def _curve_facts(log: Log) -> dict[str, float | None]:
    """Large spikes of the loss and its improvement over the last tenth of the run."""
    loss = log.loss
    if len(loss) < FEWEST:
        return {}
    tenth = max(1, len(loss) // 10)
    before, last = loss[-2 * tenth : -tenth].mean(), loss[-tenth:].mean()
    large = float(spikes(loss, LARGE))
    return {"last_tenth_improvement": float(1 - last / before), "spikes": large}


def _balance_facts(cell: Cell) -> dict[str, float]:
    """Of a similarity penalty: its mean share of the gradient while it acts, and whether a learned
    alpha collapsed or hardly moved."""
    if not isinstance(cell.sae, SAE) or not cell.log.length:
        return {}
    facts: dict[str, float] = {}
    columns = {name: values[: cell.log.length] for name, values in cell.log.columns.items()}
    for term in cell.sae.loss_terms().values():
        if not isinstance(term, Similarity):
            continue
        share, alpha = columns["penalty_share"], columns["alpha"]
        if (share > 0).any():
            facts["penalty_share"] = float(share[share > 0].mean())
        if term.config.balance in LEARNED:
            facts["alpha_outside_share"] = stats.outside_share(alpha)
        learned = list(term.balance.parameters())
        if learned:
            reach = sum(own.numel() * cell.optimiser.travel(own) for own in learned)
            facts["scalar_reach.alpha"] = stats.moved_share(alpha, reach)
    return facts


def _logged(log: Log) -> list[tuple[str, np.ndarray]]:
    return [(name, column) for name, column in log.columns.items() if log.length]


def _finite(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def write_curves(path: Path, cell: Cell) -> None:
    """The log as a long table: step, tokens, name, value; each point the mean of its bin."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n = cell.log.length
    edges = np.unique(np.linspace(0, n, min(n, CURVE_POINTS) + 1).astype(int))
    columns: dict[str, list[Any]] = {"step": [], "tokens": [], "name": [], "value": []}
    for name, values in _logged(cell.log):
        for low, high in itertools.pairwise(edges):
            some = values[low:high]
            some = some[np.isfinite(some)]
            if some.size:
                columns["step"].append(int(high))
                columns["tokens"].append(int(high) * cell.config.batch_size)
                columns["name"].append(name)
                columns["value"].append(float(some.mean()))
    kinds = (pa.int64(), pa.int64(), pa.string(), pa.float64())
    table = pa.table(columns, schema=pa.schema(list(zip(columns, kinds, strict=True))))
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def curve(path: Path, name: str) -> list[float]:
    """The points of one value in a file of `write_curves`."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, filters=[("name", "==", name)]).sort_by("step")
    return table.column("value").to_pylist()
