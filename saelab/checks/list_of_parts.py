"""Registered parts and presets, for people: equation and source, settings, export, ranks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from saelab.checks.examples import Case, cases
from saelab.checks.trials import D_IN, D_SAE
from saelab.errors import SettingError, nearest
from saelab.parts.base import Activation, PartConfig, Refusal
from saelab.parts.presets import FIELDS, PRESETS, fields_of
from saelab.sae import SAEConfig

#: Stands in the column of seams for a name of several parts.
PRESET = "preset"

#: How a part works on several processes, by what it declares.
SHARDABLE = {False: "no", "rows": "yes, with parallel.latents = 1", True: "yes"}
#: The same, from what restricts an SAE most.
ORDER = list(SHARDABLE)


def about(config: type[PartConfig]) -> str:
    """Returns the docstring of the module that defines a part: equation and source."""
    module = inspect.getmodule(config)
    return inspect.cleandoc((module and module.__doc__) or config.__doc__ or "")


def as_dicts() -> list[dict[str, str]]:
    """Returns every registered part and every preset: seam, kind, and one line about it."""
    parts = [
        {"seam": case.seam, "kind": case.kind, "about": about(type(case.part)).split("\n")[0]}
        for case in cases(D_SAE, first=True, with_model=True)
    ]
    presets = [
        {"seam": PRESET, "kind": name, "about": preset.source} for name, preset in PRESETS.items()
    ]
    return parts + presets


def describe(kind: str) -> list[dict[str, Any]]:
    """Describes the preset of a name and the parts of a kind; there may be one of each seam.

    Raises: SettingError for a name that is neither.
    """
    every = cases(D_SAE, first=True, with_model=True)
    chosen = [case for case in every if case.kind == kind]
    if not chosen and kind not in PRESETS:
        kinds = [*(case.kind for case in every), *PRESETS]
        remedy = f"is no part and no preset{nearest(kind, kinds)}: `saelab parts` lists all"
        raise SettingError("NAME", kind, remedy)
    presets = [_describe_preset(kind)] if kind in PRESETS else []
    return presets + [_describe(case) for case in chosen]


def _describe_preset(name: str) -> dict[str, Any]:
    preset = PRESETS[name]
    # lists always stand there: without them an SAE has controllers of its own
    settings = {field: value for field, value in fields_of(name).items() if value != FIELDS[field]}
    sae = SAEConfig.parse({PRESET: name}).build(D_IN)
    return {
        "seam": PRESET,
        "kind": name,
        "about": f"{preset.source}\n{preset.equation}",
        "settings": settings,
        "deviations": list(preset.deviations),
        "several processes": SHARDABLE[min((p.shardable for p in sae.parts()), key=ORDER.index)],
        "export": _export(sae.activation),
    }


def _export(activation: Activation) -> str:
    form = activation.export()
    return f"no: it {form.reason}" if isinstance(form, Refusal) else "yes"


def _describe(case: Case) -> dict[str, Any]:
    part = case.part_of(case.settings(D_SAE).build(D_IN))
    fields = type(case.part).model_fields.items()
    answer = {
        "seam": case.seam,
        "kind": case.kind,
        "about": about(type(case.part)),
        "settings": {
            name: "required" if field.is_required() else repr(field.default)
            for name, field in fields
            if name != "kind"
        },
        "companions": dict(case.part.companions),
        "several processes": SHARDABLE[part.shardable],
    }
    if isinstance(part, Activation):
        answer["export"] = _export(part)
    return answer


def lines_of_all() -> Iterator[str]:
    """Yields one line for each part and preset."""
    for part in as_dicts():
        yield f"{part['seam']:11} {part['kind']:20} {part['about']}"


def lines_of(answers: list[dict[str, Any]]) -> Iterator[str]:
    """Yields what `describe` returns as text."""
    for answer in answers:
        yield f"{answer['seam']} {answer['kind']}"
        yield answer["about"]
        if answer["seam"] == PRESET:
            yield from _lines_of_preset(answer)
        else:
            yield "settings: " + ", ".join(f"{n} = {v}" for n, v in answer["settings"].items())
        if answer.get("companions"):
            yield f"must stand beside it: {answer['companions']}"
        yield f"on several processes: {answer['several processes']}"
        if "export" in answer:
            yield f"written for other tools: {answer['export']}"


def _lines_of_preset(answer: dict[str, Any]) -> Iterator[str]:
    yield f'under [sae], `preset = "{answer["kind"]}"` stands for'
    for field, value in answer["settings"].items():
        yield f"    {field} = {_toml(value)}"
    yield from (f"differs from its source: {sentence}" for sentence in answer["deviations"])


def _toml(value: Any) -> str:
    """Returns plain data as a value of TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
