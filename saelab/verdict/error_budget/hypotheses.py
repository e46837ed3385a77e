"""Comparisons of a run as the ledger identifies them, and how many a study has planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from saelab.config import digest
from saelab.runs.folder import RunFolder
from saelab.runs.schema import CellId
from saelab.study.foreign_code import foreign_code
from saelab.study.plan import BASELINE, Arm, BaseConfig, CellSpec, Confirmation, Run
from saelab.verdict.error_budget.ledger import Hypothesis

#: Ends the name of a comparison over settings; no arm's name holds a '/'.
OVER_SETTINGS = "/over settings"
#: Settings of the base that every arm of a run shares and that its numbers depend on.
SHARED = {"model", "hook_name", "target_hook", "context", "activations", "layout"}
SHARED |= {"train_text", "eval_text"}


def hypotheses(run: Run, base: BaseConfig, folders: Mapping[CellSpec, Path]) -> list[Hypothesis]:
    """Every comparison of a run.

    Args:
        base: its settings with the run's changes.
        folders: of every cell in the cache; its name is the cell's content hash.
    """
    shared = base.model_dump(mode="json", include=SHARED)
    settings: dict[str, str] = {}
    cells: dict[str, list[str]] = {}
    for spec, folder in folders.items():
        arm = spec.id.arm
        cells.setdefault(arm, []).append(folder.name)
        if arm not in settings:  # the first one is at the plan's L0
            made = [spec.sae.model_dump(mode="json"), spec.train.model_dump(mode="json")]
            code = foreign_code(spec.sae, spec.module, arm)
            settings[arm] = digest([*made, spec.id.level, code, shared])
    return [
        Hypothesis(
            arm=arm.name,
            against=arm.against,
            settings=(settings[arm.name], settings[arm.against]),
            cells=(cells[arm.name], cells[arm.against]),
        )
        for arm in run.arms
        if arm.name != BASELINE
    ]


def hypotheses_over_settings(
    own: Sequence[Hypothesis], further: Sequence[RunFolder]
) -> list[Hypothesis]:
    """Comparisons of every arm over all settings of a run, which have levels of their own.

    Args:
        own: comparisons in the plan's own base.
        further: complete runs of the further settings.
    """
    cells: dict[str, list[str]] = {}
    for run in further:
        for name, content in run.manifest["cells"].items():
            cells.setdefault(CellId.parse(name).arm, []).append(content)
    names = [run.folder.name for run in further]
    return [
        Hypothesis(
            arm=each.arm + OVER_SETTINGS,
            against=each.against,
            settings=(digest([each.settings[0], names]), digest([each.settings[1], names])),
            cells=(
                [*each.cells[0], *cells.get(each.arm, [])],
                [*each.cells[1], *cells.get(each.against, [])],
            ),
        )
        for each in own
    ]


def planned_comparisons(runs: Mapping[str, Run], settings: int = 0) -> int:
    """Number of different comparisons in a run table, without those of a confirming run.

    Args:
        settings: number of further settings; each arm is compared in each setting and over all.
    """
    found = set()
    for run in runs.values():
        if not isinstance(run, Confirmation):
            arms = {arm.name: arm for arm in run.arms}
            for arm in run.arms:
                if arm.name != BASELINE:
                    other = arms.get(arm.against, arm)
                    found.add(repr((dict(run.changes), _question(arm), _question(other))))
    return len(found) * (settings + 2 if settings else 1)


def _question(arm: Arm) -> tuple[object, ...]:
    return dict(arm.changes), arm.module, arm.primary, arm.levels
