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

import sys
from pathlib import Path
from typing import Any

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
from saelab.launch.prepare import LaunchData, prepare, spliced_model
from saelab.runs.random_code import complete_losses
from saelab.runs.schema import CellId
from saelab.runtime.counting import count
from saelab.runtime.safe_text import visible
from saelab.sae import SAE
from saelab.seeding import study_seeds
from saelab.storage.atomic import digest, write_json
from saelab.storage.cache import cache_folder
from saelab.storage.links import refuse_links
from saelab.study.foreign_code import foreign_code
from saelab.study.plan import BASELINE, BaseConfig, ParallelConfig
from saelab.training.cell import TrainingCell
from saelab.training.curves import write_curves
from saelab.training.fine_tuning import digest_of
from saelab.training.resume import remove_checkpoints
from saelab.training.train import Surroundings, train_one


def wants_ranks(base: BaseConfig) -> bool:
    """Returns True if the settings ask for several ranks, or torchrun has started the process.

    Also one process of torchrun writes the files, and goes on from the checkpoints, of any number.
    """
    alone = base.parallel in (ParallelConfig(), ParallelConfig(data=1))
    return started_by_torchrun() or not alone


def train_over_ranks(
    base: BaseConfig, out_dir: Path, root: Path, study: str, start: SAE | None = None
) -> list[Row]:
    """Trains and evaluates one SAE; every process of the job calls it.

    Args:
        study: its name decides the seed.
        start: an SAE that training starts from, on one process.

    Returns: the rows of the core evaluation, on every rank.
    Raises: UsageError for bad input, CellFailure when the loss is not finite; on every rank.
    """
    refuse_links(out_dir)
    if (out_dir / "metrics.json").exists():
        remedy = "is complete: name another folder, or delete it first"
        raise SettingError("out_dir", str(out_dir), remedy)
    _check_parts(base)
    split = check_split(base.parallel.data, base.parallel.latents), base.parallel.latents
    if start is not None and split != (1, 1):
        remedy = "an SAE is trained further in one process: leave out --start, or torchrun"
        raise SettingError("--start", "given", remedy)
    seed = study_seeds(study, "explore", 1)[0]
    with join_ranks(*split, base.model.device) as ranks:
        check_ranks(ranks, str(ranks.device))
        cache = cache_folder(root)
        prepared = _prepared(base, cache, ranks)
        kept = cache / "resume" / _key(base, prepared, seed, start)
        around = Surroundings(
            layout=base.layout,
            ranks=ranks,
            checkpoints=kept,
            calibration=prepared.calibration,
            start=start,
            spliced=spliced_model(base, str(ranks.device), prepared.model),
        )
        cell = train_one(prepared.train, base.sae, base.train, seed, around)
        name = CellId(BASELINE, seed, 0.0)
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
    base.sae.outline(ranks=Ranks(data, latents), d_out=2 if base.target_hooks else None)


def _prepared(base: BaseConfig, cache: Path, ranks: Ranks) -> LaunchData:
    """Harvested by the first rank, opened by all; without what probing would need."""
    device = str(ranks.device)
    without = {"evaluation.probing.entries": "none", "evaluation.probing.tables": ()}
    base = base.patched({**without, "evaluation.extra": ()})

    def harvest() -> None:
        prepare(base, cache, device)

    ranks.on_first(harvest)
    prepared = prepare(base, cache, device, keep_model=True)
    if ranks.rank == 0 and prepared.warning:
        print(visible(prepared.warning), file=sys.stderr)
    return prepared


def _key(base: BaseConfig, prepared: LaunchData, seed: int, start: SAE | None) -> str:
    """Key of the checkpoints: all that their numbers depend on; the split is not part of it."""
    settings: list[Any] = [part.model_dump(mode="json") for part in (base.sae, base.train)]
    code = [machine(base.model.device), *foreign_code(base.sae)]
    place = [base.layout, prepared.train.digest, prepared.calibration_digest, "over ranks"]
    begin = [] if start is None else [digest_of(start)]
    return digest([*settings, seed, *place, *code, *begin])


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
    write_json(out_dir / "metrics.json", complete_losses([row.as_dict() for row in rows]))
