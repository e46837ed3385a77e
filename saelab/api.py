"""saelab from Python: train one SAE, evaluate it, compare arms. Re-exported by `saelab`.

base = saelab.settings("configs/embedded.toml")
sae = saelab.train(base, seed=0)
print(saelab.evaluate(sae, base)["explained_variance"])
for c in saelab.compare(base, {"A1": {"sae.scaling": {"kind": "variance"}}}, seeds=3):
    print(c.arm, c.word, c.mean_diff, c.low, c.high)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from saelab.config import read_toml
from saelab.data import models
from saelab.data.saebench import Definition
from saelab.data.stream import batches
from saelab.data.tasks import SAMPLING_SEED
from saelab.errors import CellFailure, MismatchError
from saelab.evals import EvalData, check_names
from saelab.evals import evaluate as measure
from saelab.evals.base import Row, Subject
from saelab.evals.core import CoreData
from saelab.evals.probing import ProbingData
from saelab.evals.saebench import as_result
from saelab.evals.saebench_probing import DEFINITION as as_definition_1
from saelab.progress import progress
from saelab.rundir import cache_folder
from saelab.sae import SAE
from saelab.study.cells import initial_sample
from saelab.study.engine import Launch, launch
from saelab.study.plan import BASELINE, Arm, BaseConfig, PlanConfig, Run
from saelab.study.prepare import prepare
from saelab.study.recorded import about
from saelab.study.verdict import Comparison
from saelab.training import loop


class Scores(dict[str, float]):
    """Metric -> value over all data; `rows` holds every row, slices and missing values included."""

    rows: list[Row]


def settings(path: str | Path, changes: Mapping[str, Any] | None = None) -> BaseConfig:
    """Base settings from a TOML file, with dotted settings changed.

    Raises: SourceError for a missing file; SettingError for an unknown or impossible setting.
    """
    path = Path(path)
    return BaseConfig.parse(read_toml(path), where=path.name).patched(dict(changes or {}))


def train(base: BaseConfig, seed: int = 0, cache: str | Path = ".") -> SAE:
    """Trains one SAE on the activations that `base` describes.

    Args:
        base: model, texts, hook, SAE and training.
        seed: of initialisation, data order and resampling.
        cache: harvested activations are kept in `<cache>/.saelab`.

    Returns: the SAE in evaluation mode.
    Raises: CellFailure when the loss is not finite; UsageError for bad input.
    """
    prepared = prepare(base, cache_folder(Path(cache)), base.model.device)
    sample = initial_sample(prepared.train).to(base.model.device)
    cell = loop.Cell(f"seed {seed}", base.sae, base.train, sample, seed)
    stream = batches(prepared.train, seed, base.train.batch_size, base.layout)
    with progress("training", base.train.steps, "steps") as bar:
        failures = loop.train([cell], stream, lambda steps, _: bar.advance(steps))
    for failure in failures.values():
        raise CellFailure(failure.cell, failure.step, failure.reason)
    return cell.sae


@torch.no_grad()
def evaluate(
    subject: Subject,
    base: BaseConfig,
    evals: Sequence[str] = ("core", "probing"),
    seed: int = 0,
    cache: str | Path = ".",
    definition: Definition | None = None,
) -> Scores:
    """Evaluates anything with encode and decode on the held-out text of `base`.

    Args:
        subject: an SAE, or any object with d_in, d_sae, encode and decode in raw activation space.
        evals: of 'core', 'probing', 'model_channels' (probing of the model itself) and 'truth'.
        seed: of the probing examples.
        definition: of sparse probing, 2 or 1 (SAEBench's); None for that of `base`.

    Raises: SettingError for an unknown evaluation; MismatchError for activations of another width.
    """
    check_names(evals)
    if definition is not None:
        base = base.patched({"evaluation.probing.definition": definition})
    prepared = prepare(base, cache_folder(Path(cache)), base.model.device)
    if subject.d_in != prepared.held_out.d:
        remedy = f"the activations have {prepared.held_out.d}: evaluate it where it was trained"
        raise MismatchError(f"the SAE has d_in = {subject.d_in}, {remedy}")
    model = models.load(base.model) if base.activations is None else None
    data = EvalData(
        CoreData(prepared.held_out, model, base.evaluation.loss_contexts, base.model.device),
        ProbingData.load(prepared.probing) if prepared.probing else None,
        seed,
        base.evaluation.probing.k_values,
        prepared.why_no_probing,
        base.evaluation.probing.definition,
        prepared.missing_entries,
    )
    rows = measure(subject, data, evals)
    scores = Scores({r.metric: r.value for r in rows if not r.slice and r.value is not None})
    scores.rows = rows
    return scores


def saebench_result(
    scores: Scores, subject: Subject, base: BaseConfig, name: str = "custom_sae", seed: int = 0
) -> dict[str, Any]:
    """SAEBench's result file of an evaluation, as plain data.

    Args:
        scores: of `evaluate` with 'probing' and 'model_channels'.
        subject, base: as given to it.
        name: what the SAE is called.
        seed: of the probing examples; definition 1 has SAEBench's own.

    Raises: SourceError when the scores lack what the schema asks for.
    """
    sae: dict[str, Any] = {"d_in": subject.d_in, "d_sae": subject.d_sae}
    if isinstance(subject, SAE):
        sae["architecture"] = subject.config.activation.kind
        sae["saelab"] = subject.config.model_dump(mode="json")
    definitions = {row.definition for row in scores.rows}
    told = about(base, sae, name, SAMPLING_SEED if as_definition_1 in definitions else seed)
    return as_result(scores.rows, told)


def compare(
    base: BaseConfig,
    arms: Mapping[str, Mapping[str, Any]],
    seeds: int = 8,
    out_dir: str | Path | None = None,
    study: str = "compare",
    workers: int = 0,
    **plan: Any,
) -> list[Comparison]:
    """Trains arms beside the baseline, paired by seed, and gives the verdict on each.

    Args:
        base: settings of the baseline.
        arms: name -> dotted settings that the arm changes.
        seeds: per arm; fewer than 6 can't reach p < 0.05 by the exact test.
        out_dir: folder for the run's files; None keeps none of them.
        study: its name decides the seeds.
        workers: processes; 0 works in this one.
        plan: further settings of the plan, such as primary, sesoi or target_l0.

    Returns: one `Comparison` per arm.
    """
    table = [Arm(BASELINE), *(Arm(name, changes) for name, changes in arms.items())]
    options = {"seeds": seeds, "seeds_other": seeds, "seeds_levels": 0, "levels": ()} | plan
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out_dir) if out_dir else Path(temporary) / "compare"
        return launch(
            Launch(
                name=folder.name,
                run=Run(f"Compare {', '.join(arms)}", table),
                plan=PlanConfig.parse({"study": study, **options}),
                base=base,
                out_dir=folder,
                root=Path(),
                workers=workers,
            )
        )
