"""The similarity penalty in training: when it acts, what it logs, what it costs in memory, and that
it can't be paid by shrinking."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from saelab.data.activations.stream import Batch
from saelab.launch.cell_facts import part_facts
from saelab.parts.losses.similarity import LEARNED, Similarity
from saelab.parts.losses.similarity.literal import SimilarityLiteral
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig
from saelab.verdict.gate import gate

D, F, N, STEPS = 16, 64, 128, 60
#: Steps before the penalty: 15% of warm-up and 5% of window.
START = 12


def rows(seed: int, step: int, n: int = N, d: int = D) -> Tensor:
    """Sparse sums of 3 d directions that all seeds share."""
    features = normalize(torch.randn(3 * d, d, generator=torch_stream(7, "features")), dim=1)
    draw = torch_stream(seed, "similarity rows", step)
    chosen = torch.rand(n, 3 * d, generator=draw) < 0.05
    return (chosen * torch.rand(n, 3 * d, generator=draw)) @ features


def cell(penalty: dict[str, Any] | None, steps: int = STEPS, **changes: Any) -> Cell:
    losses: list[Any] = ["reconstruction", {"kind": "l1", "coefficient": 0.02}]
    if penalty is not None:
        losses.append({"kind": "similarity", "k": 20, **penalty})
    data = {"d_sae": F, "losses": losses, "controllers": [], "precision": "float32"}
    training = TrainConfig(tokens=steps * N, batch_size=N, lr=3e-3)
    return Cell("cell", SAEConfig.parse(data | changes), training, rows(0, -1, 512), 0)


def run(one: Cell, steps: int, seed: int = 0) -> Cell:
    for _ in range(steps):
        one.step(Batch(rows(seed, one.steps_done), torch.arange(N)))
    return one


def term_of(one: Cell) -> Similarity:
    term = one.sae.loss_terms()["similarity"]
    assert isinstance(term, Similarity)
    return term


def acting(**penalty: Any) -> Cell:
    """A cell in which the penalty has acted for eight steps."""
    return run(cell(penalty), START + 8)


class TestReferenceWindow:
    def test_nothing_acts_before_its_end(self) -> None:
        plain, penalised = cell(None), cell({"coefficient": 0.3})
        run(plain, START), run(penalised, START)
        assert torch.equal(plain.sae.W_dec, penalised.sae.W_dec)
        assert torch.equal(plain.sae.W_enc, penalised.sae.W_enc)
        run(plain, 1), run(penalised, 1)
        assert not torch.equal(plain.sae.W_dec, penalised.sae.W_dec)
        assert not torch.equal(plain.sae.W_enc, penalised.sae.W_enc)

    def test_norm_is_the_mean_over_the_window_and_stays(self) -> None:
        one = run(cell({}), START)
        act, weight, steps = term_of(one).window.tolist()
        assert steps == 3
        for total, name in ((act, "similarity.code"), (weight, "similarity.decoder")):
            window = one.log.columns[name][START - 3 : START]
            assert total / 3 == pytest.approx(float(window.mean()), rel=1e-5)
        run(one, 10)
        assert term_of(one).window.tolist() == [act, weight, steps]

    @pytest.mark.parametrize("norm", ["reference", "running", "none"])
    def test_value(self, norm: str) -> None:
        """The module's equation, with the constants of each norm."""
        one = acting(norm=norm, alpha=0.3, coefficient=0.2)
        names = ("similarity.code", "similarity.decoder")
        terms = [one.log.columns[name].astype(float) for name in names]
        before = one.steps_done - 1
        if norm == "reference":
            norms = [float(path[START - 3 : START].mean()) for path in terms]
        elif norm == "running":
            weights = 0.99 ** torch.arange(before - 1, -1, -1).double().numpy()
            norms = [float((weights * path[:before]).sum() / weights.sum()) for path in terms]
        else:
            norms = [1.0, 1.0]
        norms = [max(norm, 1e-4) for norm in norms]
        wanted = 0.2 * (0.3 * terms[0][before] / norms[0] + 0.7 * terms[1][before] / norms[1])
        assert one.log.last("loss.similarity") == pytest.approx(wanted, rel=1e-4)


class TestShares:
    @pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
    def test_against_autograd(self, activation: str) -> None:
        """The logged norms are those of the penalty's own gradient, at W_enc and at W_dec."""
        kind = {"kind": activation} if activation != "batchtopk" else {"kind": activation, "k": 6}
        one = run(cell({"coefficient": 0.2}, activation=kind), START + 8)
        sae, x = one.sae, rows(0, one.steps_done)
        p = sae(x, one.steps_done, STEPS)
        losses = {name: term.loss(p) for name, term in sae.loss_terms().items()}
        weights = (sae.W_enc, sae.W_dec)
        inside = torch.autograd.grad(losses["similarity"], weights, retain_graph=True)
        whole = torch.autograd.grad(torch.stack(list(losses.values())).sum(), weights)
        run(one, 1)
        for name, part, total in zip(("code", "decoder"), inside, whole, strict=True):
            wanted = float(part.norm() / total.norm())
            assert one.log.last(f"penalty_share.{name}") == pytest.approx(wanted, rel=1e-3)
        both = math.hypot(*(float(g.norm()) for g in inside))
        total = math.hypot(*(float(g.norm()) for g in whole))
        assert one.log.last("penalty_share") == pytest.approx(both / total, rel=1e-3)

    def test_each_step_is_logged(self) -> None:
        one = acting()
        share = one.log.columns["penalty_share"][: one.log.length]
        assert (share[:START] == 0).all() and (share[START:] > 0).all()


class TestBalance:
    @pytest.mark.parametrize("balance", ["fixed", "frozen_random", *LEARNED])
    def test_total_strength_is_the_same(self, balance: str) -> None:
        """Where both terms are at their norm the penalty is its coefficient, whatever alpha is."""
        one = acting(balance=balance, coefficient=0.2)
        term = term_of(one)
        p = one.sae(rows(0, 99), one.steps_done, STEPS)
        term.loss(p)
        look = p.results[term].numbers()
        term.window.copy_(torch.tensor([look.act, look.weight, 1.0]))
        assert float(term.loss(p).detach()) == pytest.approx(0.2, rel=1e-5)

    @pytest.mark.parametrize("balance", LEARNED)
    def test_alpha_moves_once_the_penalty_acts(self, balance: str) -> None:
        one = acting(balance=balance, alpha=0.4)
        path = one.log.columns["alpha"][: one.log.length]
        assert path[:START] == pytest.approx(0.4) and abs(path[-1] - 0.4) > 1e-3

    @pytest.mark.parametrize("balance", ["descent", "uncertainty"])
    def test_own_group(self, balance: str) -> None:
        one = cell({"balance": balance, "lr": 0.05})
        groups = {g.name: g for g in one.optimiser.groups}
        own = groups["Similarity"].parameters
        assert own == list(term_of(one).balance.parameters()) and groups["Similarity"].lr == 0.05
        assert all(parameter.dtype == torch.float32 for parameter in own)

    def test_replay_repeats_another_seeds_path(self) -> None:
        path = run(cell({"balance": "minimax"}), STEPS).log.columns["alpha"]
        again = run(cell({"balance": "replay", "path": path.tolist()}), STEPS, seed=1)
        assert (again.log.columns["alpha"] == path).all()


class TestFacts:
    """What the gate hears of a balance."""

    def test_a_runaway_is_called_collapsed(self) -> None:
        one = run(cell({"balance": "descent", "lr": 0.5, "alpha": 0.4}), STEPS)
        facts = part_facts(one)
        assert facts["alpha_outside_share"] > 0.1 and facts["scalar_reach.alpha"] > 0.05
        findings = {f.check: f.subject for f in gate(facts).findings}
        assert findings["collapsed_balance"] == "alpha" and "inert_scalar" not in findings

    def test_an_inert_alpha(self) -> None:
        """A balance that starts where it settles has a rate and no use for it."""
        one = run(cell({"balance": "uncertainty", "warmup": 0.9}), STEPS)
        facts = part_facts(one)
        assert facts["alpha_outside_share"] == 0 and facts["scalar_reach.alpha"] < 0.05
        assert "inert_scalar" in {f.check for f in gate(facts).findings}

    def test_share_while_it_acts(self) -> None:
        one = acting()
        share = one.log.columns["penalty_share"][START : one.log.length]
        assert part_facts(one) == {"penalty_share": pytest.approx(float(share.mean()))}
        assert part_facts(run(cell(None), 3)) == {}


@pytest.mark.parametrize("statistics", ["per_latent", "per_product", "batch"])
@pytest.mark.parametrize("balance", ["descent", "gradnorm"])
def test_state_is_restored_exactly(statistics: str, balance: str) -> None:
    one = acting(statistics=statistics, balance=balance)
    fresh = one.sae.config.build(D, STEPS, 0)
    fresh.load_state_dict({name: value.clone() for name, value in one.sae.state_dict().items()})
    values = []
    for sae in (one.sae, fresh):
        p = sae(rows(0, 50), one.steps_done, STEPS)
        term = sae.loss_terms()["similarity"]
        values.append(float(term.loss(p).detach()))
        with torch.no_grad():
            term.update(p)
    assert values[0] == values[1] and values[0] > 0
    for a, b in zip(one.sae.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_statistics_are_bias_corrected() -> None:
    """After few updates the running mean and std are those of the rows seen, not of zeros."""
    one = run(cell({}), 3)
    moments = term_of(one).moments
    weights = torch.tensor([0.99**2, 0.99, 1.0])
    fresh = cell({})
    sums = []
    for _ in range(3):
        with torch.no_grad():
            sums.append(torch.stack(fresh.sae(rows(0, fresh.steps_done)).code.sums) / N)
        run(fresh, 1)
    mean = (torch.stack(sums) * weights[:, None, None]).sum(0) / weights.sum()
    found, std = moments.standard(one.sae(rows(0, 9)).code, N)
    torch.testing.assert_close(found, mean[0])
    torch.testing.assert_close(std, (mean[1] - mean[0] ** 2).sqrt())


def test_literal_by_hand() -> None:
    """Its value from dense matrices, at the first step (the batch's own moments) and later."""
    term = {"kind": "similarity_literal", "coefficient": 0.2, "alpha": 0.3}
    one = cell(None)
    one = Cell("c", one.sae.config.patched({"losses+": term}), one.config, rows(0, -1, 512), 0)
    for steps in (0, 5):
        run(one, steps)
        p = one.sae(rows(0, 30), one.steps_done, STEPS)
        part, w = one.sae.loss_terms()["similarity_literal"], one.sae.W_enc.detach()
        assert isinstance(part, SimilarityLiteral)
        f, norms = p.code.dense().detach(), w.norm(dim=1)
        if steps:
            mean, square = part.moments.ema / part.moments.weight
            mu, mu2 = part.norms / part.gathered
        else:
            mean, square, mu, mu2 = f.mean(0), f.square().mean(0), norms.mean(), norms[0] ** 2
        sigma = torch.maximum((mu2 - mu**2).clamp_min(0).sqrt(), 1e-3 * mu)
        y = ((f - mean) / (square - mean**2).sqrt()) @ w
        uneven = ((norms - mu) / sigma).square().mean()
        wanted = 0.2 * (0.3 * y.square().mean() + 0.7 * uneven)
        loss = part.loss(p)
        assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-3)
        (gradient,) = torch.autograd.grad(loss, one.sae.W_enc)
        assert gradient.isfinite().all() and gradient.any(1).all()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest(d_sae: int, form: str) -> int:
    penalty = {"chunk": 32, "form": form}
    one = run(cell(penalty, d_sae=d_sae, initial_l0=8), START)
    p: Any = one.sae(rows(0, START), START, STEPS)
    with Largest() as seen:
        term_of(one).loss(p).backward()
    return seen.elements


@pytest.mark.parametrize("form", ["max", "mean"])
def test_memory_is_linear_in_the_number_of_latents(form: str) -> None:
    """No tensor is larger than the decoder, or than the chosen columns of the batch."""
    for d_sae in (512, 2048):
        assert largest(d_sae, form) <= max(d_sae * D, N * 32)


# ---- the penalty can't be paid by shrinking ------------------------------------------------------


def trained(penalty: dict[str, Any] | None) -> tuple[float, float, float]:
    """L0, share of dead latents and FVU on fresh rows, at 10 times the default strength."""
    if penalty is not None:
        penalty = {"coefficient": 0.3, "k": 40, **penalty}
    sae = run(cell(penalty, 400, initial_l0=8), 400).sae.eval()
    x = rows(1, 0, 4096)
    f = sae.encode(x)
    fvu = float((sae.decode(f) - x).square().sum() / (x - x.mean(0)).square().sum())
    l0 = float((f != 0).sum(1).float().mean())
    return l0, float((~(f != 0).any(0)).float().mean()), fvu


def test_scale_free_survives_what_collapses_the_constant_gradient() -> None:
    """S_act alone over its running mean, with m and s as constants, shrinks the code away."""
    alone = {"alpha": 1.0, "norm": "running"}
    l0, _, _ = trained(None)
    kept, dead, fvu = trained({"alpha": 1.0})
    assert dead == 0 and kept > l0 / 2
    shrunk, _, lost = trained({**alone, "gradient": "constant"})
    assert shrunk < l0 / 3 and lost > 3 * fvu
    free, _, free_fvu = trained(alone)
    assert free > 1.2 * shrunk and free_fvu < lost


def test_no_mass_death_at_ten_times_the_default() -> None:
    l0, before, _ = trained(None)
    kept, dead, _ = trained({})
    assert before == dead == 0 and kept > l0 / 2
