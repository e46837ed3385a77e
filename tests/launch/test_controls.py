"""Control subjects do what their names say, and the planted effect is as large as is said."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from saelab import checkpoint
from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Batch
from saelab.errors import SettingError
from saelab.evals.base import Subject
from saelab.evals.core import DEFINITION, CoreData, measure_reconstruction
from saelab.launch import controls
from saelab.launch.collect import random_band
from saelab.launch.controls import SUBJECTS, Setting, TopOfBasis, expected_fvu_change, turn_decoder
from saelab.runs.schema import CellId
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.study.plan import CellSpec, PlanConfig
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.verdict.arms import ArmResult, CellGate
from saelab.verdict.twin import TRUE_OF_A_TWIN, judge_planted, judge_twin

D, F, K = 24, 96, 6
TOPK = SAEConfig.parse(
    {
        "d_sae": F,
        "activation": {"kind": "topk", "k": K},
        "losses": ["reconstruction"],
        "controllers": [],
        "constraints": ["unit_norm"],
        "observers": ["resampling"],
    }
)
TRAIN = TrainConfig(tokens=64 * 128, batch_size=64, lr=4e-3)


def data(rows: int = 4096, seed: int = 0) -> torch.Tensor:
    """Sparse sums of fixed directions around a mean that is not zero."""
    draw = torch_stream(seed, "test-controls")
    directions = torch.randn(60, D, generator=torch_stream(1, "test-directions"))
    on = (torch.rand(rows, 60, generator=draw) < 0.07).float()
    noise = 0.1 * torch.randn(rows, D, generator=draw)
    return (on * torch.rand(rows, 60, generator=draw)) @ directions + noise + 3.0


def core(x: torch.Tensor) -> CoreData:
    shard = Shard(x[:, None], torch.ones(len(x), 1, dtype=torch.bool))
    return CoreData(MemorySource([shard], {}), None)


def trained(config: SAEConfig = TOPK, seed: int = 5) -> Cell:
    x = data()
    cell = Cell("cell", config, TRAIN, x, seed)
    for i in range(TRAIN.steps):
        cell.step(Batch(x[64 * i % 4096 :][:64], torch.zeros(64, dtype=torch.int64)))
    cell.sae.eval()
    return cell


def subject(name: str, level: float = K, config: SAEConfig = TOPK) -> Subject:
    return SUBJECTS[name](Setting(data(), config, level, 7))


def test_all_zero_fires_nowhere_and_is_worse_than_the_mean() -> None:
    found = measure_reconstruction(subject("all zero"), core(data()))
    assert found.l0 == 0 and found.fvu > 1


@pytest.mark.parametrize("name", ["top channels", "PCA"])
def test_a_basis_has_the_target_l0_and_is_exact_with_all_of_it(name: str) -> None:
    x = data(512, 1)
    few, all_of_it = subject(name), subject(name, level=D)
    assert measure_reconstruction(few, core(x)).l0 == K
    assert torch.allclose(all_of_it.decode(all_of_it.encode(x)), x, atol=1e-4)
    assert isinstance(few, TopOfBasis)
    assert torch.allclose(few.basis @ few.basis.T, torch.eye(D), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "k"),
    [
        ({}, D // 8),
        ({"initial_l0": 9.0}, 9),
        ({"controllers": [{"kind": "l0_target", "target": 5}], "initial_l0": 9.0}, 5),
        ({"activation": {"kind": "topk", "k": K}}, K),
        ({"activation": {"kind": "topk", "k": 2 * D}}, D),
    ],
)
def test_without_a_target_l0_a_basis_has_what_the_settings_name(
    changes: dict[str, Any], k: int
) -> None:
    config = SAEConfig(d_sae=F, controllers=()).patched(changes)
    few = subject("PCA", 0.0, config)
    assert isinstance(few, TopOfBasis) and few.k == k


def test_principal_components_beat_channels() -> None:
    fvu = {
        name: measure_reconstruction(subject(name), core(data(512, 1))).fvu
        for name in ("PCA", "top channels")
    }
    assert 0 < fvu["PCA"] < fvu["top channels"] < 1


def test_untrained_is_the_baseline_before_training_at_the_target_l0() -> None:
    assert measure_reconstruction(subject("untrained"), core(data(512, 1))).l0 == K
    relu = SAEConfig(d_sae=F)
    sae = subject("untrained", 8.0, relu)
    assert isinstance(sae, SAE) and not sae.training
    assert measure_reconstruction(sae, core(data(2048, 1))).l0 == pytest.approx(8, rel=0.2)
    start = relu.patched({"initial_l0": 8.0}).build(D, 1, 7)
    start.initialise(data(), 7)
    assert torch.equal(sae.W_enc, start.W_enc) and torch.equal(sae.b_enc, start.b_enc)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": {"kind": "batchtopk", "k": K}},
        {"activation": {"kind": "jumprelu"}},
        {"initial_l0": 40.0},
        {"encoder_bias": False},
        {
            "activation": {"kind": "topk", "k": "k"},
            "controllers": [{"kind": "annealed_k", "start": 40, "end": K}],
        },
    ],
)
@pytest.mark.parametrize("level", [K, 0.0])
def test_untrained_is_at_the_target_l0_whatever_sets_that_of_a_trained_one(
    changes: dict[str, Any], level: float
) -> None:
    """Without a level it is at the L0 that the settings name, where they name one."""
    plain = SAEConfig.parse({"d_sae": F, "controllers": [], "losses": ["reconstruction"]})
    config = plain.patched(changes)
    l0 = measure_reconstruction(subject("untrained", level, config), core(data(2048, 1))).l0
    if target := level or config.target_l0:
        assert l0 == pytest.approx(target, rel=0.2)


def test_the_frozen_decoder_stays_as_drawn_while_the_rest_learns() -> None:
    spec = controls.frozen_spec(CellSpec(id=CellId("baseline", 5, K), sae=TOPK, train=TRAIN))
    assert spec.id.arm == "control:frozen decoder" and not spec.sae.observers
    start = Cell("start", spec.sae, TRAIN, data(), 5).sae
    cell = trained(spec.sae)
    assert torch.equal(cell.sae.W_dec, start.W_dec)
    assert not torch.equal(cell.sae.W_enc, start.W_enc)
    x = core(data(1024, 1))
    places = [measure_reconstruction(sae.eval(), x).fvu for sae in (start, cell.sae, trained().sae)]
    assert places == sorted(places, reverse=True)  # untrained, frozen, baseline


def test_a_tied_decoder_is_not_frozen() -> None:
    with pytest.raises(SettingError, match="untie"):
        SAEConfig.parse({"d_sae": F, "tied": True, "constraints": ["frozen"]}).build(D)


def test_rows_are_turned_by_the_angle_and_keep_their_length() -> None:
    sae = trained().sae
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    other = turn_decoder(sae, 3, 20.0)
    cosine = cosine_similarity(other.W_dec, sae.W_dec, dim=1)
    assert torch.allclose(cosine, torch.full((F,), math.cos(math.radians(20))), atol=1e-5)
    assert torch.allclose(other.W_dec.norm(dim=1), sae.W_dec.norm(dim=1), atol=1e-5)
    assert torch.equal(other.W_enc, sae.W_enc)
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())
    assert torch.equal(turn_decoder(sae, 3, 20.0).W_dec, other.W_dec)
    assert not torch.equal(turn_decoder(sae, 4, 20.0).W_dec, other.W_dec)


@pytest.mark.parametrize("degrees", [5.0, 20.0])
def test_the_planted_effect_is_as_large_as_expected(degrees: float) -> None:
    """The mean over draws; one draw scatters with the co-activation of few latents."""
    sae, x = trained().sae, data(2048, 1)
    plain = measure_reconstruction(sae, core(x)).fvu
    worse = [
        measure_reconstruction(turn_decoder(sae, seed, degrees), core(x)).fvu - plain
        for seed in range(40)
    ]
    mean = sum(worse) / len(worse)
    assert mean == pytest.approx(expected_fvu_change(sae, x, degrees), rel=0.1)
    assert mean > 0


def test_the_verdict_sees_the_planted_effect_and_no_difference_of_the_twin(tmp_path) -> None:
    """The twin's seeds are others than the baseline's, and the effect is planted in its cells."""
    x, plan = core(data(2048, 1)), PlanConfig(study="test", target_l0=K, sesoi=0.02)
    baseline, rows, gates = ArmResult("baseline"), [], []
    for seed in (0, 1, 2, 3, 10, 11, 12):
        sae, name = trained(seed=seed).sae, "baseline" if seed < 10 else "control:twin"
        found = measure_reconstruction(sae, x)
        cell = CellGate(id=CellId(name, seed, K), expected=(), facts={})
        of_cell = [
            {"arm": name, "seed": seed, "metric": metric, "value": value, "slice": ""}
            | {"definition": DEFINITION}
            for metric, value in (("fvu", found.fvu), ("l0", found.l0))
        ]
        if seed < 10:
            baseline.add(cell, of_cell)
            continue
        checkpoint.save(sae, tmp_path / str(seed), {})
        gates.append(cell)
        rows += of_cell + controls.plant_effect(tmp_path / str(seed), x, cell.id)["rows"]
    twin = judge_twin(rows, gates, baseline, plan)
    assert twin is not None and twin.word in TRUE_OF_A_TWIN
    assert (twin.n, twin.n_baseline, twin.n_shared) == (3, 4, 0)
    found = judge_planted(rows, baseline, plan.patched({"sesoi": 0.001}), gates)
    assert found is not None and found.comparison.n_shared == 0
    assert found.comparison.mean_diff is not None and twin.mean_diff is not None
    change = found.comparison.mean_diff - twin.mean_diff
    assert change == pytest.approx(found.expected, rel=0.5) and found.holds
    assert judge_planted([], baseline, plan) is None and judge_twin([], [], baseline, plan) is None
    lost = [row | {"value": None} for row in rows]  # of an SAE whose numbers are not finite
    assert judge_planted(lost, baseline, plan, gates) is None
    failed = [replace(cell, facts={"nonfinite_step": 3}) for cell in gates]
    bad = judge_twin(rows, failed, baseline, plan)
    assert bad is not None and "3 of 3 cells of the arm failed" in bad.failures


def test_the_band_of_a_random_dictionary() -> None:
    row = {"arm": "control:untrained", "metric": "sae_top_5_test_accuracy"}
    rows = [row | {"slice": f"entry=a,class={c}", "value": 0.6} for c in "xy"]
    rows.append(row | {"slice": "", "value": 0.6})
    band = random_band(rows, 200)
    half = 2 * math.sqrt(0.6 * 0.4 / 400)
    assert band == pytest.approx(
        {"random_control_low": 0.6 - half, "random_control_high": 0.6 + half}
    )
    assert random_band([], 200) == {}
