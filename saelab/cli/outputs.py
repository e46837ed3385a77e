"""Types of what the commands print with --json, from which their JSON Schemas are made.

Records that the package has as dataclasses are used as they are; the meaning of their fields is the
one in their docstrings. A field that a type does not name is a mistake, which the tests look for.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from saelab.analysis.one_latent import Steered
from saelab.drivers.tries import Try
from saelab.preflight.cost_table import WidthCost
from saelab.preflight.list_of_settings import Setting, entries_of
from saelab.preflight.preview import ArmCheck
from saelab.progress.state import CellState, Stage
from saelab.study.registry import Attempt
from saelab.verdict.across_settings import AcrossSettings
from saelab.verdict.error_budget.ledger import Budget
from saelab.verdict.judge import Comparison, Difference
from saelab.verdict.losses_in_nats import Losses
from saelab.verdict.over_texts import OverTexts
from saelab.verdict.review import CellNote
from saelab.verdict.rivals import Rival
from saelab.verdict.twin import Planted


class Output(BaseModel):
    """JSON object with these fields and, in this version, no others."""

    model_config = ConfigDict(extra="forbid")


def says(meaning: str, **options: Any) -> Any:
    """Returns the field of an output with its meaning."""
    return Field(description=meaning, **options)


Folder = Annotated[str, says("folder that was written, as it was named")]


class Verdict(Output):
    """Verdict of one run, from its files."""

    run: Annotated[str, says("name of the run")]
    title: Annotated[str, says("what the run asks")]
    exploratory: Annotated[bool, says("false for the confirming run")]
    quick: Annotated[bool, says("whether it is a quick form, which is no part of the study")] = (
        False
    )
    sealed: Annotated[bool, says("whether the run's files carry checksums, with which they agree")]
    plan_hash: Annotated[str, says("hash of the plan that it was made under")]
    deviations: Annotated[list[str], says("from the plan that was registered")]
    primary: Annotated[str, says("metric that decides")]
    direction: Annotated[str, says("'lower' or 'higher' is better")]
    definition: Annotated[str, says("id and version of how the primary metric is computed")]
    covers: Annotated[str, says("what the intervals cover and what they do not")]
    comparisons: Annotated[list[Comparison], says("of the primary metric, each with its word")]
    differences: Annotated[list[Difference], says("of secondary metrics, without words")]
    cells: Annotated[list[CellNote], says("what the gate found, worst first")]
    rivals: Annotated[list[Rival], says("controls that are as good as an arm, or better")]
    budget: Annotated[Budget | None, says("the study's error budget after this run")]
    over_texts: Annotated[
        list[OverTexts], says("interval over documents of each comparison, in their order")
    ]
    across: Annotated[list[AcrossSettings], says("every arm over all settings of the plan")] = []
    twin: Annotated[Comparison | None, says("verdict on the baseline at other seeds")]
    planted: Annotated[Planted | None, says("verdict on an effect of known size")]
    losses: Annotated[Losses | None, says("of the language model, in nats")]


class SimulatedRow(Output):
    """Promise of the verdict, and what simulation gives (saelab verdict --simulate)."""

    promise: Annotated[str, says("what must hold")]
    cells: Annotated[str, says("the simulated cells")]
    studies: Annotated[int, says("number of simulated studies")]
    observed: Annotated[float, says("the share that the promise is about")]
    low: Annotated[float, says("lower promised bound")]
    high: Annotated[float, says("upper promised bound")]
    variance: Annotated[float | None, says("of what one study adds to the share")]
    repeated: Annotated[bool, says("whether this is the second simulation")]
    kept: Annotated[bool, says("whether the promise is kept")]


class Check(Output):
    """Forecast of a run: what it will train, cost and could see (saelab plan check)."""

    run: Annotated[str, says("name of the run")]
    title: Annotated[str, says("what the run asks")]
    purpose: Annotated[str, says("explore, confirm, tune or quick")]
    plan_hash: Annotated[str, says("hash of the plan")]
    deviations: Annotated[list[str], says("from the plan that was registered")]
    primary: Annotated[str, says("metric that decides")]
    cells: Annotated[int, says("SAEs to train")]
    twin_cells: Annotated[int, says("SAEs of the A/A twin")]
    tokens: Annotated[int, says("tokens over all cells")]
    seconds: Annotated[float, says("expected time with nothing in the cache")]
    memory_bytes: Annotated[int, says("memory of all processes")]
    disk_bytes: Annotated[int, says("disk for activations")]
    workers: Annotated[int, says("processes")]
    level: Annotated[
        float | None, says("level that each comparison would get; null outside a study")
    ]
    arms: Annotated[list[ArmCheck], says("each arm, its changes and what it could see")]
    warnings: Annotated[list[str], says("problems to know before it starts")]
    settings: Annotated[
        dict[str, Any], says("the same for each setting of a plan with settings")
    ] = {}
    total_seconds: Annotated[float | None, says("over all settings")] = None
    total_disk_bytes: Annotated[int | None, says("over all settings")] = None


class CostOutput(Output):
    """Cost of a harvest and of one SAE of each width (saelab plan cost)."""

    rates: Annotated[dict[str, Any], says("rates of the device, with their source")]
    tokens: Annotated[int, says("harvested, and trained on by each SAE")]
    harvest_flops: Annotated[float, says("per token")]
    harvest_hours: Annotated[float, says("of one device")]
    harvest_store_bound: Annotated[bool, says("whether writing takes longer than the model")]
    disk_bytes: Annotated[float, says("of the activations")]
    text_bytes: Annotated[float, says("of the text, over the network")]
    written_bytes: Annotated[float, says("of the activations to a URL")]
    read_bytes: Annotated[float, says("from there for each SAE that is trained alone")]
    l0: Annotated[float, says("active latents a row")]
    widths: Annotated[list[WidthCost], says("one for each width")]


class Trials(Output):
    """This machine's rates and small runs on it (saelab plan cost --trials)."""

    rates: Annotated[dict[str, Any], says("measured rates")]
    trials: Annotated[
        list[dict[str, Any]], says("each run: stated and measured seconds, the error")
    ]


class Watched(Output):
    """State of a run now (saelab watch)."""

    run: Annotated[str, says("name of the run")]
    title: Annotated[str, says("what the run asks")]
    outcome: Annotated[str, says("running, complete, failed, stopped or died")]
    reason: Annotated[str, says("why it ended; '' where it did not")]
    seconds: Annotated[float, says("since it began")]
    seconds_left: Annotated[float | None, says("expected; null while nothing is known")]
    tokens_per_second: Annotated[float, says("over all cells in training")]
    cells: Annotated[dict[str, int], says("numbers of cells: total, done, failed, cached")]
    stages: Annotated[list[Stage], says("stages at work: harvest, train ...")]
    running: Annotated[list[CellState], says("cells at work")]
    finished: Annotated[list[CellState], says("cells that ended")]


class PartLine(Output):
    """One part of the list (saelab parts)."""

    seam: Annotated[str, says("where it belongs: activation, loss, controller ...")]
    kind: Annotated[str, says("its name in settings")]
    about: Annotated[str, says("one sentence")]


class Part(PartLine):
    """A part or preset in full (saelab parts NAME)."""

    settings: Annotated[dict[str, Any], says("name -> default")]
    companions: Annotated[dict[str, Any], says("settings that it needs next to it")] = {}
    deviations: Annotated[list[str], says("of a preset from its paper")] = []
    several_processes: Annotated[
        str, says("whether several can share it", alias="several processes")
    ]
    export: Annotated[str, says("whether other tools have its form")] = ""


class PartFinding(Output):
    """One check of one part (saelab check-part)."""

    seam: Annotated[str, says("where the part belongs")]
    kind: Annotated[str, says("its name")]
    example: Annotated[str, says("number of its example")]
    check: Annotated[str, says("name of the check")]
    mistake: Annotated[str, says("what is wrong; '' where it passes")]
    place: Annotated[str, says("file and line where the part raised it; '' where it did not")]


class Context(Output):
    """Tokens around a latent's largest value in one context."""

    context: Annotated[int, says("number of the context in the held-out text")]
    start: Annotated[int, says("position in it of the first of these tokens")]
    peak: Annotated[int, says("place of the largest value in `values`")]
    value: Annotated[float, says("the largest value")]
    tokens: Annotated[list[str], says("each token as text; [] where there is no text")]
    values: Annotated[list[float], says("of the latent at each token, 0 where it is not active")]


class LatentOutput(Output):
    """One latent on held-out text (saelab latent)."""

    latent: Annotated[int, says("its index")]
    d_sae: Annotated[int, says("number of all latents")]
    tokens: Annotated[int, says("held-out tokens that were encoded")]
    density: Annotated[float, says("share of them on which it is active")]
    loss_share: Annotated[float, says("share of the squared error that it takes away")]
    largest: Annotated[float, says("its largest value")]
    contexts: Annotated[list[Context], says("where it is strongest, the strongest first")]
    raised: Annotated[list[tuple[str, float]], says("tokens whose logits it raises most")]
    lowered: Annotated[list[tuple[str, float]], says("tokens whose logits it lowers most")]
    neighbours: Annotated[list[tuple[int, float]], says("nearest decoder rows and their cosine")]
    why_no_lens: Annotated[str, says("why there are no logits; '' if there are")]
    why_no_text: Annotated[str, says("why there is no text; '' if there is")]


class EvalRow(Output):
    """One measured number with its provenance (saelab eval), whose fields depend on the SAE: model,
    hook_name, text, tokens, context, format ..."""

    model_config = ConfigDict(extra="allow")

    metric: Annotated[str, says("its name")]
    value: Annotated[float | None, says("the number; null when it is missing")]
    definition: Annotated[str, says("id and version of how it is computed")]
    slice: Annotated[str, says("the part of the data that it covers; '' for all")]
    reason: Annotated[str, says("why it is missing; '' when it is there")]
    arm: Annotated[str, says("of the cell")]
    seed: Annotated[int, says("of the cell")]
    level: Annotated[float, says("L0 that the cell was trained for")]


class Report(Output):
    """Content of a page of results (saelab report)."""

    page: Annotated[str, says("file of the page")]
    bytes: Annotated[int, says("its size")]
    runs: Annotated[
        list[dict[str, Any]], says("verdict of each run, its pictures, what is not drawn")
    ]
    browser: Annotated[list[dict[str, Any]], says("cells of the feature browser")]
    why_no_browser: Annotated[str, says("why it has none; '' if it has")]
    attempts: Annotated[int, says("attempts of the study")]


class Trained(Output):
    """SAEs that were trained (saelab train)."""

    folder: Folder
    cells: Annotated[dict[str, str], says("cell -> folder of its SAE")]
    means: Annotated[
        dict[str, float | str | None],
        says("metric or setting -> mean or text; null: missing"),
    ]
    missing: Annotated[dict[str, str], says("metric -> why it is missing")]


class Swept(Output):
    """A sweep: the best arm and all arms (saelab sweep)."""

    primary: Annotated[str, says("metric that chooses")]
    direction: Annotated[str, says("'lower' or 'higher' is better")]
    target_l0: Annotated[float | None, says("L0 of all arms; null where each has its own")]
    best: Annotated[str | None, says("the best arm; null where none can be it")]
    arms: Annotated[dict[str, Any], says("changes, value, L0, and why an arm can't be the best")]


class ProbingOutput(Output):
    """Sparse probing of a run by entry (saelab probing)."""

    base: Annotated[dict[str, Any], says("base settings")]
    data: Annotated[dict[str, Any], says("what was measured on")]
    rows: Annotated[
        list[dict[str, Any]],
        says("subject, metric, slice, values of the seeds, mean, half_width, definition, reason"),
    ]


class SyntheticOutput(Output):
    """A study on synthetic activations (saelab synthetic), the content of --table."""

    config: Annotated[dict[str, Any], says("all settings")]
    seeds: Annotated[list[int], says("of the columns")]
    values: Annotated[dict[str, Any], says("arm -> metric -> value of each seed, null if missing")]
    missing: Annotated[list[str], says("why, as sentences")]
    l0: Annotated[dict[str, Any], says("arm -> level -> measured L0 of each seed")]
    scalars: Annotated[dict[str, Any], says("arm -> learned scalar -> value of each cell")]
    differences: Annotated[dict[str, Any], says("arm -> metric -> arm minus baseline, interval")]
    words: Annotated[dict[str, Any], says("arm -> judged metric -> word and interval, or reason")]
    trials: Annotated[dict[str, Any], says("arm -> rate -> mean of the metric that chooses")]
    oracle: Annotated[dict[str, float | None], says("the true dictionary with the true code")]


class Exported(Output):
    """SAEs written for another tool (saelab export)."""

    written: Annotated[list[str], says("folders")]
    refused: Annotated[list[str], says("sentences: which SAE, and why it can't be folded")]


class Shared(Output):
    """Files sent to or copied from a hub (saelab push, pull)."""

    folder: Annotated[str | None, says("where the files were written; null where they were sent")]
    repository: Annotated[str | None, says("owner/name on the hub; null where none is named")]
    url: Annotated[str | None, says("page of the commit; null where nothing was sent")]
    files: Annotated[dict[str, int], says("file -> bytes")]


class Neuronpedia(Output):
    """Files for Neuronpedia (saelab neuronpedia)."""

    folder: Folder
    files: Annotated[list[str], says("files")]
    source: Annotated[str, says("model/layer-set on neuronpedia.org")]


class SaebenchOutput(Output):
    """SAEBench's result of an SAE, and another one (saelab saebench)."""

    result: Annotated[dict[str, Any], says("SAEBench's result file")]
    other: Annotated[dict[str, Any] | None, says("the one next to it; null without --beside")]
    written: Annotated[str | None, says("file that was written")]
    lines: Annotated[list[str], says("what it says to people: what each is, numbers side by side")]


class Template(Output):
    """Folder of a study (saelab template)."""

    folder: Folder
    files: Annotated[list[str], says("files in it")]
    has_baseline: Annotated[bool, says("whether the results of run_0 are there")]


class Installed(Output):
    """Package with a language model (saelab lm install)."""

    package: Annotated[str, says("its name")]
    version: Annotated[str, says("its version")]
    path: Annotated[str, says("value for model.path")]


class Imported(Output):
    """Folder of a language model (saelab lm import)."""

    folder: Folder
    source: Annotated[dict[str, Any], says("where the weights are from, and their checksum")]


class LanguageModelOutput(Output):
    """The embedded language model, made again (saelab lm train)."""

    folder: Folder
    losses: Annotated[dict[str, float], says("held-out text -> nats per token")]


class Schema(Output):
    """JSON Schemas (saelab schema)."""

    commands: Annotated[dict[str, Any], says("command -> schema of what it prints with --json")]
    error: Annotated[dict[str, Any], says("schema of what any command prints when it is refused")]


class Problem(Output):
    """Why a command was refused or failed, on stdout with --json; stderr has the sentence."""

    type: Annotated[str, says("class of the error: SettingError, SourceError, UsageError ...")]
    message: Annotated[str, says("one sentence")]
    setting: Annotated[str | None, says("the setting, where one is to blame")]
    value: Annotated[str | None, says("its value")]
    remedy: Annotated[str | None, says("what to do")]
    exit_code: Annotated[int, says("2 for bad input, 1 for a study without a result")]


class Failure(Output):
    """The only object on stdout of a command that was refused."""

    error: Problem


TunedArm = dict[str, Any]

#: Command -> what it prints with --json.
OUTPUTS: dict[str, Any] = {
    "run": Verdict | list[Verdict],
    "plan check": list[Check],
    "plan cost": CostOutput | Trials,
    "try": Try,
    "tune": dict[str, TunedArm | str],
    "verdict": list[Verdict] | list[SimulatedRow],
    "report": Report,
    "template": Template,
    "watch": Watched,
    "attempts": list[Attempt],
    "train": Trained,
    "sweep": Swept,
    "difference": Difference,
    "probing": ProbingOutput,
    "eval": list[EvalRow],
    "latent": LatentOutput,
    "steer": Steered,
    "export": Exported,
    "settings": list[Setting] | dict[str, Any],
    "push": Shared,
    "pull": Shared,
    "neuronpedia": Neuronpedia,
    "parts": list[PartLine] | list[Part],
    "check-part": list[PartFinding],
    "saebench": SaebenchOutput,
    "synthetic": SyntheticOutput,
    "schema": Schema,
    "lm install": Installed,
    "lm import": Imported,
    "lm train": LanguageModelOutput,
}


def schema_of(command: str) -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of what a command prints with --json. It allows
    further fields, which later versions may add."""
    return describe(TypeAdapter(OUTPUTS[command]).json_schema())


def error_schema() -> dict[str, Any]:
    """Returns the JSON Schema of what a refused command prints with --json."""
    return describe(TypeAdapter(Failure).json_schema())


def describe(schema: dict[str, Any]) -> dict[str, Any]:
    """Gives fields of dataclasses the meaning that their docstrings have; opens closed objects.

    Args:
        schema: is changed in place.
    """
    for one in [schema, *schema.get("$defs", {}).values()]:
        fields = one.get("properties", {})
        meanings = entries_of(one.get("description", ""))
        for name, field in fields.items():
            if name in meanings:
                field.setdefault("description", meanings[name])
        if one.get("additionalProperties") is False:
            del one["additionalProperties"]
        if "description" in one:
            one["description"] = one["description"].split("\n")[0]
    return schema
