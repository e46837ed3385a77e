"""The parts that are registered, for people: equation and source, settings, export, ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from saelab.checks.examples import Case, cases
from saelab.checks.trials import D_IN, D_SAE
from saelab.errors import SettingError, nearest
from saelab.parts.base import Activation, PartConfig, Refusal

#: How a part works on several processes, by what it declares.
SHARDABLE = {True: "yes", False: "no", "rows": "yes, with parallel.latents = 1"}


def about(config: type[PartConfig]) -> str:
    """Returns the docstring of the module that defines a part: equation and source."""
    module = inspect.getmodule(config)
    return inspect.cleandoc((module and module.__doc__) or config.__doc__ or "")


def as_dicts() -> list[dict[str, str]]:
    """Returns every registered part: seam, kind, and the first line of what is said about it."""
    return [
        {"seam": case.seam, "kind": case.kind, "about": about(type(case.part)).split("\n")[0]}
        for case in cases(D_SAE, first=True)
    ]


def describe(kind: str) -> list[dict[str, Any]]:
    """Describes the parts of a kind; there may be one of each seam.

    Raises: SettingError for a kind that is not registered.
    """
    every = cases(D_SAE, first=True)
    chosen = [case for case in every if case.kind == kind]
    if not chosen:
        kinds = [case.kind for case in every]
        remedy = f"is no part{nearest(kind, kinds)}: `saelab parts` lists all"
        raise SettingError("NAME", kind, remedy)
    return [_describe(case) for case in chosen]


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
        form = part.export()
        answer["export"] = f"no: it {form.reason}" if isinstance(form, Refusal) else "yes"
    return answer


def lines_of_all() -> Iterator[str]:
    """Yields one line for each part."""
    for part in as_dicts():
        yield f"{part['seam']:11} {part['kind']:20} {part['about']}"


def lines_of(answers: list[dict[str, Any]]) -> Iterator[str]:
    """Yields what `describe` returns as text."""
    for answer in answers:
        yield f"{answer['seam']} {answer['kind']}"
        yield answer["about"]
        yield "settings: " + ", ".join(f"{n} = {v}" for n, v in answer["settings"].items())
        if answer["companions"]:
            yield f"must stand beside it: {answer['companions']}"
        yield f"on several processes: {answer['several processes']}"
        if "export" in answer:
            yield f"written for other tools: {answer['export']}"
