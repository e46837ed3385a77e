"""Idea A2 against a token-by-token reference that shares no code with it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.data.activations.stream import Batch, starts_of
from saelab.errors import SettingError
from saelab.kernels import eager, native
from saelab.parts.activations.tied_threshold import (
    TiedThreshold,
    TiedThresholdConfig,
    TracedSupport,
)
from saelab.parts.base import Dims, Form, Refusal
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream

D_IN, D_SAE = 6, 24
MOVING: dict[str, Any] = {
    "beta": -0.3,
    "gamma": 0.2,
    "rho": 0.7,
    "T": 0.4,
    "temperature": "learned",
    "learned": ("theta", "beta", "gamma", "rho", "T"),
}
LENGTHS = (1, 9, 4, 17)


def starts_from(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def part(seed: int = 0, **changes: Any) -> TiedThreshold:
    """A part in float64 with statistics of unlike latents."""
    made = TiedThresholdConfig.parse({**MOVING, **changes}).build(Dims(D_IN, D_SAE)).double()
    generator = torch_stream(seed, "statistics")
    made.variance.copy_(torch.rand(D_SAE, generator=generator).double() * 3 + 0.2)
    made.rest.copy_(torch.rand(D_SAE, generator=generator).double() * 0.5 + 0.01)
    return made


def some_z(seed: int, rows: int) -> Tensor:
    return torch.randn(rows, D_SAE, generator=torch_stream(seed, "z")).double()


class Reference:
    """The equations of the part's module, one token and one latent at a time."""

    def __init__(self, p: TiedThreshold) -> None:
        c = p.config
        self.theta, self.beta = p.log_theta.exp().item(), p.beta.item()
        self.gamma, self.T = p.gamma.item(), p.T.item()
        self.tau = math.log1p(math.exp(p.temperature.raw_tau.item()))
        self.variance, self.rest = p.variance.tolist(), p.rest.tolist()
        self.rho_0, self.most = p.rho_0.item(), 1 - 4 / c.context
        logs = [math.log(v) / 2 for v in self.variance]
        self.centre = math.exp(sum(logs) / len(logs))

    def unit(self, i: int) -> float:
        sd = math.sqrt(self.variance[i])
        return self.centre ** (1 - 2 * self.tau) * sd ** (2 * self.tau)

    def decay(self, i: int) -> float:
        x = self.rho_0 - self.T * math.log(self.variance[i] / self.centre**2)
        return min(1 / (1 + math.exp(-x)), self.most)

    def thresholds(self, z: list[list[float]], driver: list[list[float]]) -> list[list[float]]:
        found = []
        a = [0.0] * D_SAE
        for t in range(len(z)):
            row = []
            for i in range(D_SAE):
                level = self.theta + self.gamma * self.rest[i] + self.beta * a[i]
                row.append(self.unit(i) * max(level, self.theta / 4))
            found.append(row)
            for i in range(D_SAE):
                centred = 0.0
                if t < len(driver):
                    fires = driver[t][i] > self.theta * self.unit(i)
                    r = driver[t][i] / math.sqrt(self.variance[i]) if fires else 0.0
                    centred = r - self.rest[i]
                a[i] = self.decay(i) * a[i] + (1 - self.decay(i)) * centred
        return found


def reference_thresholds(p: TiedThreshold, z: Tensor, starts: Tensor, shift: int = 0) -> Tensor:
    reference, cuts = Reference(p), starts.tolist()
    segments = [z[low:high].tolist() for low, high in itertools.pairwise(cuts)]
    rows = []
    for g, segment in enumerate(segments):
        rows += reference.thresholds(segment, segments[(g + shift) % len(segments)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("trace", "shift"), [("own", 0), ("permuted", 2)])
def test_forward_is_the_reference(trace: str, shift: int, global_random_seed: int) -> None:
    p, starts = part(global_random_seed, trace=trace).eval(), starts_from(LENGTHS)
    z = some_z(global_random_seed, int(starts[-1]))
    wanted = reference_thresholds(p, z, starts, shift)
    f = p.dense(z, starts)
    assert (f - z * (z > wanted)).abs().max() < 1e-9
    assert 0.1 < (f != 0).double().mean() < 0.9
    support = p.support(z, starts)
    assert isinstance(support, TracedSupport)
    sparse = (
        torch.zeros_like(z)
        .flatten()
        .index_put((support.flat,), p.at(z.flatten()[support.flat], support))
    )
    assert (sparse.view_as(z) - f).abs().max() < 1e-9


def test_gradients_are_the_stated_ones(global_random_seed: int) -> None:
    p, starts = part(global_random_seed), starts_from(LENGTHS)
    rows = int(starts[-1])
    z = some_z(global_random_seed, rows).requires_grad_()
    g = torch.randn(rows, D_SAE, generator=torch_stream(global_random_seed, "g")).double()
    (p.dense(z, starts) * g).sum().backward()
    with torch.no_grad():
        thr = reference_thresholds(p, z, starts)
        fires = z > thr
        width = p.unit() * p.config.bandwidth
        kernel = ((z - thr).abs() < width / 2) * (-thr / width)
        plain = kernel * g
        midway = kernel * (g + 2 / (rows * D_IN) * (thr / 2 - z * fires))
    assert z.grad is not None and torch.equal(z.grad, g * fires)
    names = ("log_theta", "gamma", "beta", "rho_0", "T")
    for name in names:  # d thr / d scalar by central differences of the reference
        parameter, step = getattr(p, name), 1e-6
        ends = []
        for sign in (1, -1):
            moved = part(global_random_seed)
            moved.load_state_dict(p.state_dict())
            with torch.no_grad():
                getattr(moved, name).add_(sign * step)
            # what fires stays as it was: the drive is a constant for the gradient
            ends.append(_with_drive_of(p, moved, z.detach(), starts))
        slope = (ends[0] - ends[1]) / (2 * step)
        wanted = float((slope * (plain if name in ("log_theta", "gamma") else midway)).sum())
        assert float(parameter.grad) == pytest.approx(wanted, rel=1e-5, abs=1e-8), name
    assert p.temperature.raw_tau.grad is not None and p.temperature.raw_tau.grad != 0


def _with_drive_of(p: TiedThreshold, moved: TiedThreshold, z: Tensor, starts: Tensor) -> Tensor:
    """Thresholds of `moved` with the trace's drive that `p` has."""
    rule = p.rule()
    unit, theta = moved.unit().detach(), moved.log_theta.detach().exp()
    a, _ = eager.trace(
        z, rule._replace(rho=moved.decay().detach()), starts, torch.arange(len(starts) - 1)
    )
    level = theta + moved.gamma.detach() * moved.rest + moved.beta.detach() * a
    return unit * torch.maximum(level, theta / 4)


def test_trace_derivative_is_exact(global_random_seed: int) -> None:
    p, starts = part(global_random_seed), starts_from(LENGTHS)
    z, rule = some_z(global_random_seed, int(starts[-1])), p.rule()
    drivers = torch.tensor([3, 2, 0, 1])

    def a(rho: Tensor) -> Tensor:
        return _differentiable_trace(z, rule._replace(rho=rho), starts, drivers)

    rho = rule.rho.clone().requires_grad_()
    assert torch.autograd.gradcheck(a, (rho,))
    found, slope = eager.trace(z, rule, starts, drivers)
    assert (found - a(rho)).abs().max() < 1e-12
    weight = torch.randn(z.shape, generator=torch_stream(1, "w")).double()
    (a(rho) * weight).sum().backward()
    assert rho.grad is not None and (rho.grad - (slope * weight).sum(0)).abs().max() < 1e-9


def _differentiable_trace(z: Tensor, rule: Any, starts: Tensor, drivers: Tensor) -> Tensor:
    rows, cuts = [], starts.tolist()
    for g, driver in enumerate(drivers.tolist()):
        a = torch.zeros(D_SAE, dtype=torch.float64)
        for t in range(cuts[g + 1] - cuts[g]):
            rows.append(a)
            r = torch.zeros(D_SAE, dtype=torch.float64)
            if cuts[driver] + t < cuts[driver + 1]:
                r = eager.drive(z[cuts[driver] + t], rule) - rule.rest
            a = rule.rho * a + (1 - rule.rho) * r
    return torch.stack(rows)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    d_sae=st.sampled_from([3, 64, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shift=st.integers(0, 5),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
@pytest.mark.skipif(native.library() is None, reason="no compiler here")
def test_native_equals_eager(
    lengths: list[int], d_sae: int, dtype: torch.dtype, shift: int, threads: int, seed: int
) -> None:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows, m = int(starts[-1]), len(lengths)
    generator = torch_stream(seed, "native")
    z = torch.randn(rows, d_sae, generator=generator).to(dtype)
    rule = eager.Adaptation(*torch.rand(8, d_sae, generator=generator).unbind())
    drivers = (torch.arange(m) + shift) % m
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.trace_above(z, rule, starts, drivers, z.numel())
    finally:
        torch.set_num_threads(before)
    wanted = eager.trace_above(z, rule, starts, drivers, z.numel())
    assert found is not None and wanted is not None
    if found[1].numel() == wanted[1].numel():  # a value on the edge of its threshold may differ
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        for got, right in zip(found[2:], wanted[2:], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    else:
        assert abs(found[1].numel() - wanted[1].numel()) <= 1
    if wanted[1].numel():
        assert native.trace_above(z, rule, starts, drivers, found[1].numel() - 1) is None


def test_a_segment_starts_afresh(global_random_seed: int) -> None:
    p, starts = part(global_random_seed), starts_from(LENGTHS)
    z = some_z(global_random_seed, int(starts[-1]))
    whole = p.dense(z, starts)
    for low, high in itertools.pairwise(starts.tolist()):
        alone = p.dense(z[low:high], torch.tensor([0, high - low]))
        assert torch.equal(alone, whole[low:high])
    joined = p.dense(z, torch.tensor([0, len(z)]))
    assert not torch.equal(joined, whole)


def test_segments_end_at_what_does_not_count() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    x = torch.arange(18.0).view(3, 6, 1)
    rows = Batch(x, torch.arange(6).expand(3, 6), mask).rows()
    assert rows.x.flatten().tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 17]
    assert rows.starts is not None and rows.starts.tolist() == [0, 2, 4, 8, 9]
    early = rows.within(1, 5)
    assert early.positions.tolist() == [1, 2, 4, 1, 2, 3]
    assert early.starts is not None and early.starts.tolist() == [0, 2, 3, 6]
    assert starts_of(torch.tensor([3, 3, 7])).tolist() == [0, 2, 3]


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_scale_equivariant(factor: float, global_random_seed: int) -> None:
    p, starts = part(global_random_seed), starts_from(LENGTHS)
    z = some_z(global_random_seed, int(starts[-1]))
    f = p.dense(z, starts)
    p.variance.mul_(factor**2)
    scaled = p.dense(factor * z, starts)
    assert (scaled - factor * f).abs().max() < 1e-9 * factor
    unit = p.unit().detach()
    p.variance.div_(factor**2)
    torch.testing.assert_close(unit, factor * p.unit().detach())


def sae_of(**activation: Any) -> SAE:
    config = SAEConfig.parse(
        {
            "d_sae": 64,
            "activation": {"kind": "tied_threshold", **activation},
            "losses": ["reconstruction"],
            "controllers": [],
            "constraints": ["unit_norm"],
            "initial_l0": 8,
            "precision": "float32",
        }
    )
    return config.build(16, 10, 0)


def rows_of(seed: int, n: int = 300) -> Tensor:
    x = torch.randn(n, 16, generator=torch_stream(seed, "rows"))
    return x * torch.linspace(0.2, 2, 16)


def test_activations_times_c_change_codes_by_c() -> None:
    found = []
    for factor in (1.0, 8.0):
        sae, starts = sae_of(**MOVING), starts_from((100, 80, 120))
        sae.initialise(factor * rows_of(0), 0)
        f = sae.eval().encode(factor * rows_of(1), starts)
        found.append((f, sae.decode(f) / factor))
    assert torch.equal(found[0][0] != 0, found[1][0] != 0)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_without_beta_it_is_a_jumprelu() -> None:
    sae = sae_of(gamma=0.3, learned=("theta", "gamma"))
    sae.initialise(rows_of(0), 0)
    sae.eval()
    assert not sae.needs_contexts
    x = rows_of(1)
    form, w = sae.activation.export(), sae.fold()
    assert isinstance(form, Form)
    z = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    expected = form.code(z)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-4, atol=1e-4)
    l0 = float((sae.encode(rows_of(0)) != 0).sum(1).float().mean())
    assert l0 == pytest.approx(8, rel=0.15)


def test_mean_trace_is_the_static_twin() -> None:
    moving = part(trace="mean")
    assert moving.is_static and not moving.beta.requires_grad
    z, starts = some_z(0, 31), starts_from(LENGTHS)
    still = part()
    with torch.no_grad():
        still.beta.zero_()
    assert torch.equal(moving.dense(z), still.dense(z, starts))


def test_codes_equal_encode_in_blocks_of_whole_segments() -> None:
    sae = sae_of(**MOVING)
    sae.initialise(rows_of(0), 0)
    sae.eval()
    x, lengths = rows_of(2, 5000), (1500, 30, 900, 1, 2569)
    starts = starts_from(lengths)
    whole = sae.encode(x, starts)
    parts = list(sae.codes(x, starts))
    assert parts[0][0].start == 0 and parts[-1][0].stop == 5000
    assert len(parts) > 1
    assert {here.start for here, _ in parts} <= set(starts.tolist())
    together = torch.cat([code.dense() for _, code in parts])
    torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-4)
    sums = sae.pooled(x, starts[1:4])
    torch.testing.assert_close(sums[0], whole[1500:1530].sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"trace": "mean", "gamma": 0.3}])
def test_static_codes_after_a_bfloat16_selection(changes: dict[str, Any]) -> None:
    sae = sae_of(**{"learned": ("theta", "gamma"), **changes}).eval()
    sae.initialise(rows_of(0), 0)
    x = rows_of(1)
    for precision in ("float32", "bfloat16"):
        config = sae.config.patched({"precision": precision})
        other = config.build(sae.d_in).eval()
        other.load_state_dict(sae.state_dict())
        found = torch.cat([code.dense() for _, code in other.codes(x)])
        assert 0 < int((found != 0).sum()) < found.numel()
        torch.testing.assert_close(found, sae.encode(x), rtol=1e-4, atol=1e-4)


def test_it_says_what_it_needs() -> None:
    sae = sae_of(**MOVING)
    sae.initialise(rows_of(0), 0)
    with pytest.raises(SettingError, match="context"):
        sae.eval().encode(rows_of(1))
    refusal = sae.activation.export()
    assert isinstance(refusal, Refusal) and "follows the context" in refusal.reason
    with pytest.raises(SettingError, match="unit_norm"):
        SAEConfig.parse({"activation": "tied_threshold", "controllers": [], "losses": []}).build(4)


def test_statistics_are_running_means() -> None:
    sae, starts = sae_of(**MOVING, momentum=0.75), starts_from((100, 200))
    sae.initialise(rows_of(0), 0)
    sae.train()
    activation = sae.activation
    assert isinstance(activation, TiedThreshold)
    before, rest, rule = activation.variance.clone(), activation.rest.clone(), activation.rule()
    p = sae(rows_of(1), 0, 10, starts)
    with torch.no_grad():
        z = p.u @ sae.W_enc.T + sae.b_enc
        activation.update(p)
    torch.testing.assert_close(
        activation.variance, before.lerp(z.var(0, correction=0), 0.25), rtol=1e-3, atol=1e-4
    )
    drive = torch.where(z > rule.fire, z * rule.per_sd, 0.0).mean(0)
    torch.testing.assert_close(activation.rest, rest.lerp(drive, 0.25), rtol=1e-3, atol=1e-5)
    activation.forget(torch.tensor([3]))
    assert activation.rest[3] == pytest.approx(float(activation.rest.mean()), rel=0.05)


def test_one_segment_has_nobody_to_permute_with() -> None:
    p, z = part(trace="permuted"), some_z(0, 20)
    alone = p.dense(z, torch.tensor([0, 20]))
    with torch.no_grad():
        p.beta.zero_()
    assert torch.equal(alone, p.dense(z, torch.tensor([0, 20])))
