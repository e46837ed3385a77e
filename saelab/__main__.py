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
plan = typer.Typer(
    help="The plan of a study, before anything is trained.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(plan, name="plan")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one setting: --set train.lr=1e-3. May be repeated."),
]
Arm = Annotated[
    list[str] | None,
    typer.Option("--arm", help="Of a run: this arm alone. May be repeated; all by default."),
]
Seed = Annotated[
    list[int] | None,
    typer.Option("--seed", help="Of a run: this seed alone. May be repeated; all by default."),
]
WithoutTrace = Annotated[
    bool,
    typer.Option(
        "--without-trace",
        help="Take beta = 0 in a threshold that follows the context: another function than the "
        "trained one, but one that other tools know.",
    ),
]
Experiment = Annotated[
    Path | None,
    typer.Option(help="The experiment.py whose own parts the SAE is made of."),
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Table = Annotated[Path, typer.Option("--experiment", help="File with the run table.")]
EXPERIMENT = Path("experiment.py")


@contextmanager
def cli_errors() -> Iterator[None]:
    """Bad input ends with one sentence and exit code 2, a failed study with 1, SIGINT with 130 and
    SIGTERM with 143."""
    from saelab.errors import SaelabError
    from saelab.runtime import exhaustion
    from saelab.runtime.signals import exit_on_signal

    with exit_on_signal():
        try:
            with exhaustion.as_usage_error():
                yield
        except SaelabError as error:
            if _talks():
                typer.echo(str(error), err=True)
            raise typer.Exit(error.exit_code) from None


@app.command()
def run(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Runs of the table in experiment.py, 'run_1'. The cells of several are trained "
            "together, each once."
        ),
    ],
    force: Annotated[bool, typer.Option(help="Replace a complete run.")] = False,
    executor: Annotated[
        str,
        typer.Option(
            help="Where cells are trained: local, ray (RAY_ADDRESS) or slurm (SAELAB_SLURM); by "
            "default what SAELAB_EXECUTOR names, else local."
        ),
    ] = "",
    json_: Json = False,
    experiment: Table = EXPERIMENT,
) -> None:
    """Train, evaluate and judge all arms of a run (as `python experiment.py --out_dir=NAME`)."""
    with cli_errors():
        from contextlib import redirect_stdout

        from saelab.launch.entry import run_one, train_all
        from saelab.study.experiment_file import load_experiment
        from saelab.verdict.review import review

        file, folders = experiment.resolve(), [Path(name) for name in names]
        runs = load_experiment(file).RUNS
        with redirect_stdout(sys.stderr if json_ else sys.stdout):
            train_all(runs, file, folders, force, executor)
            for folder in folders:
                run_one(runs, file, folder, force, executor=executor)
        if json_:
            found = [review(folder).as_dict() for folder in folders]
            _print_json(found[0] if len(found) == 1 else found)


@plan.command("check")
def plan_check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs of the table; all of them without a name.")
    ] = None,
    json_: Json = False,
    experiment: Table = EXPERIMENT,
) -> None:
    """Say what runs will train, change, cost and could see, and refuse what is impossible."""
    with cli_errors():
        from saelab.errors import SourceError
        from saelab.launch.entry import check_one
        from saelab.preflight.preview import check_text
        from saelab.study.experiment_file import load_experiment
        from saelab.study.plan import Confirmation

        file = experiment.resolve()
        runs = load_experiment(file).RUNS
        found = []
        for name in names or runs:
            try:
                found.append(check_one(runs, file, name))
            except SourceError as error:  # a confirmation whose earlier runs are not there yet
                if names or not isinstance(runs[name], Confirmation):
                    raise
                _say(f"{name}: {error}", err=True)
        if json_:
            _print_json([one.as_dict() for one in found])
        else:
            typer.echo("\n\n".join(map(check_text, found)))
        for one in found:
            one.check_limit()


@plan.command("cost")
def plan_cost(
    config: Annotated[Path, typer.Argument(help="Base settings: configs/gemma-2-2b.toml.")],
    tokens: Annotated[
        int, typer.Option(help="Harvested once, and trained on by each SAE.")
    ] = 500_000_000,
    width: Annotated[
        list[int] | None, typer.Option(help="Latents. May be repeated; 16k to 1M by default.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Of the table of rates, or 'here': measured on this machine.")
    ] = "h100",
    rates: Annotated[Path | None, typer.Option(help="A table of rates of your own, TOML.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Devices for each SAE; as many as needed by default.")
    ] = None,
    l0: Annotated[
        float | None, typer.Option(help="Active latents a row; as the settings say by default.")
    ] = None,
    trials: Annotated[
        bool, typer.Option("--trials", help="Measure this machine, and check small runs on it.")
    ] = False,
    json_: Json = False,
    set_: Set = None,
) -> None:
    """Say what a long training costs: GPU hours, memory of each device, disk and network.

    saelab plan cost configs/gemma-2-2b.toml

    saelab plan cost configs/embedded.toml --trials
    """
    with cli_errors():
        from saelab.api import settings
        from saelab.errors import SettingError
        from saelab.preflight.cost_table import WIDTHS, cost_text, count_cost
        from saelab.preflight.rates import RATES, read_rates

        if tokens < 1:
            raise SettingError("--tokens", tokens, "use at least 1")
        base = settings(config, {**_changes(set_), "train.tokens": tokens})
        if trials:
            _trials(base, json_)
            return
        if device == "here":
            from saelab.preflight.calibration import rates_here

            device_rates = rates_here(base)
        else:
            device_rates = read_rates(device, rates or RATES)
        cost = count_cost(base, device_rates, width or WIDTHS, ranks, l0)
        if json_:
            _print_json(cost.as_dict())
        else:
            typer.echo(cost_text(cost))


def _trials(base: Any, json_: bool) -> None:
    from saelab.preflight.calibration import rates_here, run_trials, trial_lines

    rates = rates_here(base)
    results = run_trials(base, rates)
    if json_:
        _print_json({"rates": rates.model_dump(), "trials": [one.as_dict() for one in results]})
    else:
        typer.echo("\n".join(trial_lines(results)))


@app.command()
def tune(
    name: Annotated[str, typer.Argument(help="A run of the table, 'run_10'.")] = "run_10",
    json_: Json = False,
    experiment: Table = EXPERIMENT,
) -> None:
    """Try three learning rates for baseline and primary arm each, for the confirming run.

    On seeds that no verdict uses; the best of each side goes into tuned.json.
    """
    with cli_errors():
        from contextlib import redirect_stdout

        from saelab.launch.entry import tune_one
        from saelab.study.experiment_file import load_experiment

        file = experiment.resolve()
        with redirect_stdout(sys.stderr if json_ else sys.stdout):
            found = tune_one(load_experiment(file).RUNS, file, name)
        if json_:
            _print_json(found)
        else:
            for arm, known in found.items():
                if isinstance(known, dict):
                    _say(f"{arm}: train.lr = {known['train.lr']:g} of {known['trials']}")
                    for rate, why in known["left_out"].items():
                        _say(f"  {rate} is left out: {why}")


@app.command()
def verdict(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Complete runs; all run_* here without a name.")
    ] = None,
    json_: Json = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Check the rules on simulated cells instead.")
    ] = False,
    simulations: Annotated[
        int, typer.Option(help="Simulated runs per row, at least 100.")
    ] = 20_000,
) -> None:
    """Judge finished runs from their files: differences, intervals, p and the four words."""
    with cli_errors():
        if simulate:
            _simulate(simulations, json_)
            return
        from saelab.verdict.review import complete_runs, review_all, text

        found = review_all(folders or complete_runs(Path()))
        if json_:
            _print_json([one.as_dict() for one in found])
        else:
            typer.echo("\n\n".join(map(text, found)))


@app.command()
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Complete runs; all run_* here without a name.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    features: Annotated[
        list[str] | None,
        typer.Option(help="An arm for the feature browser. May be repeated; its first seed."),
    ] = None,
    cells: Annotated[
        int, typer.Option(min=0, help="Cells of each run there: baseline, then primary arms.")
    ] = 2,
    latents: Annotated[int, typer.Option(min=1, help="Latents of each cell there.")] = 200,
    json_: Json = False,
    experiment: Experiment = None,
) -> None:
    """Write report.html: verdicts, figures, gate, controls, plan and latents on one page.

    saelab report run_1 run_3 --out x.html

    One file that needs no network. Nothing is trained; the held-out activations for the latents
    are harvested again where the cache has them not.
    """
    with cli_errors():
        from saelab.analysis.latents import browse, chosen_cells
        from saelab.report.page import Study, ledger, write
        from saelab.storage.cache import cache_folder
        from saelab.verdict.review import complete_runs

        _own_parts(experiment)
        runs = folders or complete_runs(Path())
        chosen = chosen_cells(runs, features or (), cells)
        why_not = "none was asked for" if not (cells or features) else "the runs keep no cells"
        found = list(browse(chosen, latents, 8, cache_folder(Path())))
        held = write(Study(runs, found, "" if found else why_not, ledger(runs)), out)
        if json_:
            _print_json(held)
        else:
            typer.echo(f"{out}: {len(runs)} runs, {held['bytes'] / 1e6:.1f} MB")


def _simulate(simulations: int, json_: bool) -> None:
    from dataclasses import asdict

    from saelab.errors import SettingError, StudyFailure
    from saelab.verdict.simulation import HEADING, validation_table

    if simulations < 100:
        raise SettingError("simulations", simulations, "at least 100 are needed")
    rows = validation_table(simulations)
    if json_:
        _print_json([asdict(row) for row in rows])
    else:
        typer.echo("\n".join([HEADING, *(row.line() for row in rows)]))
    if any(row.kept is False for row in rows):
        raise StudyFailure("a promise of the verdict is broken: see the row that says so")


@app.command()
def template(
    folder: Annotated[Path, typer.Argument(help="To be made.")],
    run_0: Annotated[
        Path | None, typer.Option("--run-0", help="A complete run of the baselines, copied there.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train run_0 there now, as `saelab run run_0` would.")
    ] = False,
) -> None:
    """Write a folder for a study: run table, plan, pictures, and what an autonomous driver reads.

    Without an option it copies run_0 of this folder where there is one.
    """
    with cli_errors():
        from saelab.launch.entry import run_one
        from saelab.launch.template import BASELINE_RUN, write_template
        from saelab.study.experiment_file import load_experiment

        here = Path(BASELINE_RUN)
        if run_0 is None and not train and (here / "final_info.json").is_file():
            run_0 = here
        write_template(folder, run_0)
        if train:
            file = (folder / "experiment.py").resolve()
            run_one(load_experiment(file).RUNS, file, folder / BASELINE_RUN)
        elif run_0 is None:
            typer.echo(f"{folder} has no run_0 yet: python experiment.py --out_dir=run_0 makes it")


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Of a run that goes on or has ended, 'run_3'.")],
    json_: Json = False,
) -> None:
    """Follow a run: stage, cells, tokens/s, losses, time left. With --json its state now."""
    with cli_errors():
        from saelab.progress.watch import Watched
        from saelab.progress.watch import watch as follow

        if not json_:
            follow(folder)
            return
        watched = Watched(folder)
        _print_json(watched.as_dict(watched.look()))


@app.command()
def attempts(json_: Json = False) -> None:
    """List every attempt at a run of the study in this folder."""
    with cli_errors():
        from saelab.study.registry import as_dicts
        from saelab.study.registry import attempts as kept

        found = kept(Path())
        if json_:
            _print_json(as_dicts(found))
        else:
            for one in found:
                _say(one.line())


def _say(text: str, err: bool = False) -> None:
    """Prints what may hold names and texts of others."""
    from saelab.runtime.safe_text import visible

    typer.echo(visible(text, kept="\n"), err=err)


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(data, indent=1))


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

    On several processes, each with some of the rows or of the latents:

    torchrun --nproc-per-node 4 -m saelab train CONFIG --out_dir DIR --set parallel.latents=4
    """
    with cli_errors():
        from saelab.api import settings
        from saelab.launch import distributed
        from saelab.launch.launch import launch
        from saelab.study.plan import BASELINE, Arm, PlanConfig, Run
        from saelab.study.task import Launch

        base = settings(config, _changes(set_))
        if distributed.wants_ranks(base):
            _train_over_ranks(base, out_dir, config.stem, seeds)
            return
        launch(
            Launch(
                name=out_dir.name,
                run=Run(config.stem, [Arm(BASELINE, comment=f"as {config.name} says")]),
                plan=PlanConfig.parse({"study": config.stem, "seeds": seeds, "target_l0": None}),
                base=base,
                out_dir=out_dir,
                root=Path(),
                limit=float("inf"),
            )
        )


def _train_over_ranks(base: Any, out_dir: Path, study: str, seeds: int) -> None:
    from saelab.analysis.evaluate import table
    from saelab.errors import SettingError
    from saelab.launch.distributed import train_over_ranks

    if seeds != 1:
        raise SettingError("--seeds", seeds, "several processes train one SAE: leave it out")
    rows = train_over_ranks(base, out_dir, Path(), study)
    if _talks():
        typer.echo("\n".join(table([row.as_dict() for row in rows])))


def _talks() -> bool:
    """Whether this process prints: of several that torchrun has started, one on each machine."""
    import os

    return os.environ.get("LOCAL_RANK", "0") == "0"


@app.command()
def difference(
    folder: Annotated[Path, typer.Argument(help="A complete run, 'run_4'.")],
    arm: Annotated[str, typer.Argument(help="The arm in question.")],
    other: Annotated[str, typer.Argument(help="What it is compared with.")],
    metric: Annotated[str, typer.Option(help="As in final_info.json.")] = "fvu",
) -> None:
    """Print the paired difference of two arms of a run, over the seeds that both have."""
    with cli_errors():
        from saelab.analysis.difference import difference as of_arms

        found = of_arms(folder, arm, other, metric)
        if found.low is None or found.high is None or found.mean_diff is None:
            _say(f"{arm} - {other}, {metric}: {found.reason}")
            return
        span = f"95% interval {found.low:+.4f} to {found.high:+.4f}, {found.n} pairs"
        _say(f"{arm} - {other}, {metric}: {found.mean_diff:+.4f}  ({span})")


@app.command()
def probing(
    folder: Annotated[Path, typer.Argument(help="A complete run, 'run_1'.")],
    table: Annotated[
        Path | None, typer.Option(help="JSON file for what is printed, with every seed's value.")
    ] = None,
) -> None:
    """Print a run's sparse probing by entry: arms, controls, the model's own channels."""
    with cli_errors():
        from saelab.analysis.probing_table import by_entry, table_lines
        from saelab.storage.atomic import write_json

        found = by_entry(folder)
        if table is not None:
            write_json(table, found)
        for line in table_lines(found):
            typer.echo(line)


@app.command("eval")
def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run folder (run_1: every arm at the plan's L0), one of its cells, or the "
            "directory of an SAE: ours, SAELens, sparsify, dictionary_learning."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="What it is measured on: a TOML file that names model, hook and texts, or a run "
            "folder. A run, or a cell of one, brings its own."
        ),
    ] = None,
    evals: Annotated[
        str,
        typer.Option(
            help="Comma-separated: core, probing, model_channels, truth, absorption, positions, "
            "sensitivity, consistency."
        ),
    ] = "core,probing",
    definition: Annotated[
        int | None, typer.Option(help="Of sparse probing: 2, or 1 for SAEBench's.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="saelab, saelens or sparsify are found by their files. dictionary_learning must "
            "be named: its ae.pt is a pickle, of which only tensors are read."
        ),
    ] = "",
    arm: Arm = None,
    seed: Seed = None,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            help="Evaluate on another model or hook than it was trained on; the rows say so.",
        ),
    ] = False,
    without_trace: WithoutTrace = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File for all rows with definition and provenance: .parquet or .json."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the rows, not the table.")] = False,
    saebench_json: Annotated[
        Path | None, typer.Option(help="Also write SAEBench's result file, of one SAE.")
    ] = None,
    experiment: Experiment = None,
    set_: Set = None,
) -> None:
    """Evaluate saved SAEs on held-out text.

    saelab eval run_1

    saelab eval run_1/cells/baseline/seed7-l0_32 --evals core --json

    saelab eval downloaded_sae --config configs/pythia-70m.toml --out rows.parquet
    """
    with cli_errors():
        import json as plain

        from saelab.analysis.evaluate import (
            Choice,
            evaluate_choice,
            saebench_file,
            settings_of,
            table,
        )
        from saelab.errors import SettingError
        from saelab.launch.record import write_rows
        from saelab.storage.atomic import write_json
        from saelab.storage.cache import cache_folder
        from saelab.study.plan import BaseConfig, read_base

        if out is not None and out.suffix not in (".json", ".parquet"):
            raise SettingError("--out", str(out), "name a file that ends in .parquet or .json")
        _own_parts(experiment)
        choice = Choice(
            path, format, tuple(arm or ()), tuple(seed or ()), allow_mismatch, without_trace
        )
        names, changes = evals.split(","), _changes(set_)
        if definition is not None:
            changes["evaluation.probing.definition"] = definition
        if len(choice.members()) > 1 and saebench_json is not None:
            remedy = "is of one SAE: choose it by --arm and --seed"
            raise SettingError("--saebench-json", str(saebench_json), remedy)
        if saebench_json is not None:
            names += [name for name in ("probing", "model_channels") if name not in names]
        found, probing_seed = settings_of(path, config)
        base = read_base(found) if isinstance(found, Path) else BaseConfig.parse(found)
        base = base.patched(changes)
        rows = list(evaluate_choice(choice, base, cache_folder(Path()), names, probing_seed))
        if saebench_json is not None:
            write_json(saebench_json, saebench_file(choice, base, rows, probing_seed))
        if out is not None:
            (write_json if out.suffix == ".json" else write_rows)(out, rows)
        for line in [plain.dumps(rows, indent=1)] if json else table(rows):
            _say(line)


@app.command("export")
def export_(
    path: Annotated[
        Path, typer.Argument(help="A run folder (run_1), one of its cells, or a saved SAE.")
    ],
    out: Annotated[Path, typer.Option(help="New folder.")],
    format: Annotated[str, typer.Option(help="saelens: sae_lens.SAE.load_from_disk.")] = "saelens",
    arm: Arm = None,
    seed: Seed = None,
    without_trace: WithoutTrace = False,
    source: Annotated[
        str, typer.Option(help="Format of PATH where it must be named, as for eval.")
    ] = "",
    experiment: Experiment = None,
) -> None:
    """Write trained SAEs for another tool: the same code and reconstruction from raw activations.

    saelab export run_1 --out for_saelens --arm baseline

    Of a run every cell at the plan's L0 is written, as OUT/<arm>/seed<s>-l0_<level>. Input scaling,
    centring, beta, theta and the activations' norm are folded into the weights; what can't be
    folded is refused, and then nothing is written (docs/formats.md).
    """
    with cli_errors():
        from saelab.analysis.export import export

        _own_parts(experiment)
        for folder in export(path, out, format, source, arm or (), seed or (), without_trace):
            _say(str(folder))


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
    with cli_errors():
        from saelab.analysis.saebench import comparison_lines, result_at, run_result
        from saelab.errors import SettingError
        from saelab.storage.atomic import write_json

        if path.is_dir():
            if out is None:
                raise SettingError("--out", None, "a run becomes a file: say which")
            write_json(out, run_result(path, arm, seed))
            path = out
        elif out is not None:
            raise SettingError("--out", str(out), f"{path} is a result file already: leave it out")
        for line in comparison_lines(path, result_at(beside, arm, seed) if beside else None):
            _say(line)


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
    with cli_errors():
        from saelab.launch import synthetic
        from saelab.report.figures.synthetic import check_drawable, draw_table
        from saelab.storage.atomic import write_json

        settings = synthetic.read_study(config).patched(_changes(set_))
        if picture is not None:
            check_drawable(settings.baseline, list(settings.arms))
        outcomes = synthetic.run_study(settings)
        found = synthetic.table(settings, outcomes)
        if out is not None:
            write_json(out, [row.as_dict() for outcome in outcomes for row in outcome.rows])
        if table is not None:
            write_json(table, found)
        if picture is not None:
            draw_table(found, picture)
        for line in synthetic.study_lines(found):
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
    with cli_errors():
        from saelab.data.language_model_recipe import Recipe
        from saelab.data.language_model_recipe import train as make

        for name, loss in make(out, Recipe(tokens=tokens), threads, device).items():
            typer.echo(f"{name:8s} {loss:.4f} nats per held-out token")


def _own_parts(experiment: Path | None) -> None:
    """Registers the parts that an experiment.py defines."""
    if experiment is not None:
        from saelab.study.experiment_file import load_experiment

        load_experiment(experiment.resolve())


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
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
