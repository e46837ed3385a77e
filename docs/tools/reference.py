"""Writes the pages of docs/reference from the code: `python docs/tools/reference.py`.

Of api.md the signatures at its end alone are written.

Every example is a value that the code accepts: one of a shipped config where a config has it, one
written below, or one that is derived from type, range and default.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import command_pages
from pydantic import BaseModel

import saelab
from saelab.checks.examples import FIELDS, Case
from saelab.checks.list_of_parts import PRESET, about, as_dicts, describe
from saelab.errors import SettingError
from saelab.parts import AROUND_AN_EXAMPLE, SEAMS, TABLE
from saelab.parts.base import PartConfig
from saelab.parts.controllers.l0_target import L0TargetConfig
from saelab.parts.losses.l0 import L0Config
from saelab.parts.presets import PRESETS
from saelab.parts.settings import Example
from saelab.preflight.list_of_settings import BASE, PLAN, Setting, all_settings, toml_value
from saelab.sae import SAEConfig
from saelab.study.plan import BaseConfig, PlanConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"
SIGNATURES = "## Signatures"
NOTE = "<!-- Written by `python docs/tools/reference.py` from the code: do not edit. -->\n"
ABOUT_SETTINGS = f"""\
{NOTE}
# Settings

Every setting of a config (`configs/*.toml`) and of `plan.toml`, with type, range, default and an
example. The settings of parts are in [parts.md](parts.md). `saelab settings` prints the same in a
terminal, and `saelab settings --show configs/embedded.toml` a config with all that it leaves at the
defaults.

On the command line a setting is changed by `--set train.lr=1e-3`, in an arm by
`{{"train.lr": 1e-3}}`, under the dotted names of these tables. `[]` in a name stands for each
entry of a list, `NAME` for a name of your choice; such settings have one example together.

## Base settings
"""
ABOUT_PARTS = f"""\
{NOTE}
# Parts

An SAE is put together from parts. This page has each with its equation and source, what it needs
next to it, its settings, and an SAE that uses it. `saelab parts jumprelu` prints the same for one.
[Presets](#presets) name a published SAE as a whole; [zoo.md](../zoo.md) says what each was held
against. A part of your own: [CONTRIBUTING.md](../../CONTRIBUTING.md#a-new-part).
"""
#: Latents and input dimensions of the SAE in which examples of parts are tried.
D_SAE, D_IN = 512, 16

#: Lines of TOML for settings whose value no rule can guess.
EXAMPLES = {
    "hook_name": 'hook_name = "blocks.3.hook_mlp_out"',
    "target_hook": 'target_hook = "blocks.2.hook_mlp_out"',
    "model.path": 'model.path = "EleutherAI/pythia-70m"',
    "model.revision": 'model.revision = "main"',
    "model.device": 'model.device = "cuda:1"',
    "activations": 'activations = "activations"',
    "train_text.name": 'train_text.name = "en"',
    "eval_text.name": 'eval_text.name = "en"',
    "train_text.column": 'train_text.column = ["text", "content"]',
    "eval_text.column": 'eval_text.column = ["text", "content"]',
    "train_text.path": 'train_text = { kind = "files", path = "train.jsonl" }',
    "eval_text.path": 'eval_text = { kind = "files", path = "held_out.jsonl" }',
    "train_text.split": 'train_text.split = "all"',
    "eval_text.split": 'eval_text.split = "held_out"',
    "harvest.read_ahead": "harvest.read_ahead = 1_073_741_824",
    "harvest.overlap": "harvest.overlap = false",
    "sae.activation": 'sae.activation = { kind = "topk", k = 64 }',
    "sae.scaling": 'sae.scaling = { kind = "variance", tau = 0.5 }',
    "sae.losses": 'sae.losses = [{ kind = "reconstruction" }, { kind = "auxk" }]',
    "sae.controllers": 'sae.controllers = [{ kind = "l0_target", target = 64 }]',
    "sae.constraints": 'sae.constraints = [{ kind = "unit_norm" }]',
    "sae.observers": 'sae.observers = [{ kind = "resampling", every = 0.1 }]',
    "sae.initial_l0": "sae.initial_l0 = 64",
    "train.betas": "train.betas = [0.0, 0.999]",
    "train.positions": "train.positions = [1, 64]",
    "evaluation.calibration_tokens": "evaluation.calibration_tokens = 16_384",
    "evaluation.extra": 'evaluation.extra = ["model_channels", "sae_probes"]',
    "evaluation.probing.k_values": "evaluation.probing.k_values = [1, 5]",
    "evaluation.sae_probes.path": 'evaluation.sae_probes.path = "sae_probes_data"',
    "evaluation.sae_probes.k_values": "evaluation.sae_probes.k_values = [16]",
    "evaluation.sae_probes.settings": 'evaluation.sae_probes.settings = ["normal", "ood"]',
    "evaluation.sae_probes.baselines": 'evaluation.sae_probes.baselines = ["logistic", "pca"]',
    "tracker": 'tracker = "tensorboard"',
    "base": 'base = "mine.toml"',
    "study": 'study = "my study"',
    "primary": 'primary = "loss_recovered"',
    "levels": "levels = [8, 128]",
    "exclusions": 'exclusions = ["layers other than the third"]',
    "family": "family = 6",
    "comparisons": "comparisons = 40",
    "parallel.data": "parallel.data = 2",
}
#: The same for settings of parts, by name alone or after seam and kind.
PART_EXAMPLES = {
    "lr": "lr = 0.001",
    "name": 'name = "strength"',
    "momentum": "momentum = 0.9",
    "theta": "theta = 0.25",
    "tau_end": "tau_end = 0.25",
    "beta": "beta = 1.5",
    "target": "target = 64",
    "coefficient": "coefficient = 0.02",
    "learned": 'learned = ["theta", "beta"]',
    "path": "path = [0.2, 0.5, 0.8]",
    "shares": "shares = [0.25, 0.5]",
    "widths": "widths = [64, 128]",
    "weights": "weights = [4.0, 2.0, 1.0, 1.0, 1.0]",
    "loss auxk k": "k = 64",
    "controller schedule start": "start = 0.01",
    "loss temporal_contrast temperature": "temperature = 8.0",
}
#: Groups of base settings: the beginning of their names, and what stands above their table.
GROUPS = {
    "": "Model, place and activations",
    "model": "[model]",
    "train_text": "[train_text]",
    "eval_text": "[eval_text]",
    "harvest": "[harvest]",
    "sae": "[sae]",
    "train": "[train]",
    "evaluation": "[evaluation]",
    "evaluation.probing": "[evaluation.probing]",
    "evaluation.sae_probes": "[evaluation.sae_probes]",
    "parallel": "[parallel]",
}
#: Keys of TOML that stand for a list or a free name in the name of a setting.
FREE = re.compile(r"\[\]|\.NAME\b")


# ---- examples --------------------------------------------------------------------------------


def accepts(check: Callable[[], object]) -> bool:
    """Returns whether the code takes what `check` gives it."""
    try:
        check()
    except (SettingError, ValueError):
        return False
    return True


def derived(row: Setting) -> Iterator[Any]:
    """Yields values other than the default that the type of a setting suggests."""
    known = row.default not in ("required", "not set")
    default = tomllib.loads(f"x = {row.default}")["x"] if known else None
    words = re.findall(r'"([^"]*)"', row.range)
    yield from (word for word in words if word != default)
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, int) and "whole number" in row.type:
        yield from (2 * default, default // 2, default + 1)
    elif isinstance(default, (int, float)):
        yield from (round(2 * default, 10), round(default / 2, 10), 0.5, 0.1, 1.0)
    elif "whole number" in row.type:
        yield from (64, 2, 1)
    elif "number" in row.type:
        yield from (0.5, 0.1, 1.0)


def from_configs(files: Sequence[Path]) -> dict[str, Any]:
    """Returns dotted name -> value of the first shipped file that sets it."""
    values: dict[str, Any] = {}

    def collect(table: Mapping[str, Any], prefix: str) -> None:
        for name, value in table.items():
            values.setdefault(f"{prefix}{name}", value)
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")

    for file in files:
        collect(tomllib.loads(file.read_text(encoding="utf-8")), "")
    return values


def example_of_file(row: Setting, shipped: Mapping[str, Any]) -> str:
    """Returns a line of TOML that sets a setting of a base or of a plan.

    Raises: ValueError where no value that the code accepts can be found.
    """
    if row.name in EXAMPLES:
        lines = [EXAMPLES[row.name]]
    else:
        values = [shipped[row.name]] if row.name in shipped else []
        values = [value for value in values if toml_value(value) != row.default]
        lines = [f"{row.name} = {toml_value(value)}" for value in [*values, *derived(row)]]
    for line in lines:
        if accepts(partial(parse_file, row.where, line)):
            return line
    raise ValueError(f"{row.name}: write an example that the code accepts into EXAMPLES")


def parse_file(where: str, text: str) -> BaseConfig | PlanConfig:
    """Reads a few lines of a base or of a plan as the code does."""
    data = tomllib.loads(text)
    return BaseConfig.parse(data) if where == BASE else PlanConfig.parse({"study": "s"} | data)


def example_of_part(row: Setting, config: type[PartConfig]) -> str:
    """Returns a line of TOML that sets a setting of a part.

    Raises: ValueError where no value that the code accepts can be found.
    """
    seam = row.where.split()[0]
    by_hand = PART_EXAMPLES.get(f"{row.where} {row.name}", PART_EXAMPLES.get(row.name))
    lines = [by_hand] if by_hand else []
    lines += [f"{row.name} = {toml_value(value)}" for value in derived(row)]
    for check in (build_with, read_with):  # some need more next to them than the example has
        for line, example in product(lines, list(config.examples(D_SAE))):
            data = example.part.model_dump() | tomllib.loads(line)
            if accepts(partial(check, seam, config, data, example)):
                return line
    raise ValueError(f"{row.where} {row.name}: write an example into PART_EXAMPLES")


def build_with(
    seam: str, config: type[PartConfig], data: Mapping[str, Any], example: Example
) -> object:
    """Builds an SAE with a part of these settings in place of its example."""
    part = config.model_validate(data)
    return Case(seam, Example(part, example.beside)).settings(D_SAE).build(D_IN)


def read_with(
    seam: str, config: type[PartConfig], data: Mapping[str, Any], example: Example
) -> object:
    """Reads the settings of a part alone."""
    return config.model_validate(data)


# ---- pages -----------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Returns text in which signs of Markdown and HTML outside of code mean nothing."""
    pieces = text.replace("\n", " ").split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*_|<\[\]])", r"\\\1", pieces[i])
    return "`".join(pieces)


def type_and_range(row: Setting) -> str:
    """Returns type and range in one text."""
    words = " or ".join(f"`{word}`" for word in row.range.split(" or ")) if row.range else ""
    if row.type == "text" and row.range:
        return words
    return f"{row.type}, {words}" if words else row.type


def default_of(row: Setting) -> str:
    words = ("required", "not set")
    return row.default if row.default in words else f"`{row.default}`"


def table(rows: Sequence[Setting], examples: Mapping[str, str]) -> Iterator[str]:
    """Yields a table of settings, a line each."""
    yield "| setting | type and range | default | example | meaning |"
    yield "|---|---|---|---|---|"
    for row in rows:
        cells = (
            f"`{row.name}`",
            type_and_range(row),
            default_of(row),
            f"`{examples[row.name]}`",
            plain(row.meaning),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def group_of(row: Setting) -> str:
    """Returns the longest group that a base setting belongs to."""
    fitting = [name for name in GROUPS if not name or row.name.startswith(f"{name}.")]
    return max(fitting, key=len)


def settings_page() -> str:
    """Returns docs/reference/settings.md."""
    rows = all_settings()
    lines = [ABOUT_SETTINGS]
    shipped = from_configs(sorted((ROOT / "configs").glob("*.toml")))
    base = sorted(
        (row for row in rows if row.where == BASE),
        key=lambda row: list(GROUPS).index(group_of(row)),
    )
    for name, group in groupby(base, key=group_of):
        lines.append(f"### {GROUPS[name]}\n")
        lines += table_with_lists(list(group), shipped)
    lines.append("## plan.toml\n")
    shipped = from_configs([ROOT / "plan.toml", *sorted((ROOT / "studies").glob("*/plan.toml"))])
    lines += table_with_lists([row for row in rows if row.where == PLAN], shipped)
    return "\n".join(lines)


#: Examples of lists and tables of settings, by the beginning of their settings' names.
WHOLE = {
    "evaluation.probing.sources.NAME": """\
[evaluation.probing.sources.ag_news]
path = "ag_news"
text_column = "text"
label_column = "label"
classes = ["World", "Sports"]
train_size = 200
test_size = 100
""",
    "evaluation.probing.tables[]": """\
[[evaluation.probing.tables]]
name = "mood"
path = "mood"
text_column = "sentence"
label_column = "mood"
""",
    "settings[]": """\
[[settings]]
name = "wide"
base = "configs/embedded.toml"
changes = { "sae.d_sae" = 3072 }
""",
}


def table_with_lists(rows: Sequence[Setting], shipped: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of settings, then one with a whole example for each list or table of them."""
    single = [row for row in rows if not FREE.search(row.name)]
    yield from table(single, {row.name: example_of_file(row, shipped) for row in single})
    for name, text in WHOLE.items():
        inner = [row for row in rows if row.name.startswith(f"{name}.")]
        if inner:
            parse_file(inner[0].where, text)
            yield "| setting | type and range | default | meaning |"
            yield "|---|---|---|---|"
            for row in inner:
                cells = (f"`{row.name}`", type_and_range(row), default_of(row), plain(row.meaning))
                yield f"| {' | '.join(cells)} |"
            yield f"\n```toml\n{text}```\n"
    listed = [row.name for row in rows if FREE.search(row.name)]
    if missing := [name for name in listed if not name.startswith(tuple(WHOLE))]:
        raise ValueError(f"{missing}: write an example into WHOLE")


def parts_page() -> str:
    """Returns docs/reference/parts.md."""
    rows = all_settings()
    lines = [ABOUT_PARTS]
    for seam in SEAMS:
        lines.append(f"## {FIELDS[seam].capitalize()}\n")
        for kind, config in TABLE[seam].items():
            if not config.__module__.startswith("saelab."):
                continue  # registered by a study in this process
            of_part = [row for row in rows if row.where == f"{seam} {kind}"]
            lines += part_section(seam, kind, config, of_part)
    lines.append("## Presets\n")
    for name in PRESETS:
        lines += preset_section(name)
    return "\n".join(lines)


def part_section(
    seam: str, kind: str, config: type[PartConfig], rows: Sequence[Setting]
) -> Iterator[str]:
    first = next(iter(config.examples(D_SAE)))
    listed = {(part["seam"], part["kind"]) for part in as_dicts()}
    answers = describe(kind) if (seam, kind) in listed else []
    yield f"### {seam} {kind}\n"
    yield f"```text\n{about(config)}\n```\n"
    if companions := dict(first.part.companions):
        yield f"Must stand next to it: `{toml_value(as_data(companions))}`\n"
    for answer in answers:
        if answer["seam"] == seam:
            yield f"- On several processes: {answer['several processes']}."
            if "export" in answer:
                yield f"- Written for other tools: {plain(answer['export'])}."
            yield ""
    yield from table(rows, {row.name: example_of_part(row, config) for row in rows})
    yield f"```toml\n{sae_of(seam, first)}```\n"


def sae_of(seam: str, example: Example) -> str:
    """Returns the [sae] table of a config with the example of a part and what stands around it."""
    settings = Case(seam, example).settings(D_SAE)
    around, defaults = AROUND_AN_EXAMPLE, SAEConfig()
    others = tuple(one for one in settings.controllers if one not in around["controllers"])
    tries: list[dict[str, Any]] = [
        {"controllers": others},
        {"controllers": (L0TargetConfig(), *others)},
        {"controllers": settings.controllers},
    ]
    penalised = seam in ("scaling", "constraint", "observer") or (
        seam == "activation" and not example.part.l0_rule(settings)
    )
    if penalised and settings.losses == around["losses"]:
        held = {"controllers": defaults.controllers}
        thresholds = {"losses": (*around["losses"], L0Config())}  # refused without thresholds
        tries = [held | thresholds, held | {"losses": defaults.losses}, *tries]
    names = [name for name in SAEConfig.model_fields if name != "precision"]
    for changes in tries:
        fields = {name: getattr(settings, name) for name in names} | changes
        data = {name: as_data(value) for name, value in fields.items() if value is not None}
        if accepts(partial(build_sae, data)):
            break
    else:
        raise ValueError(f"{example.part}: no SAE with it can be built")
    shown = {
        name: value
        for name, value in data.items()
        if value != as_data(getattr(defaults, name)) or name == FIELDS[seam]
    }
    return "\n".join(["[sae]", *lines_of(shown), ""])


def build_sae(data: Mapping[str, Any]) -> object:
    return SAEConfig.parse(dict(data)).build(D_IN)


def lines_of(data: Mapping[str, Any]) -> Iterator[str]:
    """Yields plain data as lines of TOML."""
    yield from (f"{name} = {toml_value(value)}" for name, value in data.items())


def preset_section(name: str) -> Iterator[str]:
    (answer,) = [a for a in describe(name) if a["seam"] == PRESET]
    yield f"### preset {name}\n"
    yield f"```text\n{answer['about']}\n```\n"
    settings = "\n".join(lines_of(answer["settings"]))
    yield f'Under `[sae]`, `preset = "{name}"` stands for\n\n```toml\n[sae]\n{settings}\n```\n'
    yield from (
        f"- Differs from its source: {plain(sentence)}" for sentence in answer["deviations"]
    )
    yield f"- On several processes: {answer['several processes']}."
    yield f"- Written for other tools: {plain(answer['export'])}.\n"


def as_data(value: Any) -> Any:
    """Returns settings as data that TOML can hold, parts with what differs from their defaults."""
    if isinstance(value, PartConfig):
        changed = value.model_dump(exclude_defaults=True)
        return {"kind": value.kind} | {k: v for k, v in changed.items() if v is not None}
    if isinstance(value, Mapping):
        return {name: as_data(item) for name, item in value.items() if item is not None}
    return [as_data(item) for item in value] if isinstance(value, (list, tuple)) else value


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "parts.md": parts_page,
    **command_pages.PAGES,
}


def with_signatures(page: str) -> str:
    """Returns api.md with the signature of each public name, and the first line of its description,
    at its end: for those who read the file itself, in which `:::` stands for them."""
    names = re.findall(r"^::: saelab\.(\w+)$", page, re.MULTILINE)
    lines = [SIGNATURES, "", "```text"]
    for name in names:
        value = getattr(saelab, name)
        about = (inspect.getdoc(value) or "").split("\n\n")[0]
        lines += [f"{name}{_signature(value)}", *(f"    {line}" for line in about.split("\n")), ""]
    return "\n".join([page.partition(SIGNATURES)[0].rstrip("\n"), "", *lines[:-1], "```"]) + "\n"


def _signature(value: Any) -> str:
    """Returns arguments and defaults; those of settings are on their own page."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        return "(...)"
    signature = inspect.signature(value)
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
    ]
    plain = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return str(plain).replace("<factory>", "...")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
    api = FOLDER / "api.md"
    api.write_text(with_signatures(api.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
