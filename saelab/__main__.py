"""The command line. Heavy packages are imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Train sparse autoencoder variants side by side and learn whether an idea helps.",
    epilog="Runs on the CPU. The path for CUDA (model.device = 'cuda') has not run on a GPU yet.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, and errors whose last line says what is wrong
    add_completion=False,
)
lm = typer.Typer(help="The embedded language model.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(lm, name="lm")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train.lr=1e-3. May be repeated."),
]


@contextmanager
def _told() -> Iterator[None]:
    """Bad input ends with one sentence and exit code 2, a failed study with 1."""
    from saelab.errors import SaelabError

    try:
        yield
    except SaelabError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A run of the table in experiment.py, 'run_1'.")],
    force: Annotated[bool, typer.Option(help="Replace a complete run.")] = False,
    experiment: Annotated[Path, typer.Option(help="File with the run table.")] = Path(
        "experiment.py"
    ),
) -> None:
    """Train, evaluate and judge all arms of one run (as `python experiment.py --out_dir=NAME`)."""
    with _told():
        from saelab.study.cells import load_experiment
        from saelab.study.front import run_one

        file = experiment.resolve()
        run_one(load_experiment(file).RUNS, file, Path(name), force)


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(help="Base settings, for example configs/embedded.toml.")
    ],
    out_dir: Annotated[
        Path, typer.Option("--out_dir", "--out-dir", help="Folder for the results.")
    ],
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 1,
    set_: Set = None,
) -> None:
    """Train and evaluate the SAE that a config file describes.

    On CUDA it trains beside the harvest (harvest.overlap; not run on a GPU yet).
    """
    with _told():
        from saelab.api import settings
        from saelab.study.engine import Launch, launch
        from saelab.study.plan import BASELINE, Arm, PlanConfig, Run

        launch(
            Launch(
                name=out_dir.name,
                run=Run(config.stem, [Arm(BASELINE, comment=f"as {config.name} says")]),
                plan=PlanConfig.parse({"study": config.stem, "seeds": seeds, "target_l0": None}),
                base=settings(config, _changes(set_)),
                out_dir=out_dir,
                root=Path(),
                limit=float("inf"),
            )
        )


@app.command()
def difference(
    folder: Annotated[Path, typer.Argument(help="A complete run, 'run_4'.")],
    arm: Annotated[str, typer.Argument(help="The arm in question.")],
    other: Annotated[str, typer.Argument(help="What it is compared with.")],
    metric: Annotated[str, typer.Option(help="As in final_info.json.")] = "fvu",
) -> None:
    """Print the paired difference of two arms of a run, over the seeds that both have."""
    with _told():
        from saelab.study.difference import difference as of_arms

        found = of_arms(folder, arm, other, metric)
        if found.low is None or found.high is None or found.mean_diff is None:
            print(f"{arm} - {other}, {metric}: {found.reason}")
            return
        span = f"95% interval {found.low:+.4f} to {found.high:+.4f}, {found.n} pairs"
        print(f"{arm} - {other}, {metric}: {found.mean_diff:+.4f}  ({span})")


@app.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(help="Folder of a trained SAE (sae.json).")],
    config: Annotated[Path, typer.Option(help="Base settings that name model, hook and texts.")],
    evals: Annotated[
        str, typer.Option(help="Comma-separated: core, probing, model_channels, truth.")
    ] = "core,probing",
    definition: Annotated[
        int | None, typer.Option(help="Of sparse probing: 2, or 1 for SAEBench's.")
    ] = None,
    saebench_json: Annotated[
        Path | None, typer.Option(help="Also write SAEBench's result file.")
    ] = None,
    set_: Set = None,
) -> None:
    """Evaluate a saved SAE on held-out text."""
    with _told():
        from saelab.api import evaluate as measure
        from saelab.api import saebench_result, settings
        from saelab.checkpoint import load
        from saelab.errors import MismatchError
        from saelab.files import write_json

        changes = _changes(set_)
        if definition is not None:
            changes["evaluation.probing.definition"] = definition
        base = settings(config, changes)
        names = evals.split(",")
        if saebench_json is not None:
            names += [name for name in ("probing", "model_channels") if name not in names]
        sae, origin = load(path)
        if origin.get("hook_name") not in ("", base.hook_name):
            raise MismatchError(
                f"the SAE was trained at {origin['hook_name']}, but hook_name = {base.hook_name}: "
                "evaluate it where it was trained"
            )
        scores = measure(sae, base, names)
        for metric, value in scores.items():
            typer.echo(f"{metric:32s} {value:.4f}")
        if saebench_json is not None:
            write_json(saebench_json, saebench_result(scores, sae, base, path.name))
            typer.echo(f"{saebench_json}: SAEBench's result file")


@app.command()
def saebench(
    path: Annotated[Path, typer.Argument(help="A SAEBench result file, or a complete run.")],
    beside: Annotated[
        Path | None, typer.Option(help="Another result file, or a complete run of ours.")
    ] = None,
    arm: Annotated[str, typer.Option(help="Of a run.")] = "baseline",
    seed: Annotated[int | None, typer.Option(help="Of a run; its first one by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write a run's cell as SAEBench's result file.")
    ] = None,
) -> None:
    """Show a SAEBench sparse probing result, what it is, and ours beside it."""
    with _told():
        from saelab.errors import SettingError
        from saelab.files import write_json
        from saelab.study.recorded import result_at, run_result, shown

        if path.is_dir():
            if out is None:
                raise SettingError("--out", None, "a run becomes a file: say which")
            write_json(out, run_result(path, arm, seed))
            path = out
        elif out is not None:
            raise SettingError("--out", str(out), f"{path} is a result file already: leave it out")
        for line in shown(path, result_at(beside, arm, seed) if beside else None):
            typer.echo(line)


@app.command()
def synthetic(
    config: Annotated[Path, typer.Argument(help="For example configs/synthetic/baselines.toml.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for every cell's rows.")] = None,
    table: Annotated[Path | None, typer.Option(help="JSON file for what is printed.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Differences from the baseline, as <picture>.png and .svg.")
    ] = None,
    set_: Set = None,
) -> None:
    """Compare SAEs on synthetic activations, whose true features are known."""
    with _told():
        from saelab.files import write_json
        from saelab.report.synthetic import check_drawable, draw_table
        from saelab.study import ground

        settings = ground.read_ground(config).patched(_changes(set_))
        if picture is not None:
            check_drawable(settings.baseline, list(settings.arms))
        outcomes = ground.run_ground(settings)
        found = ground.table(settings, outcomes)
        if out is not None:
            write_json(out, [row.as_dict() for outcome in outcomes for row in outcome.rows])
        if table is not None:
            write_json(table, found)
        if picture is not None:
            draw_table(found, picture)
        for line in ground.shown(found):
            typer.echo(line)


@lm.command("train")
def lm_train(
    out: Annotated[Path, typer.Option(help="Folder of the finished model.")] = Path(
        "stdlib-neox-4l"
    ),
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 20_000_000,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores by default.")] = None,
    device: Annotated[
        str, typer.Option(help="'cpu' or 'cuda' (has not run on a GPU yet).")
    ] = "cpu",
) -> None:
    """Make the embedded language model again from the interpreter's own standard library.

    Takes about 40 minutes for 20 M tokens on 2 free cores. The same command goes on where it
    stopped.
    """
    with _told():
        from saelab.assets.recipe import Recipe
        from saelab.assets.recipe import train as make

        for name, loss in make(out, Recipe(tokens=tokens), threads, device).items():
            typer.echo(f"{name:8s} {loss:.4f} nats per held-out token")


def _changes(pairs: list[str] | None) -> dict[str, Any]:
    """'train.lr=1e-3' -> {"train.lr": 0.001}; values are TOML, and plain words are text."""
    import tomllib

    from saelab.errors import SettingError

    changes: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise SettingError("--set", pair, "use NAME=VALUE, for example train.lr=1e-3")
        try:
            changes[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[name] = value
    return changes


def main() -> None:
    """Entry point; an interrupt ends with 130 and one sentence."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command goes on with the finished cells", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
