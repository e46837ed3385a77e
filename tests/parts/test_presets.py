"""A preset is its parts and no more: the same digests and keys, and it trains."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.checks.list_of_parts import describe, lines_of
from saelab.checks.trials import trained_cell
from saelab.errors import SettingError
from saelab.launch.cell_key import cell_key
from saelab.parts.activations.topk import TopKConfig
from saelab.parts.presets import FIELDS, PRESETS, expand, fields_of, matches, name_of
from saelab.parts.published import Preset
from saelab.sae import SAEConfig
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run, cells

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("name", list(PRESETS))


def printed(name: str) -> dict[str, Any]:
    """What `saelab parts` prints of a preset, read as the settings that it stands for."""
    lines = [line.strip() for line in lines_of(describe(name)[:1]) if line.startswith("    ")]
    return tomllib.loads("\n".join(lines))


@each
def test_it_trains(name: str, global_random_seed: int) -> None:
    config = SAEConfig.parse({"preset": name, "d_sae": 64}).at_l0(4)
    assert name_of(config) == name
    start = trained_cell(config, global_random_seed, steps=0).sae.state_dict()
    cell = trained_cell(config, global_random_seed, steps=3)
    end = cell.sae.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in end.values())
    assert not torch.equal(start["W_enc"], end["W_enc"])
    assert not torch.equal(start["W_dec"], end["W_dec"])
    norms = end["W_dec"].norm(dim=1)
    if {"kind": "unit_norm"} in fields_of(name)["constraints"]:
        torch.testing.assert_close(norms, torch.ones_like(norms))


@each
def test_no_two_are_the_same(name: str) -> None:
    config = SAEConfig.parse({"preset": name, "d_sae": 2048})
    assert [other for other in PRESETS if matches(config, other)] == [name]
    assert config.target_l0 == 32 and config.l0_rules(16)


@each
def test_it_says_what_it_is(name: str) -> None:
    preset, answer = PRESETS[name], describe(name)[0]
    assert re.search(r"(19|20)\d\d|sparsify", preset.source) and len(preset.equation) > 20
    assert answer["seam"] == "preset" and preset.source in answer["about"]
    assert all(sentence in "\n".join(lines_of([answer])) for sentence in preset.deviations)
    assert preset.deviations and set(printed(name)) <= set(FIELDS)


def keys(changes: dict[str, Any]) -> list[Any]:
    """Keys of the cells of an arm with these changes."""
    base = BaseConfig.parse({"layout": "contexts"})
    run = Run("presets", (Arm("baseline"), Arm("a", changes, primary=True)))
    specs = cells(PlanConfig(study="presets", seeds=2, target_l0=24), base, run)
    return [cell_key(spec, {}, "cpu") for spec in specs if spec.id.arm == "a"]


@each
def test_an_arm_has_the_keys_of_its_parts(name: str) -> None:
    of_parts = {f"sae.{field}": value for field, value in printed(name).items()}
    narrow = {"sae.d_sae": 768}
    assert keys(narrow | {"sae.preset": name}) == keys(narrow | of_parts)
    assert keys({"sae.preset": name} | narrow) != keys({"sae.preset": name, "sae.d_sae": 384})


@each
def test_it_leaves_no_trace(name: str) -> None:
    config = SAEConfig.parse({"preset": name})
    assert config == SAEConfig.parse(printed(name)) == SAEConfig().patched({"preset": name})
    assert "preset" not in config.model_dump(mode="json")
    assert SAEConfig.parse(config.model_dump()).digest() == config.digest()


def test_what_is_open_stays_with_the_user() -> None:
    data = {"preset": "topk", "d_sae": 64, "activation": {"k": 7}, "observers": ["resampling"]}
    config = SAEConfig.parse(data)
    assert config.target_l0 == 7 and len(config.observers) == 1 and name_of(config) == "topk"
    assert config == SAEConfig.parse(data | {"activation": TopKConfig(k=7)})
    fixed = SAEConfig.parse(
        {"preset": "bricken", "controllers": [], "losses": [{"kind": "l1", "coefficient": 0.1}]}
    )
    assert name_of(fixed) == "bricken" and fixed.settled_l0 is None
    assert fixed.losses[1].model_dump() == {
        "kind": "l1",
        "lr": None,
        "coefficient": 0.1,
        "decoder_norms": False,
    }
    assert expand({"preset": "gated", "tied": False, "constraints": ["unit_norm"]}) == {
        **fields_of("gated")
    }


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({"constraints": []}, "constraints"),
        ({"constraints": ["frozen"]}, "constraints.0"),
        ({"constraints": [{"kind": "unit_norm", "weight": "encoder"}]}, "constraints.0.weight"),
        ({"activation": "relu"}, "activation.kind"),
        ({"activation": {"free_norms": True}}, "activation.free_norms"),
        ({"activation": None}, "activation.kind"),
        ({"losses": ["auxk"]}, "losses.0"),
        ({"losses": [{"coefficient": 0.1}]}, "losses.0"),
        ({"tied": True}, "tied"),
        ({"encoder_bias": False}, "encoder_bias"),
    ],
)
def test_what_it_fixes_is_refused(given: dict[str, Any], setting: str) -> None:
    with pytest.raises(SettingError, match="`saelab parts gated` prints") as caught:
        BaseConfig.parse({"sae": {"preset": "gated"} | given})
    assert caught.value.setting == f"sae.{setting}" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae.preset": "gatet"}, r"sae.preset = 'gatet': no such preset \(did you mean 'gated'"),
        ({"sae.preset": None}, "sae.preset = None: no such preset; known: standard,"),
        ({"sae.prese": "gated"}, "did you mean 'preset'"),
        ({"sae.preset": "gated", "sae.tied": True}, "sae.tied = True: is fixed by the preset"),
        ({"sae.preset": "gated", "sae.activation": "relu"}, "sae.activation = 'relu': is fixed"),
        ({"sae.preset": "gated", "sae.losses.1.decoder_norms": True}, "is fixed by the preset"),
        ({"sae.preset": "bricken", "sae.observers": []}, "is fixed by the preset 'bricken'"),
        ({"sae.tied": True, "sae.preset": "gated"}, "is replaced by the preset 'gated': write it"),
        ({"sae.losses+": "auxk", "sae.preset": "gated"}, "is replaced by the preset 'gated'"),
        ({"sae.preset": "topk", "sae.activation.j": 3}, "no such setting"),
    ],
)
def test_patches_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        BaseConfig().patched(changes)
    assert "\n" not in str(caught.value)


def test_a_patch_applies_in_its_order() -> None:
    changes = {
        "sae.d_sae": 64,
        "sae.preset": "topk",
        "sae.activation.k": 7,
        "sae.losses+": {"kind": "multi_topk"},
        "sae.observers": ["resampling"],
        "sae.scaling": "variance",
    }
    sae = BaseConfig().patched(changes).sae
    assert [part.kind for part in sae.losses] == ["reconstruction", "auxk", "multi_topk"]
    assert sae.target_l0 == 7 and sae.d_sae == 64 and len(sae.observers) == 1
    assert name_of(sae) is None  # it has a scaling
    assert name_of(sae.patched({"scaling": None})) == "multi_topk"


def test_a_patch_keeps_the_l0_and_replaces_the_rest() -> None:
    base = SAEConfig.parse({"preset": "bricken", "d_sae": 64, "precision": "float32"}).at_l0(20)
    topk = base.patched({"preset": "topk"})
    assert topk == SAEConfig.parse(
        {"preset": "topk", "d_sae": 64, "precision": "float32", "activation": {"k": 20}}
    )
    assert topk.patched({"preset": "bricken"}) == base


def test_weights_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = Preset(
        source="a test, 2026",
        equation="f = max(W_dec x, 0)",
        activation="relu",
        weights={"tied": True, "encoder_bias": False},
    )
    monkeypatch.setitem(PRESETS, "tied", tied)
    sae = SAEConfig.parse({"preset": "tied", "tied": True})
    assert sae.tied and not sae.encoder_bias and sae.centre and name_of(sae) == "tied"
    assert sae == SAEConfig.parse(printed("tied"))
    assert sae.patched({"preset": "standard"}) == SAEConfig()
    with pytest.raises(SettingError, match="tied = False: is fixed by the preset 'tied'"):
        SAEConfig.parse({"preset": "tied", "tied": False})


def test_names() -> None:
    assert name_of(SAEConfig()) == "standard"
    assert name_of(SAEConfig.parse({"preset": "bricken"}).patched({"observers": []})) is None
    mixed = SAEConfig.parse({"preset": "multi_topk"})
    order = [part.model_dump() for part in reversed(mixed.losses)]
    assert name_of(mixed.patched({"losses": order})) == "multi_topk"


def test_every_kind_of_the_zoo_has_a_preset() -> None:
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    table = text.split("## Kinds")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in rows[0]].index("preset")
    assert sorted(row[column].strip(" `") for row in rows[2:]) == sorted(PRESETS)
