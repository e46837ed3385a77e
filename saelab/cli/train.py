"""Commands that train without a run table: train, synthetic, lm train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from saelab.cli.common import (
    Json,
    Set,
    Tokens,
    changed_settings,
    is_first_process,
    messages_on_stderr,
    parse_changes,
    show,
)

if TYPE_CHECKING:
    from saelab.study.plan import BaseConfig


def train(
    config: Annotated[Path, Argument(help="Base settings, for example configs/embedded.toml.")],
    out_dir: Annotated[Path, Option("--out_dir", "--out-dir", help="Folder for the results.")],
    seeds: Annotated[int, Option(help="Number of seeds.")] = 1,
    seed: Annotated[
        int | None,
        Option(min=0, help="This seed alone; by default seeds follow from the config's name."),
    ] = None,
    tokens: Tokens = None,
    force: Annotated[bool, Option("--force", help="Replace a complete folder.")] = False,
    start: Annotated[
        Path | None, Option(help="Folder of an SAE, in any format: trains it further.")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train and evaluate the SAE that a config file describes.

    With --start the size, activation and scaling are those of the given SAE; losses, controllers,
    constraints, observers and the optimiser are those of the config and start anew.

    On CUDA it trains during the harvest (harvest.overlap; not run on a GPU yet).

    On several processes, each with a part of the rows or of the latents:

    torchrun --nproc-per-node 4 -m saelab train CONFIG --out_dir DIR --set parallel.latents=4
    """
    from saelab.errors import SettingError
    from saelab.launch import distributed
    from saelab.launch.launch import launch
    from saelab.study.plan import BASELINE, Arm, PlanConfig, Run
    from saelab.study.task import Launch

    if seed is not None and seeds != 1:
        raise SettingError("--seeds", seeds, "--seed names the only one: leave one of them out")
    base = changed_settings(config, set_, tokens)
    plan = {"study": config.stem, "base": str(config), "seeds": seeds, "target_l0": None}
    if start is not None or distributed.wants_ranks(base):
        if seed is not None or force:
            option = "--force" if seed is None else "--seed"
            remedy = "is of a training in one process without --start: leave it out"
            raise SettingError(option, force if seed is None else seed, remedy)
        _train_over_ranks(base, out_dir, config.stem, seeds, start, json_)
        return
    with messages_on_stderr(json_):
        launch(
            Launch(
                name=out_dir.name,
                run=Run(config.stem, [Arm(BASELINE, comment=f"as {config.name} says")]),
                plan=PlanConfig.parse(plan | {"levels": []}),
                base=base,
                out_dir=out_dir,
                root=Path(),
                limit=float("inf"),
                force=force,
                fixed_seeds=() if seed is None else (seed,),
            )
        )
    show(json_, _trained(out_dir) if json_ else None, ())


def _trained(folder: Path) -> dict[str, Any]:
    """Returns what --json prints of a finished training."""
    from saelab.runs.folder import RunFolder
    from saelab.runs.schema import CELLS
    from saelab.study.plan import BASELINE

    run = RunFolder(folder)
    cells = sorted((folder / CELLS / BASELINE).iterdir())
    reasons = {r["metric"]: r["reason"] for r in run.metrics if r["reason"] and not r["slice"]}
    means = run.info[BASELINE]["means"]
    return {
        "folder": str(folder),
        "cells": {cell.name: str(cell) for cell in cells},
        "means": means,
        "missing": {name: reasons[name] for name, value in means.items() if name in reasons},
    }


def _train_over_ranks(
    base: BaseConfig, out_dir: Path, study: str, seeds: int, start: Path | None, json_: bool
) -> None:
    from saelab import formats
    from saelab.analysis.evaluate import table
    from saelab.errors import SettingError
    from saelab.launch.distributed import train_over_ranks
    from saelab.runs.random_code import complete_losses

    if seeds != 1:
        remedy = "one SAE is trained, by several processes or from --start: leave it out"
        raise SettingError("--seeds", seeds, remedy)
    sae = None if start is None else formats.load(start).sae
    with messages_on_stderr(json_):
        made = train_over_ranks(base, out_dir, Path(), study, sae)
    rows = complete_losses([row.as_dict() for row in made])
    whole = [row for row in rows if not row["slice"]]
    data = {
        "folder": str(out_dir),
        "cells": {out_dir.name: str(out_dir)},
        "means": {row["metric"]: row["value"] for row in whole},
        "missing": {row["metric"]: row["reason"] for row in whole if row["reason"]},
    }
    if is_first_process():
        show(json_, data, table(rows))


def synthetic(
    config: Annotated[Path, Argument(help="For example configs/synthetic/baselines.toml.")],
    out: Annotated[Path | None, Option(help="JSON file for every cell's rows.")] = None,
    table: Annotated[Path | None, Option(help="JSON file for what is printed.")] = None,
    picture: Annotated[
        Path | None, Option(help="Differences from the baseline, as <picture>.png and .svg.")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Compare SAEs on synthetic activations, whose true features are known."""
    from saelab.launch.synthetic.study import read_study, run_study, tune
    from saelab.launch.synthetic.table import study_lines
    from saelab.launch.synthetic.table import table as make_table
    from saelab.report.figures.synthetic import check_drawable, draw_table
    from saelab.storage.atomic import write_json

    study = read_study(config).patched(parse_changes(set_))
    if picture is not None:
        check_drawable(study.baseline, list(study.arms))
    study, trials = tune(study)
    outcomes = run_study(study)
    summary = make_table(study, outcomes, trials)
    if out is not None:
        write_json(out, [row.as_dict() for outcome in outcomes for row in outcome.rows])
    if table is not None:
        write_json(table, summary)
    if picture is not None:
        draw_table(summary, picture)
    show(json_, summary, study_lines(summary))


def language_model(
    out: Annotated[Path, Option(help="Folder of the finished model.")] = Path("stdlib-neox-4l"),
    tokens: Annotated[int, Option(help="Training tokens.")] = 20_000_000,
    threads: Annotated[int | None, Option(help="Threads; all cores by default.")] = None,
    device: Annotated[str, Option(help="'cpu' or 'cuda' (has not run on a GPU yet).")] = "cpu",
    json_: Json = False,
) -> None:
    """Make the embedded language model again from the interpreter's own standard library.

    Takes about 40 minutes for 20 M tokens on 2 free cores. If it is interrupted, the same command
    goes on where it stopped.
    """
    from saelab.data.language_model_recipe import Recipe
    from saelab.data.language_model_recipe import train as train_model

    with messages_on_stderr(json_):
        losses = train_model(out, Recipe(tokens=tokens), threads, device)
    lines = [f"{name:8s} {loss:.4f} nats per held-out token" for name, loss in losses.items()]
    show(json_, {"folder": str(out), "losses": dict(losses)}, lines)
