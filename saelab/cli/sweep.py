"""The command that tries settings: sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from saelab.cli.common import (
    Json,
    Set,
    Tokens,
    changed_settings,
    messages_on_stderr,
    parse_value,
    show,
)

#: What a sweep writes into its folder besides the files of a run.
FILE = "sweep.json"


def sweep(
    config: Annotated[Path, Argument(help="Base settings, for example configs/embedded.toml.")],
    out_dir: Annotated[Path, Option("--out_dir", "--out-dir", help="Folder for the results.")],
    over: Annotated[
        list[str],
        Option(help="A setting and its values: --over train.lr=1e-3,2e-3. May be repeated."),
    ],
    together: Annotated[
        bool,
        Option("--together", help="Pair first value with first value instead of all with all."),
    ] = False,
    l0: Annotated[
        float | None,
        Option(help="L0 that every arm is brought to; by default each has its own."),
    ] = None,
    levels: Annotated[
        str, Option(help="Further L0s for the frontier, with --l0: --levels 16,64.")
    ] = "",
    seeds: Annotated[int, Option(min=1, help="Seeds of every arm.")] = 2,
    primary: Annotated[str, Option(help="Metric that chooses the best.")] = "fvu",
    higher: Annotated[bool, Option("--higher", help="More of the metric is better.")] = False,
    tokens: Tokens = None,
    set_: Set = None,
    force: Annotated[bool, Option("--force", help="Replace a complete folder.")] = False,
    json_: Json = False,
) -> None:
    """Try a grid of settings on one stream of activations, draw the frontier, name the best.

    saelab sweep configs/embedded.toml --out_dir sweep --over train.lr=4e-3,8e-3 --l0 32

    The best is chosen among the arms that keep the L0, as in tuning, on seeds that no verdict
    uses: what it gains has then to be confirmed by a run.
    """
    from saelab.launch.launch import launch
    from saelab.runs.folder import RunFolder
    from saelab.storage.atomic import write_json
    from saelab.study.plan import PlanConfig
    from saelab.study.sweep import check_free_of_l0, summarise, sweep_run
    from saelab.study.task import Launch

    base = changed_settings(config, set_, tokens)
    plan = PlanConfig.parse(
        {"study": config.stem, "base": str(config), "primary": primary, "target_l0": l0}
        | {"direction": "higher" if higher else "lower", "levels": _levels(levels, l0)}
        | {name: seeds for name in ("seeds", "seeds_other", "seeds_levels")}
    )
    run = sweep_run(_values(over), base, together)
    check_free_of_l0(run, base, plan)
    with messages_on_stderr(json_):
        launch(
            Launch(
                name=out_dir.name,
                run=run,
                plan=plan,
                base=base,
                out_dir=out_dir,
                root=Path(),
                limit=float("inf"),
                force=force,
                purpose="tune",
            )
        )
        pictures = _draw_frontier(out_dir)
    best, rows = summarise(run, plan, RunFolder(out_dir).info)
    data = {"primary": primary, "direction": plan.direction, "target_l0": l0, "best": best}
    data["arms"] = rows
    write_json(out_dir / FILE, data)
    show(json_, data, [*_lines(data, plan.tolerance), *pictures, f"written to {out_dir / FILE}"])


def _values(over: list[str]) -> dict[str, list[Any]]:
    """Setting -> its values, of 'train.lr=1e-3,2e-3' or 'train.lr=[1e-3, 2e-3]'.

    Raises: SettingError for a pair without name or '=', and a setting named twice.
    """
    from saelab.errors import SettingError

    values: dict[str, list[Any]] = {}
    for pair in over:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise SettingError("--over", pair, "use NAME=VALUE,VALUE, as train.lr=1e-3,2e-3")
        if name in values:
            raise SettingError("--over", name, "is named twice: give all its values at once")
        whole = parse_value(text)
        if isinstance(whole, str):  # of 1e-3,2e-3, which is no TOML; a single word is one value
            whole = [parse_value(part.strip()) for part in text.split(",")]
        values[name] = whole if isinstance(whole, list) else [whole]
    return values


def _levels(text: str, l0: float | None) -> list[float]:
    """L0s of '16,64'. Raises: SettingError for another text, or without --l0."""
    from saelab.errors import SettingError

    if not text:
        return []
    if l0 is None:
        raise SettingError("--levels", text, "name the L0 of the comparison too: --l0 32")
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingError("--levels", text, "use numbers, as --levels 16,64") from None


def _draw_frontier(folder: Path) -> list[str]:
    from saelab.report.figures.common import draw_run
    from saelab.report.run_data import load

    return [line for line, _ in draw_run(load(folder), folder.parent, ("frontier",))]


def _lines(data: Mapping[str, Any], tolerance: float) -> Iterator[str]:
    """A table of the arms, best first, and the sentence that names the best."""
    primary, arms, best = data["primary"], data["arms"], data["best"]
    width = max(map(len, arms))
    yield f"{'arm':<{width}}  {primary:>10}  {'L0':>7}"
    sign = -1 if data["direction"] == "higher" else 1

    def order(name: str) -> tuple[bool, float]:
        number = arms[name][primary]
        return bool(arms[name]["left_out"]), math.inf if number is None else sign * number

    for name in sorted(arms, key=order):
        one = arms[name]
        number = "-" if one[primary] is None else f"{one[primary]:.5g}"
        sparsity = "-" if one["l0"] is None else f"{one['l0']:.4g}"
        reason = f"  left out: {one['left_out']}" if one["left_out"] else ""
        yield f"{name:<{width}}  {number:>10}  {sparsity:>7}{reason}"
    if best is None:
        yield "no arm has a valid cell at the L0: see the reasons above"
        return
    changes = " ".join(f"--set {name}={value}" for name, value in arms[best]["changes"].items())
    yield f"best: {best}" + (f" ({changes})" if changes else " (the config as it is)")
    if data["target_l0"] is None and (text := _apart(data, tolerance)):
        yield text


def _apart(data: Mapping[str, Any], tolerance: float) -> str:
    """Says that arms were compared at other L0s; '' where they were not."""
    found = [one["l0"] for one in data["arms"].values() if one["l0"] is not None]
    if not found or max(found) <= min(found) * (1 + tolerance):
        return ""
    span = f"{min(found):.3g} to {max(found):.3g}"
    return f"the arms' L0s are {span}, so a lower {data['primary']} may be bought: use --l0"
