"""Rounded k: what it covers, its bounds, and that nobody sees anything but a whole number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.data.activations.stream import Batch
from saelab.errors import SettingError
from saelab.parts.base import Controller, Dims, Form
from saelab.parts.controllers.rounded_k import RoundedK, RoundedKConfig, smallest_cover
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

D, F, N = 12, 96, 64


def rows(seed: int, n: int = N) -> Tensor:
    x = torch.randn(n, D, generator=torch_stream(seed, "rounded k"))
    return x * torch.linspace(0.3, 2, D)


def cell(steps: int = 60, **changes: Any) -> Cell:
    data = {"d_sae": F, "losses": ["reconstruction"], "precision": "float32", **changes}
    config = SAEConfig.parse(data)
    training = TrainConfig(tokens=steps * N, batch_size=N, lr=3e-3)
    return Cell("cell", config, training, rows(0, 256), 0)


def run(one: Cell, steps: int) -> list[dict[str, float]]:
    return [one.step(Batch(rows(i + 1), torch.arange(N))) for i in range(steps)]


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), st.floats(0.05, 0.95))
def test_covering_is_the_smallest_that_holds_the_share(energy: list[float], cover: float) -> None:
    values = sorted(energy, reverse=True)
    k = int(smallest_cover(torch.tensor([energy], dtype=torch.float64), cover)[0])
    total = sum(values)
    if total == 0:
        assert k == 0
        return
    slack = 1e-9 * total
    assert sum(values[:k]) >= cover * total - slack
    assert sum(values[: k - 1]) <= cover * total + slack


@given(st.floats(0.5, 1e4), st.integers(1, 40), st.integers(40, 512))
def test_k_is_whole_and_inside_its_bounds(start: float, k_min: int, k_max: int) -> None:
    config = RoundedKConfig(start=start, k_min=k_min, k_max=k_max)
    k = config.build(Dims(D, F)).value(0)
    assert k == int(k) and k_min <= k <= min(k_max, F)


def test_bounds_that_cannot_be_met() -> None:
    for settings in ({"k_min": 97}, {"k_min": 9, "k_max": 8}):
        with pytest.raises(SettingError, match="k_min"):
            RoundedKConfig(**settings).build(Dims(D, F))


def test_kappa_approaches_the_cover_by_hand() -> None:
    one = cell(controllers=[{"kind": "rounded_k", "momentum": 0.75, "start": 50}])
    controller = one.sae.controllers["rounded_k"]
    assert isinstance(controller, RoundedK)
    p = one.sae(rows(3))
    f, norms = p.code.dense().detach(), one.sae.W_dec.detach().norm(dim=1)
    energy = f.square().sum(0) * norms.square()
    share = energy.sort(descending=True).values.cumsum(0) / energy.sum()
    k = int((share < 0.9).sum()) + 1
    with torch.no_grad():
        controller.update(p)
    assert float(controller.kappa) == pytest.approx(0.75 * 50 + 0.25 * k)
    assert controller.value(0) == round(float(controller.kappa))


def topk(controller: dict[str, Any], steps: int = 60) -> Cell:
    return cell(steps, activation={"kind": "topk", "k": "k"}, controllers=[controller])


def test_rows_are_covered_before_selection() -> None:
    """With k = 4 the mean cover stays what a row's rectified pre-activations say."""
    one = topk({"kind": "rounded_k", "over": "rows", "start": 4, "momentum": 0.0, "k_min": 2})
    controller = one.sae.controllers["rounded_k"]
    assert isinstance(controller, RoundedK)
    p = one.sae(rows(3, 20))
    assert p.code.row_counts.max() == 4
    energy = torch.relu(p.z).square() * one.sae.W_dec.detach().norm(dim=1).square()
    share = energy.sort(1, descending=True).values.cumsum(1) / energy.sum(1, keepdim=True)
    wanted = ((share < 0.9).sum(1) + 1).float().mean()
    with torch.no_grad():
        controller.update(p)
    assert float(controller.kappa) == pytest.approx(float(wanted)) and float(wanted) > 4


def test_adaptive_topk_does_not_ratchet_down() -> None:
    """It leaves a k below the cover upwards, and the code's L0 follows the integer k."""
    one = topk({"kind": "rounded_k", "over": "rows", "start": 3, "momentum": 0.9, "k_min": 2})
    records = run(one, 60)
    ks = one.log.columns["k"]
    assert (ks == ks.round()).all() and ks[-1] > ks[0] and ks.min() >= 2
    assert records[0]["l0"] <= 3
    assert records[-1]["l0"] == pytest.approx(one.log.columns["topk.k"][-2], abs=1.0)


def test_batch_cover_of_topk_is_of_the_code_and_keeps_no_preactivations() -> None:
    one = topk({"kind": "rounded_k", "start": 3, "momentum": 0.0, "k_min": 1})
    controller = one.sae.controllers["rounded_k"]
    assert isinstance(controller, RoundedK)
    p = one.sae(rows(3))
    assert p.stored_z is None
    f = p.code.dense().detach()
    energy = f.square().sum(0) * one.sae.W_dec.detach().norm(dim=1).square()
    with torch.no_grad():
        controller.update(p)
    assert float(controller.kappa) == int(smallest_cover(energy[None], 0.9)[0])


def test_annealed_k_ends_where_it_should() -> None:
    one = topk({"kind": "annealed_k", "start": 40, "end": 8, "until": 0.5})
    controller = one.sae.controllers["annealed_k"]
    assert isinstance(controller, Controller)
    path = [controller.value(step) for step in range(60)]
    assert path[0] == 40 and path[30:] == [8] * 30 and path == sorted(path, reverse=True)
    assert all(k == int(k) for k in path)
    run(one, 60)
    one.sae.eval()
    assert int((one.sae.encode(rows(99)) != 0).sum(1).max()) == 8
    assert one.sae.activation.export() == Form(k=8)


def test_the_last_k_is_saved() -> None:
    one = topk({"kind": "annealed_k", "start": 40, "end": 8, "until": 0.5})
    run(one, 40)
    fresh = one.sae.config.build(D).eval()
    fresh.load_state_dict(one.sae.state_dict())
    one.sae.eval()
    assert torch.equal(fresh.encode(rows(7)), one.sae.encode(rows(7)))


def test_a_named_k_needs_its_controller() -> None:
    for changes in (
        {"activation": {"kind": "topk", "k": "k"}},
        {"losses": ["reconstruction", {"kind": "similarity", "k": "k"}]},
    ):
        data = {"d_sae": F, "losses": ["reconstruction"], "controllers": [], **changes}
        with pytest.raises(SettingError, match=r"k.*no controller sets it"):
            SAEConfig.parse(data).build(D)


def test_similarity_uses_the_controllers_k(global_random_seed: int) -> None:
    losses = ["reconstruction", {"kind": "similarity", "k": "k", "k_max": 20}]
    for start, wanted in ((7.4, 7), (90, 20)):
        controllers = [{"kind": "rounded_k", "start": start, "momentum": 0.99, "k_min": 2}]
        one = cell(losses=losses, controllers=controllers)
        run(one, 1)
        assert one.log.last("similarity.k") == wanted


def test_an_sae_without_energy_keeps_k() -> None:
    one = cell(controllers=[{"kind": "rounded_k", "start": 9}])
    sae: SAE = one.sae
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
        controller = sae.controllers["rounded_k"]
        assert isinstance(controller, RoundedK)
        controller.update(sae(rows(1)))
    assert float(controller.kappa) == 9
