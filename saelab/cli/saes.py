"""Commands on saved SAEs: eval, export, saebench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from saelab.cli.common import (
    Arms,
    Json,
    OwnParts,
    Seeds,
    Set,
    WithoutTrace,
    parse_changes,
    register_parts,
    say,
    show,
)
from saelab.evals import evals_help


def evaluate(
    path: Annotated[
        Path,
        Argument(
            help="A run folder (run_1: every arm at the plan's L0), one of its cells, or the "
            "directory (or file) of an SAE: ours, SAELens', sparsify's, dictionary_learning's or "
            "a published one (docs/formats.md), or one on the hub (docs/sharing.md): "
            "hub:owner/name[@revision][:path]."
        ),
    ],
    config: Annotated[
        Path | None,
        Option(
            help="The data to measure on: a TOML file that names model, hook and texts, or a run "
            "folder. By default a run, or a cell of one, is measured on its own data."
        ),
    ] = None,
    evals: Annotated[
        str,
        Option(help=evals_help()),
    ] = "core,probing",
    definition: Annotated[
        int | None, Option(help="Definition of sparse probing: 2, or 1 for SAEBench's.")
    ] = None,
    format: Annotated[
        str,
        Option(
            help="Most formats are recognised by their files; those with pickles must be named, "
            "and only tensors are unpickled: dictionary_learning, goodfire, deepseek_r1, "
            "qwen_scope, hook_z, openai."
        ),
    ] = "",
    arm: Arms = None,
    seed: Seeds = None,
    allow_mismatch: Annotated[
        bool,
        Option(
            "--allow-mismatch",
            help="Evaluate on another model or hook than the SAE was trained on; the rows say so.",
        ),
    ] = False,
    without_trace: WithoutTrace = False,
    leave_one_out: Annotated[
        float | None,
        Option(
            help="Set active latents to 0 whose score, given the others, is at most this number "
            "(0 is usual; docs/zoo.md). The codes are then not those that were trained.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="File for all rows with definition and provenance: .parquet or .json."),
    ] = None,
    json_: Json = False,
    saebench_json: Annotated[
        Path | None, Option(help="Also write SAEBench's result file of the one SAE.")
    ] = None,
    experiment: OwnParts = None,
    set_: Set = None,
) -> None:
    """Evaluate saved SAEs on held-out text.

    saelab eval run_1

    saelab eval run_1/cells/baseline/seed7-l0_32 --evals core --json

    saelab eval downloaded_sae --config configs/pythia-70m.toml --out rows.parquet

    saelab eval hub:pythia-70m-deduped-res-sm:3-res-sm --config configs/pythia-70m.toml
    """
    from saelab.analysis.evaluate import Choice, evaluate_to_files, table
    from saelab.storage.cache import cache_folder

    register_parts(experiment)
    choice = Choice(
        path=path,
        format=format,
        arms=tuple(arm or ()),
        seeds=tuple(seed or ()),
        allow_mismatch=allow_mismatch,
        without_trace=without_trace,
        leave_one_out=leave_one_out,
    )
    changes = parse_changes(set_)
    if definition is not None:
        changes["evaluation.probing.definition"] = definition
    cache = cache_folder(Path())
    rows = evaluate_to_files(
        choice, config, evals.split(","), changes, cache, out=out, saebench_json=saebench_json
    )
    show(json_, rows, table(rows))


def export(
    path: Annotated[Path, Argument(help="A run folder (run_1), one of its cells, or a saved SAE.")],
    out: Annotated[Path, Option(help="New folder.")],
    format: Annotated[
        str, Option(help="Format to write; saelens: sae_lens.SAE.load_from_disk.")
    ] = "saelens",
    arm: Arms = None,
    seed: Seeds = None,
    without_trace: WithoutTrace = False,
    source: Annotated[
        str, Option(help="Format of PATH if it must be named, as --format of eval.")
    ] = "",
    json_: Json = False,
    experiment: OwnParts = None,
) -> None:
    """Write trained SAEs for another tool: the same code and reconstruction from raw activations.

    saelab export run_1 --out for_saelens --arm baseline

    Of a run every cell at the plan's L0 is written, as OUT/<arm>/seed<s>-l0_<level>. Input scaling,
    centring, beta, theta and the activations' norm are folded into the weights. An SAE that can't
    be folded is refused with the reason, the others are written, and the exit code is 2
    (docs/formats.md).
    """
    from saelab.analysis.export import export
    from saelab.errors import UsageError
    from saelab.runtime.counting import count

    register_parts(experiment)
    exported = export(path, out, format, source, arm or (), seed or (), without_trace)
    written = [str(folder) for folder in exported.written]
    show(json_, {"written": written, "refused": list(exported.refused)}, written)
    for sentence in exported.refused:
        say(sentence, err=True)
    if refused := exported.refused:
        raise UsageError(
            f"{count(len(exported.written), 'SAE')} written to {out}, {len(refused)} refused: name "
            "the arms that can be written with --arm"
        )


def saebench(
    path: Annotated[Path, Argument(help="A SAEBench result file, or a complete run.")],
    beside: Annotated[
        Path | None, Option(help="Another result file, or a complete run of ours.")
    ] = None,
    arm: Annotated[str, Option(help="Arm of a run.")] = "baseline",
    seed: Annotated[
        int | None, Option(help="Seed of a run; the arm's first one by default.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Write a run's cell as SAEBench's result file.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show a SAEBench sparse probing result, what it is, and ours next to it."""
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
    other = result_at(beside, arm, seed) if beside else None
    lines = list(comparison_lines(path, other))
    data = {"result": result_at(path), "other": other, "written": str(out) if out else None}
    show(json_, data | {"lines": lines}, lines)
