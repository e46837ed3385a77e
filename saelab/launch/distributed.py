"""One SAE on the processes that torchrun has started: what each of them does.

    prepare (the first rank; then all read) -> train, with checkpoints -> save -> core metrics

    <cache>/resume/<key>/          checkpoints; the same command goes on, on any number of ranks

    <out_dir>/sae.safetensors, sae.json    as one process writes them
              curves.parquet               every logged value over training, thinned
              metrics.json                 rows of the core evaluation; written last

Seed, data and settings are those of `saelab train` in one process, which trains the same SAE but
for rounding.
"""

from __future__ import annotations

from pathlib import Path

import torch

from saelab import checkpoint
from saelab.data import language_model
from saelab.distributed.ranks import (
    Ranks,
    check_split,
    join_ranks,
    process_count,
    started_by_torchrun,
)
from saelab.errors import SettingError
from saelab.evals.base import Row
from saelab.evals.core import CoreData, evaluate_core
from saelab.launch.cell_key import check_ranks, machine
from saelab.launch.prepare import LaunchData, prepare
from saelab.runs.schema import CellId
from saelab.runtime.counting import count
from saelab.seeding import study_seeds
from saelab.storage.atomic import digest, write_json
from saelab.storage.cache import cache_folder
from saelab.storage.links import refuse_links
from saelab.study.foreign_code import foreign_code
from saelab.study.plan import BASELINE, BaseConfig, ParallelConfig
from saelab.training.cell import TrainingCell
from saelab.training.curves import write_curves
from saelab.training.resume import remove_checkpoints
from saelab.training.train import train_one


def wants_ranks(base: BaseConfig) -> bool:
    """Returns True if the settings ask for several ranks, or torchrun has started the process.

    Also one process of torchrun writes the files, and goes on from the checkpoints, of any number.
    """
    alone = base.parallel in (ParallelConfig(), ParallelConfig(data=1))
    return started_by_torchrun() or not alone


def train_over_ranks(base: BaseConfig, out_dir: Path, root: Path, study: str) -> list[Row]:
    """Trains and evaluates one SAE; every process of the job calls it.

    Args:
        study: its name decides the seed.

    Returns: the rows of the core evaluation, on every rank.
    Raises: UsageError for bad input, CellFailure when the loss is not finite; on every rank.
    """
    refuse_links(out_dir)
    if (out_dir / "metrics.json").exists():
        remedy = "is complete: name another folder, or delete it first"
        raise SettingError("out_dir", str(out_dir), remedy)
    _check_parts(base)
    split = check_split(base.parallel.data, base.parallel.latents), base.parallel.latents
    seed = study_seeds(study, "explore", 1)[0]
    with join_ranks(*split, base.model.device) as ranks:
        check_ranks(ranks, str(ranks.device))
        cache = cache_folder(root)
        prepared = _prepared(base, cache, ranks)
        kept = cache / "resume" / _key(base, prepared, seed)
        cell, name = _train(base, prepared, seed, ranks, kept), CellId(BASELINE, seed, 0.0)
        checkpoint.save(cell.sae, out_dir, prepared.provenance | name.as_dict())
        rows = [row.of_cell(name) for row in _evaluated(base, prepared, cell)]
        ranks.on_first(lambda: _write(out_dir, cell, rows))
        ranks.on_first(lambda: remove_checkpoints(kept))
    return rows


def _check_parts(base: BaseConfig) -> None:
    """Raises: SettingError for a part that does not work on several ranks."""
    latents = base.parallel.latents
    if latents > base.sae.d_sae:
        remedy = f"there are only {count(base.sae.d_sae, 'latent')}: use fewer ranks"
        raise SettingError("parallel.latents", latents, remedy)
    data = base.parallel.data or max(1, process_count() // latents)
    base.sae.outline(ranks=Ranks(data, latents))


def _prepared(base: BaseConfig, cache: Path, ranks: Ranks) -> LaunchData:
    """Harvested by the first rank, opened by all; without what probing would need."""
    device = str(ranks.device)
    without = {"evaluation.probing.entries": "none", "evaluation.probing.tables": ()}
    base = base.patched({**without, "evaluation.extra": ()})

    def harvest() -> None:
        prepare(base, cache, device)

    ranks.on_first(harvest)
    return prepare(base, cache, device)


def _key(base: BaseConfig, prepared: LaunchData, seed: int) -> str:
    """Key of the checkpoints: all that their numbers depend on; the split is not part of it."""
    settings = [part.model_dump(mode="json") for part in (base.sae, base.train)]
    code = [machine(base.model.device), *foreign_code(base.sae)]
    place = [base.layout, prepared.train.digest, prepared.calibration_digest, "over ranks"]
    return digest([*settings, seed, *place, *code])


def _train(
    base: BaseConfig, prepared: LaunchData, seed: int, ranks: Ranks, folder: Path
) -> TrainingCell:
    """The cell, trained from its last checkpoint on."""
    return train_one(
        prepared.train,
        base.sae,
        base.train,
        seed,
        layout=base.layout,
        ranks=ranks,
        calibration=prepared.calibration,
        checkpoints=folder,
    )


@torch.no_grad()
def _evaluated(base: BaseConfig, prepared: LaunchData, cell: TrainingCell) -> list[Row]:
    """Each rank runs the language model; reconstructions are put together from all latents."""
    device = str(cell.sae.ranks.device)
    model = None
    if base.activations is None:
        model = language_model.load(base.model.patched({"device": device}))
    core = CoreData(prepared.held_out, model, base.evaluation.loss_contexts, device)
    return evaluate_core(cell.sae, core)


def _write(out_dir: Path, cell: TrainingCell, rows: list[Row]) -> None:
    write_curves(out_dir / "curves.parquet", cell)
    write_json(out_dir / "metrics.json", [row.as_dict() for row in rows])
