"""An error about a setting names it by its whole path, as it stands in a file."""

from __future__ import annotations

from typing import Any

import pytest

from saelab.errors import SettingError
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells

PLAN = PlanConfig.parse({"study": "s", "target_l0": None, "levels": [], "seeds": 2})
RECONSTRUCTION = {"kind": "reconstruction"}
#: Changes of the base -> the setting that the error must name. Found when settings are read, when
#: parts are built, when they are checked with the other parts, and between settings.
CASES: list[tuple[dict[str, Any], str]] = [
    ({"sae.activation": {"kind": "topk", "k": 0}}, "sae.activation.k"),
    ({"sae.activation": {"kind": "topk", "k": 99_999}}, "sae.activation.k"),
    ({"sae.activation": {"kind": "topk", "k": "kk"}}, "sae.activation.k"),
    ({"sae.activation": {"kind": "batchtopk", "k": 99_999}}, "sae.activation.k"),
    ({"sae.activation": "rellu"}, "sae.activation.kind"),
    ({"sae.activation": 3}, "sae.activation"),
    ({"sae.scaling": {"kind": "variance", "beta": 0.0}}, "sae.scaling.beta"),
    ({"sae.scaling": {"kind": "variance", "temperature": "learned", "tau": 0}}, "sae.scaling.tau"),
    (
        {"sae.losses": [RECONSTRUCTION, {"kind": "l1", "coefficient": "c"}]},
        "sae.losses.1.coefficient",
    ),
    ({"sae.losses": [RECONSTRUCTION, {"kind": "similarity", "alpha": 3.0}]}, "sae.losses.1.alpha"),
    ({"sae.losses": [{"kind": "similarity", "balance": "replay"}]}, "sae.losses.0.path"),
    ({"sae.losses": [RECONSTRUCTION | {"space": "scaled"}]}, "sae.losses.0.space"),
    ({"sae.losses": [RECONSTRUCTION, {"kind": "l3"}]}, "sae.losses.1.kind"),
    ({"sae.controllers": [{"kind": "rounded_k", "k_min": 9999}]}, "sae.controllers.0.k_min"),
    ({"sae.controllers": [{"kind": "annealed_k", "start": 0}]}, "sae.controllers.0.start"),
    ({"sae.observers": [{"kind": "resampling", "every": 0}]}, "sae.observers.0.every"),
    ({"sae.tied": True, "sae.constraints": [{"kind": "frozen"}]}, "sae.constraints"),
    ({"train.positions": [5, 5]}, "train.positions"),
    ({"train.lr": -1.0}, "train.lr"),
    ({"sae.d_sae": 0}, "sae.d_sae"),
    ({"evaluation.loss_contexts": 0}, "evaluation.loss_contexts"),
]


@pytest.mark.parametrize(("changes", "name"), CASES)
def test_an_error_names_the_whole_path(changes: dict[str, Any], name: str) -> None:
    plain = {"sae.losses": ["reconstruction"], "sae.controllers": []}
    with pytest.raises(SettingError) as of_base:
        cells(PLAN, BaseConfig().patched(plain | changes), Run("r", [Arm("baseline")]))
    assert of_base.value.setting.removeprefix("baseline: ") == name
    base = BaseConfig().patched(plain)
    with pytest.raises(SettingError) as of_arm:
        cells(PLAN, base, Run("r", [Arm("baseline"), Arm("other", changes)]))
    assert of_arm.value.setting == f"other: {name}"
