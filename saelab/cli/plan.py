"""Commands before anything is trained: plan check, plan cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from saelab.cli.common import (
    EXPERIMENT,
    Json,
    Quick,
    RunTable,
    SeedsOfArms,
    Set,
    Tokens,
    parse_changes,
    read_runs,
    say,
    show,
)

if TYPE_CHECKING:
    from saelab.study.plan import BaseConfig


def check(
    names: Annotated[
        list[str] | None, Argument(help="Runs of the table; all of them by default.")
    ] = None,
    quick: Quick = False,
    seeds: SeedsOfArms = None,
    tokens: Tokens = None,
    set_: Set = None,
    json_: Json = False,
    experiment: RunTable = EXPERIMENT,
) -> None:
    """Say what runs will train, change, cost and could see, and refuse what is impossible."""
    from saelab.errors import SourceError
    from saelab.launch.entry import check_one
    from saelab.preflight.preview import check_text
    from saelab.study.launch_options import LaunchOptions
    from saelab.study.plan import Confirmation

    options = LaunchOptions(seeds=seeds, tokens=tokens, changes=parse_changes(set_), quick=quick)
    runs, file = read_runs(experiment)
    previews = []
    for name in names or runs:
        if quick and not names and isinstance(runs[name], Confirmation):
            continue  # it has no quick form
        try:
            previews.append(check_one(runs, file, name, options))
        except SourceError as error:  # a confirmation whose earlier runs are not there yet
            if names or not isinstance(runs[name], Confirmation):
                raise
            say(f"{name}: {error}", err=True)
    show(json_, [preview.as_dict() for preview in previews], map(check_text, previews), "\n\n")
    for preview in previews:
        preview.check_limit()
    if previews and not json_:
        option = " --quick" if quick else ""
        say(f"\nnext: `saelab run {' '.join(names or ['NAME'])}{option}`")


def cost(
    config: Annotated[Path, Argument(help="Base settings: configs/gemma-2-2b.toml.")],
    tokens: Annotated[
        int, Option(help="Tokens, harvested once and trained on by each SAE.")
    ] = 500_000_000,
    width: Annotated[
        list[int] | None, Option(help="Latents. May be repeated; 16k to 1M by default.")
    ] = None,
    device: Annotated[
        str, Option(help="A device of the table of rates, or 'here': measure this machine.")
    ] = "h100",
    rates: Annotated[Path | None, Option(help="A table of rates of your own, TOML.")] = None,
    ranks: Annotated[
        int | None, Option(min=1, help="Devices for each SAE; as many as needed by default.")
    ] = None,
    l0: Annotated[
        float | None, Option(help="Active latents per row; by default as the settings say.")
    ] = None,
    trials: Annotated[
        bool, Option("--trials", help="Measure this machine, and check small runs on it.")
    ] = False,
    json_: Json = False,
    set_: Set = None,
) -> None:
    """Say what a long training costs: GPU hours, memory of each device, disk and network.

    saelab plan cost configs/gemma-2-2b.toml

    saelab plan cost configs/embedded.toml --trials
    """
    from saelab.api import settings
    from saelab.errors import SettingError
    from saelab.preflight.cost_table import WIDTHS, cost_text, count_cost
    from saelab.preflight.rates import RATES, read_rates

    if tokens < 1:
        raise SettingError("--tokens", tokens, "use at least 1")
    base = settings(config, {**parse_changes(set_), "train.tokens": tokens})
    if trials:
        _trials(base, json_)
        return
    if device == "here":
        from saelab.preflight.calibration import rates_here

        speed = rates_here(base)
    else:
        speed = read_rates(device, rates or RATES)
    result = count_cost(base, speed, width or WIDTHS, ranks, l0)
    show(json_, result.as_dict(), [cost_text(result)])


def _trials(base: BaseConfig, json_: bool) -> None:
    from saelab.preflight.calibration import rates_here, run_trials, trial_lines

    rates = rates_here(base)
    rows = run_trials(base, rates)
    data = {"rates": rates.model_dump(), "trials": [row.as_dict() for row in rows]}
    show(json_, data, trial_lines(rows))
