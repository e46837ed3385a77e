"""Scalars changed in place and put back; elasticities, implied temperatures and spreads by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.evals.base import Row
from saelab.evals.core import CoreData
from saelab.evals.sensitivity import CHANGES, LARGE, evaluate_sensitivity, scalars_of
from saelab.evals.threshold_fit import POINTS, evaluate_consistency
from saelab.parts.activations.jumprelu import JumpReLU
from saelab.parts.activations.tied_threshold import TiedThreshold
from saelab.parts.base import Stored
from saelab.parts.scalings.variance_scaling import VarianceScaling
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

TIED = {"kind": "tied_threshold", "learned": ["theta", "beta", "rho", "T"], "beta": 0.2, "T": 0.3}
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "A1": {"scaling": {"kind": "variance", "tau": 0.4, "beta": 0.8, "theta": 0.1}},
    "A1 learned": {"scaling": {"kind": "variance", "temperature": "learned"}},
    "A1 schedule": {
        "scaling": {"kind": "variance", "temperature": "learned_schedule", "tau_end": 0.2}
    },
    "A1 annealed": {"scaling": {"kind": "variance", "temperature": "annealed", "tau_end": 0.1}},
    "jumprelu": {"activation": "jumprelu"},
    "A2": {"activation": TIED, "constraints": ["unit_norm"]},
    "A2 static": {"activation": "tied_threshold", "constraints": ["unit_norm"]},
}
NAMES = {
    "relu": set(),
    "jumprelu": {"threshold"},
    "A2": {"theta", "beta", "rho", "T", "tau"},
    "A2 static": {"theta", "tau"},
}
ROWS, D, F, POSITIONS = 256, 10, 30, 32


def rows(seed: int) -> Tensor:
    """Dimensions of very different variance."""
    x = torch.randn(ROWS, D, generator=torch_stream(seed, "test sensitivity"))
    return x * torch.logspace(-1, 1, D)


def built(name: str, seed: int, **more: Any) -> SAE:
    settings = {"d_sae": F, "losses": ["reconstruction"], "controllers": [], "precision": "float32"}
    sae = SAEConfig.parse({**settings, **SETTINGS[name], **more}).build(D, 1, seed)
    sae.initialise(rows(seed), seed)
    return sae.eval()


def data(x: Tensor) -> CoreData:
    n = len(x) // POSITIONS
    mask = torch.ones(n, POSITIONS, dtype=torch.bool)
    positions = torch.arange(POSITIONS).expand(n, -1)
    shard = SimpleNamespace(
        x=x.view(n, POSITIONS, -1),
        mask=mask,
        documents=None,
        rows=lambda: (x, positions.flatten()),
    )
    header = {"hook_name": "x", "reason": "made up"}
    source: Any = SimpleNamespace(shard=lambda i: shard, n_shards=1, header=header)
    return CoreData(source, None)


def named(found: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.metric, row.slice): row for row in found}


@pytest.mark.parametrize("name", SETTINGS)
def test_measuring_changes_no_bit(name: str, global_random_seed: int) -> None:
    sae, x = built(name, global_random_seed), rows(global_random_seed)
    held = [*sae.named_parameters(), *sae.named_buffers()]  # those that are not saved, too
    before = [tensor.detach().clone() for _, tensor in held]
    assert set(scalars_of(sae)) == NAMES.get(name, {"beta", "theta", "tau"})
    for evaluation in (evaluate_sensitivity, evaluate_consistency):
        evaluation(sae, data(x))
        for (_, now), then in zip(held, before, strict=True):
            assert torch.equal(now, then)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "relu"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_value_is_scaled_whatever_is_stored(
    name: str, factor: float, global_random_seed: int
) -> None:
    sae = built(name, global_random_seed)
    for scalar, part in scalars_of(sae).items():
        before = part.scalars()
        with part.scale_temporarily(scalar, factor):
            after = part.scalars()
        own = {"tau_end"} if scalar == "tau" else set()  # tau scales with where it ends
        for other, value in before.items():
            expected = value * factor if other == scalar else value
            if other not in own:
                assert after[other] == pytest.approx(expected, rel=1e-5), (scalar, other)


def test_a_failure_inside_puts_the_scalar_back(global_random_seed: int) -> None:
    sae = built("A1", global_random_seed)
    assert isinstance(sae.scaling, VarianceScaling)
    before = sae.scaling.beta.detach().clone()
    with pytest.raises(KeyError), sae.scaling.scale_temporarily("beta", 1.1):
        raise KeyError
    assert torch.equal(sae.scaling.beta, before)


def test_a_share_can_not_reach_1() -> None:
    with pytest.raises(SettingError, match="1 or beyond"):
        Stored(torch.tensor(4.0), "logit").times(1.1)


def test_elasticities_are_those_of_two_measurements(global_random_seed: int) -> None:
    sae, x = built("A1", global_random_seed), rows(global_random_seed)
    found = named(evaluate_sensitivity(sae, data(x)))
    assert isinstance(sae.scaling, VarianceScaling)

    def measure() -> tuple[float, float]:
        f = sae.encode(x)
        error = (x - sae.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
        return float(error), float((f != 0).sum(1).double().mean())

    fvu, l0 = measure()
    with torch.no_grad():
        sae.scaling.beta.mul_(1.1)
    changed_fvu, changed_l0 = measure()
    where = "change=+10%"
    value = found["sensitivity.beta.fvu", where].value
    assert value == pytest.approx((changed_fvu / fvu - 1) / 0.1, rel=1e-3, abs=1e-4)
    value = found["sensitivity.beta.l0", where].value
    assert value == pytest.approx((changed_l0 / l0 - 1) / 0.1, abs=1e-6)
    sizes = [found["sensitivity.beta.fvu", f"change={c:+.0%}"].value for c in CHANGES]
    assert found["sensitivity.beta", ""].value == max(sizes, key=lambda v: abs(v or 0))
    assert len(LARGE) == 2 and not any("loss_recovered" in metric for metric, _ in found)


def test_what_can_not_be_changed_says_why(global_random_seed: int) -> None:
    x = rows(global_random_seed)
    found = named(evaluate_sensitivity(built("relu", global_random_seed), data(x)))
    assert {row.reason for row in found.values()} == {
        f"the subject has no {name}" for name in ("beta", "theta", "tau")
    }
    sae = built("A1 learned", global_random_seed)  # theta starts at 0
    found = named(evaluate_sensitivity(sae, data(x)))
    assert "theta is 0" in found["sensitivity.theta", ""].reason
    sae = built("A2", global_random_seed)
    assert isinstance(sae.activation, TiedThreshold)
    with torch.no_grad():
        sae.activation.rho_0.fill_(4.0)
    found = named(evaluate_sensitivity(sae, data(x)))
    assert "1 or beyond" in found["sensitivity.rho.fvu", "change=+10%"].reason
    assert found["sensitivity.rho.fvu", "change=-10%"].value is not None


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_planted_thresholds_have_the_planted_temperature(
    tau: float, global_random_seed: int
) -> None:
    sae, x = built("jumprelu", global_random_seed), rows(global_random_seed)
    assert isinstance(sae.activation, JumpReLU)
    variance = torch.nn.functional.linear(sae.encoder_input(x), sae.W_enc, sae.b_enc).var(
        0, correction=0
    )
    with torch.no_grad():
        sae.activation.log_threshold.copy_(math.log(0.01) + tau * variance.log())
    found = named(evaluate_consistency(sae, data(x)))
    assert found["consistency.temperature", ""].value == pytest.approx(tau, abs=1e-4)
    assert found["consistency.intercept", ""].value == pytest.approx(math.log(0.01), abs=1e-3)
    if tau:
        assert found["consistency.r2", ""].value == pytest.approx(1, abs=1e-4)
    points = [key for key in found if key[0] == "consistency.threshold"]
    assert len(points) == min(POINTS, F)
    assert found["spread.before", ""].reason == "nothing is scaled in this SAE"


def test_per_feature_gains_of_the_input_have_a_temperature_too(global_random_seed: int) -> None:
    scaling = {"kind": "variance", "tau": 0.4, "tying": "per_feature"}
    sae = built("relu", global_random_seed, scaling=scaling)
    found = named(evaluate_consistency(sae, data(rows(global_random_seed))))
    assert found["consistency.temperature", ""].value == pytest.approx(0.4, abs=1e-4)
    assert found["consistency.slope", ""].value == pytest.approx(-0.4, abs=1e-4)


@pytest.mark.parametrize("name", ["A1", "A2 static"])
def test_scaling_takes_off_its_share_of_the_spread(name: str, global_random_seed: int) -> None:
    sae, x = built(name, global_random_seed), rows(global_random_seed)
    tau = scalars_of(sae)["tau"].scalars()["tau"]
    if isinstance(sae.activation, TiedThreshold):  # v of exactly these rows
        z = torch.nn.functional.linear(sae.encoder_input(x), sae.W_enc, sae.b_enc)
        sae.activation.variance.copy_(z.var(0, correction=0))
    found = named(evaluate_consistency(sae, data(x)))
    before, after = (found[f"spread.{end}", ""].value for end in ("before", "after"))
    assert before is not None and before > 0.1
    assert after == pytest.approx(abs(1 - 2 * tau) * before, rel=1e-3, abs=1e-4)
    assert "learned feature by feature" in found["consistency.r2", ""].reason


def test_a_static_tied_threshold_is_encoded_the_same_from_a_bfloat16_selection(
    global_random_seed: int,
) -> None:
    x = rows(global_random_seed)
    for trace in ("own", "mean"):
        activation = {"kind": "tied_threshold", "theta": 1.0, "trace": trace}
        sae = built("A2 static", global_random_seed, activation=activation, precision="bfloat16")
        made = torch.cat([code.dense() for _, code in sae.codes(x)])
        torch.testing.assert_close(made, sae.encode(x), rtol=1e-5, atol=1e-5)
        assert made.any()
