"""Every number of a plan and its base has a range; what is in it can be judged, the rest is refused
when it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from fuzzing import profile
from hypothesis import given
from hypothesis import strategies as st

from saelab.config import Frozen
from saelab.data.activations.harvest import HarvestConfig
from saelab.errors import SettingError
from saelab.launch.synthetic.study import SyntheticStudyConfig
from saelab.runs.schema import CellId
from saelab.study.evaluation import EvalConfig, ProbingConfig
from saelab.study.plan import (
    Arm,
    BaseConfig,
    ParallelConfig,
    PlanConfig,
    Run,
    cells,
)
from saelab.training.optim import TrainConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.final_info import cells_at_target
from saelab.verdict.judge import Rules, judge

KINDS = (PlanConfig, TrainConfig, EvalConfig, ProbingConfig, HarvestConfig, ParallelConfig)
NEEDED = {PlanConfig: {"study": "s"}}


def numbers(kind: type[Frozen]) -> Iterator[tuple[str, int]]:
    """Each field that holds numbers, with how many of them it needs."""
    for name, field in kind.model_fields.items():
        types = [field.annotation, *get_args(field.annotation)]
        nested = {inner for each in types for inner in (each, *get_args(each))}
        if nested & {int, float}:
            pair = any(get_args(each)[1:2] not in ((), (...,)) for each in types if _is_tuple(each))
            yield name, 2 if pair else int(any(map(_is_tuple, types)))


def _is_tuple(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple


FIELDS = [(kind, name, count) for kind in KINDS for name, count in numbers(kind)]


def test_fields_are_found() -> None:
    names = {(kind.__name__, name) for kind, name, _ in FIELDS}
    assert len(names) > 25
    assert {("PlanConfig", "levels"), ("TrainConfig", "betas"), ("EvalConfig", "tokens")} <= names


@pytest.mark.parametrize("value", [-1, -1e300, 2**53, 10**400, float("nan"), float("inf"), True])
@pytest.mark.parametrize(("kind", "name", "count"), FIELDS)
def test_what_no_number_of_a_plan_can_be(
    kind: type[Frozen], name: str, count: int, value: float
) -> None:
    data = NEEDED.get(kind, {}) | {name: [value] * count if count else value}
    with pytest.raises(SettingError):
        kind.parse(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 0.9), ("alpha", 0.5), ("alpha", 1e-300), ("alpha", 0), ("tolerance", 1.0)],
)
def test_what_the_verdict_would_refuse(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=name):
        PlanConfig.parse({"study": "s", name: value})


extremes = st.sampled_from((5e-324, 1e-300, 1e-9, 1e-4, 0.05, 0.3, 0.4999, 0.9999, 1, 7, 1e6, 1e12))
values = st.lists(st.sampled_from((-1e77, -1.0, -1e-300, 0.0, 1e-12, 0.1, 1e77)), min_size=2)


@profile(150)
@given(st.dictionaries(st.sampled_from(("alpha", "sesoi", "tolerance", "target_l0")), extremes),
       st.sampled_from((None, 1, 1000)), values)  # fmt: skip
def test_a_plan_that_is_read_can_be_judged(
    numbers: dict[str, float], family: int | None, differences: list[float]
) -> None:
    try:
        plan = PlanConfig.parse({"study": "s", "family": family} | numbers)
    except SettingError:
        return
    names = {field.name for field in dataclasses.fields(Rules)}
    rules = Rules(**{n: v for n, v in plan.model_dump().items() if n in names})
    fvu = {"baseline": [0.5] * len(differences), "arm": [0.5 + d for d in differences]}
    arms = {name: _arm(name, values, plan) for name, values in fvu.items()}
    cells = cells_at_target(arms, "baseline", "fvu", plan)
    (comparison,) = judge(rules, cells["baseline"], {"arm": cells["arm"]})
    assert comparison.word in ("helps", "hurts", "equivalent", "cannot tell yet")


def _arm(name: str, fvu: list[float], plan: PlanConfig) -> ArmResult:
    arm, level = ArmResult(name), plan.target_l0 or 1.0
    for seed, value in enumerate(fvu):
        rows = [
            {"metric": metric, "value": number, "slice": "", "definition": "core/1"}
            for metric, number in (("fvu", value), ("l0", level))
        ]
        arm.add(CellGate(id=CellId(name, seed, level), expected=(), facts={}), rows)
    return arm


# ---------------------------------------------------------------- levels and their names


@pytest.mark.parametrize("level", [16.0000001, 1 / 3, 1234567, 0.1 + 0.2])
@pytest.mark.parametrize("name", ["levels", "target_l0"])
def test_a_level_that_its_name_rounds(name: str, level: float) -> None:
    given = [level] if name == "levels" else level
    with pytest.raises(SettingError, match="use at most 6 digits"):
        PlanConfig.parse({"study": "s", name: given})
    arms = {"arms": {"a": {}}, "target_l0": 16, "levels": [16]}
    with pytest.raises(SettingError, match="use at most 6 digits"):
        SyntheticStudyConfig.parse(arms | {name: given})


@given(st.lists(st.floats(1e-6, 1000), max_size=4))
@profile(40)
def test_cells_of_different_levels_have_different_folders(levels: list[float]) -> None:
    short = tuple(float(f"{level:.6g}") for level in levels)
    plan = PlanConfig.parse({"study": "s", "target_l0": 32, "levels": [16, *short], "seeds": 1})
    base = BaseConfig.parse({"sae": {"d_sae": 2000}})
    specs = cells(plan, base, Run("", [Arm("baseline")]))
    folders = {spec.id.folder for spec in specs}
    assert len(folders) == len(specs) == len({spec.id for spec in specs})
    for spec in specs:
        assert CellId.parse(spec.id.name) == spec.id
        assert CellId.of_folder("baseline", spec.id.folder.name) == spec.id


# ---------------------------------------------------------------- settings that fit only together

TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "only BOS": ({"train": {"positions": [0, 1]}}, "train.positions"),
    "no position": ({"train": {"positions": [5, 5]}}, "train.positions"),
    "beyond the context": ({"train": {"positions": [128, 200]}}, "train.positions"),
    "start beyond all latents": ({"sae": {"d_sae": 64, "initial_l0": 65}}, "sae.initial_l0"),
    "target beyond all latents": (
        {"sae": {"d_sae": 64, "controllers": [{"kind": "l0_target", "target": 65}]}},
        "target L0",
    ),
    "beyond float32": ({"train": {"lr": 1e39}}, "train.lr"),
    "a part beyond float32": (
        {"sae": {"scaling": {"kind": "variance", "tau": 1e300}}},
        "sae.scaling",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_settings_that_can_not_be_trained(name: str) -> None:
    data, setting = TOGETHER[name]
    plan = PlanConfig(study="s", target_l0=None, seeds=1)
    with pytest.raises(SettingError, match=setting):
        cells(plan, BaseConfig.parse(data), Run("", [Arm("baseline")]))
