"""Controls that are as good as an arm are named, in one sentence, wherever the verdict is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_up_studies import open_runs, write_study
from run_folders import UNTRAINED

from saelab.report.page import Study, render
from saelab.runs.schema import PLANTED, CellId, control_arm
from saelab.study.plan import BASELINE, PlanConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.review import review, text
from saelab.verdict.rivals import find_rivals, rivals_sentence

LOUD = "CONTROLS AS GOOD AS ARMS: on "


def result(name: str, *values: float, metric: str = "fvu") -> ArmResult:
    arm = ArmResult(name)
    for seed, value in enumerate(values):
        facts = {"l0": 16.0, "explained_variance": 0.5}
        numbers = {metric: value, "l0": 16.0}
        rows = [
            {"metric": key, "value": number, "definition": "core/1", "slice": ""}
            for key, number in numbers.items()
        ]
        arm.add(CellGate(id=CellId(name, seed, 16.0), expected=(), facts=facts), rows)
    return arm


def control(name: str, value: float, metric: str = "fvu") -> dict[str, Any]:
    return {"arm": control_arm(name), "metric": metric, "value": value, "slice": ""}


def pairs(plan: PlanConfig, arms: dict[str, ArmResult], *rows: dict[str, Any]) -> list[Any]:
    return [(r.control, r.arm, r.better) for r in find_rivals(arms, rows, plan)]


def arms_of(*named: ArmResult) -> dict[str, ArmResult]:
    return {arm.name: arm for arm in named}


PLAN = PlanConfig.parse({"study": "s", "target_l0": 16, "levels": [], "sesoi": 0.01})


@pytest.mark.parametrize(
    ("value", "better"),
    [(0.20, True), (0.289, True), (0.291, False), (0.30, False), (0.309, False), (0.311, None)],
)
def test_it_compares_in_the_declared_direction_and_to_the_effect_of_interest(
    value: float, better: bool | None
) -> None:
    arms = arms_of(result(BASELINE, 0.28, 0.32))
    expected = [] if better is None else [("PCA", BASELINE, better)]
    assert pairs(PLAN, arms, control("PCA", value)) == expected
    higher = PLAN.patched({"direction": "higher"})
    mirrored = arms_of(result(BASELINE, -0.28, -0.32))
    assert pairs(higher, mirrored, control("PCA", -value)) == expected


def test_the_planted_effect_is_no_rival_and_channels_count_under_the_name_of_an_sae() -> None:
    arms = arms_of(result(BASELINE, 0.30, 0.30))
    assert pairs(PLAN, arms, control(PLANTED, 0.30)) == []
    probing = PLAN.patched({"primary": "sae_top_5_test_accuracy", "direction": "higher"})
    probed = arms_of(result(BASELINE, 0.6, 0.6, metric="sae_top_5_test_accuracy"))
    channels = control("model channels", 0.7, "llm_top_5_test_accuracy")
    assert pairs(probing, probed, channels) == [("model channels", BASELINE, True)]


def test_the_sentence_names_every_control_with_its_arms_and_their_numbers() -> None:
    arms = arms_of(result(BASELINE, 0.3, 0.3), result("A1", 0.5, 0.5))
    rows = [control("PCA", 0.298), control("PCA", 16.0, "l0"), control("untrained", 0.45)]
    said = rivals_sentence(find_rivals(arms, rows, PLAN))
    assert said.startswith(f"{LOUD}fvu, PCA (0.298 at L0 16) is better than A1 (0.5 at L0 16); ")
    assert "PCA (0.298 at L0 16) is as good as baseline (0.3 at L0 16)" in said
    assert "untrained (0.45) is better than A1" in said and "\n" not in said
    assert rivals_sentence([]) == ""


def test_verdict_and_report_say_it(tmp_path: Path) -> None:
    (folder,) = write_study(tmp_path, 1)
    assert LOUD not in text(review(folder))
    file = folder / "metrics.parquet"
    table = pq.read_table(file)
    row = next(r for r in table.to_pylist() if r["metric"] == "fvu")
    rival = row | {"arm": UNTRAINED, "seed": -1, "value": 0.0}
    pq.write_table(pq.read_table(file).from_pylist([*table.to_pylist(), rival], table.schema), file)
    found = review(folder)
    assert {r.arm for r in found.rivals} >= {BASELINE}
    assert text(found).count(LOUD) == 1
    assert found.as_dict()["rivals"][0]["control"] == "untrained"
    page, _ = render(Study(open_runs([folder])))
    answers = page[page.index('id="answers"') : page.index('id="plan"')]
    assert answers.count(LOUD) == 1
