"""Lifetimes by hand, survival curves with known answers, and resampling on a built example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.activations.stream import Batch
from saelab.parts.base import Reset
from saelab.parts.observers.lifetimes import BINS, Lifetimes
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training.loop import Cell
from saelab.training.optim import TrainConfig

D, F, N, STEPS = 8, 12, 64, 200
SETTINGS = {"base_steps": 10, "base_share": 0.0, "age_scale": 0.1, "most": 4.0}


def rows(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch_stream(seed, "lifetimes test"))


def cell(observers: list[Any], losses: tuple[Any, ...] = ("reconstruction",)) -> Cell:
    config = SAEConfig.parse(
        {
            "d_sae": F,
            "losses": list(losses),
            "controllers": [],
            "observers": observers,
            "precision": "float32",
        }
    )
    training = TrainConfig(tokens=STEPS * N, batch_size=N, lr=1e-3)
    return Cell("cell", config, training, rows(1000), 0)


def lifetimes(sae: SAE) -> Lifetimes:
    part = sae.observers["lifetimes"]
    assert isinstance(part, Lifetimes)
    return part


def watcher(**changes: Any) -> tuple[SAE, Lifetimes]:
    sae = cell([{"kind": "lifetimes", **SETTINGS, **changes}]).sae
    return sae, lifetimes(sae)


def silence(sae: SAE, latents: Tensor) -> None:
    with torch.no_grad():
        sae.b_enc[latents] = -1e3


@torch.no_grad()
def watch(sae: SAE, part: Lifetimes, first: int, last: int) -> None:
    """Steps [first, last) as the loop would show them, without training."""
    for step in range(first, last):
        p = sae(rows(step), step, STEPS)
        part.update(p)
        reset = part.observe(p)
        if reset is not None:
            sae.reset_latents(reset)


class TestCounting:
    def test_by_hand(self) -> None:
        sae, part = watcher(resample=False)
        watch(sae, part, 0, 5)
        assert (part.last_fired == 5).all() and not part.birth.any()
        firings = sum(sae(rows(step)).code.firings for step in range(5))
        assert torch.equal(part.firings, torch.as_tensor(firings))
        silence(sae, torch.tensor([3]))
        watch(sae, part, 5, 9)
        assert part.last_fired.tolist() == [5 if i == 3 else 9 for i in range(F)]
        assert part.now == 9 and not part.ended.any()

    def test_the_old_get_more_patience(self) -> None:
        """base (1 + age / (0.1 T)), at most 4 base; T = 200."""
        _, part = watcher(resample=False)
        part.birth[:4] = torch.tensor([0, 0, 0, 50])
        part.last_fired[:4] = torch.tensor([0, 20, 190, 60])
        assert part.patience()[:4].tolist() == [10, 20, 40, 15]

    def test_death_comes_after_patience(self) -> None:
        sae, part = watcher(resample=False)
        silence(sae, torch.tensor([2]))
        watch(sae, part, 0, 10)
        assert not part.ended.any()  # silent for 10 steps: not longer than its patience
        watch(sae, part, 10, 11)
        assert part.ended.nonzero().flatten().tolist() == [2]
        assert int(part.deaths.sum()) == 1 and int(part.deaths[11 * BINS // STEPS]) == 1
        with torch.no_grad():
            sae.b_enc[2] = 0
        watch(sae, part, 11, 13)
        assert part.scalars()["lifetime.revived"] == pytest.approx(1 / F)
        assert int(part.deaths.sum()) == 1

    def test_defaults_of_a_long_run(self) -> None:
        config = SAEConfig.parse({"d_sae": F, "observers": ["lifetimes"]})
        part = lifetimes(config.build(D, steps=20_000))
        assert part.base == 500 and lifetimes(config.build(D, steps=100)).base == 250


class TestSurvival:
    def test_no_death(self) -> None:
        sae, part = watcher(resample=False)
        watch(sae, part, 0, 20)
        survival, at_risk = part.survival()
        here = at_risk > 0
        assert (survival[here] == 1).all() and at_risk[0] == F and at_risk[BINS - 1] == 0

    def test_by_hand(self) -> None:
        """12 lives: 3 die in bin 10, 4 leave censored in bin 20, 1 dies in bin 30, 4 last to 50."""
        _, part = watcher(resample=False)
        part.now.fill_(50)
        part.ended[:8] = True
        part.deaths[10], part.censored[20], part.deaths[30] = 3, 4, 1
        survival, at_risk = part.survival()
        assert at_risk[[0, 10, 11, 20, 21, 30, 31, 50]].tolist() == [12, 12, 9, 9, 5, 5, 4, 4]
        assert float(survival[9]) == 1
        assert float(survival[10]) == float(survival[29]) == pytest.approx(9 / 12)
        assert float(survival[30]) == float(survival[50]) == pytest.approx(9 / 12 * 4 / 5)
        assert survival[51:].isnan().all()

    def test_a_reset_by_another_part_is_censored(self) -> None:
        sae, part = watcher(resample=False)
        watch(sae, part, 0, 6)
        sae.reset_latents(Reset(torch.tensor([1, 4]), torch.eye(D)[:2], 0.2))
        assert int(part.censored.sum()) == 2 and int(part.deaths.sum()) == 0
        assert part.birth.tolist() == [6 if i in (1, 4) else 0 for i in range(F)]
        assert part.resamplings.tolist() == [int(i in (1, 4)) for i in range(F)]
        _, at_risk = part.survival()
        assert int(at_risk[0]) == F + 2  # two lives ended, all latents live

    def test_each_life_is_counted_once(self) -> None:
        one = cell([{"kind": "lifetimes", **SETTINGS}])
        silence(one.sae, torch.tensor([0, 5]))
        for step in range(60):
            if step == 30:
                silence(one.sae, torch.tensor([5, 7]))
            one.step(Batch(rows(step), torch.arange(N)))
        part = lifetimes(one.sae)
        _, at_risk = part.survival()
        assert int(at_risk[0]) == F + int(part.resamplings.sum())
        assert int(part.deaths.sum()) == int(part.resamplings.sum()) >= 4


class TestResampling:
    def test_silent_latents_come_alive_again(self) -> None:
        one = cell([{"kind": "lifetimes", **SETTINGS}])
        dead = torch.tensor([0, 5, 9])
        silence(one.sae, dead)
        for step in range(30):
            one.step(Batch(rows(step), torch.arange(N)))
        part = lifetimes(one.sae)
        assert part.resamplings[dead].tolist() == [1, 1, 1] and part.resamplings.sum() == 3
        assert (part.last_fired[dead] > part.birth[dead]).all()
        assert (part.firings[dead] > 0).all() and not part.ended.any()
        assert one.log.last("lifetime.resamplings") == 3
        one.sae.eval()
        assert (one.sae.encode(rows(99))[:, dead] != 0).any(0).all()

    @pytest.mark.parametrize("kind", ["lifetimes", "resampling"])
    def test_directions_follow_the_error_and_moments_of_others_stay(self, kind: str) -> None:
        settings = SETTINGS if kind == "lifetimes" else {"every": 0.1, "patience": 10 * N}
        one = cell([{"kind": kind, **settings}])
        dead = torch.tensor([0, 5])
        silence(one.sae, dead)
        optimiser, found = one.optimiser, {}
        clear, reset = optimiser.clear, one.sae.reset_latents

        def spy(sae: SAE, latents: Tensor) -> None:
            found["latents"] = latents.clone()
            found["before"] = [
                {name: value.clone() for name, value in state.items()}
                for state in optimiser.moments().values()
            ]
            clear(sae, latents)
            found["after"] = list(optimiser.moments().values())

        def note(asked: Reset) -> None:
            found["reset"] = asked
            found["norms"] = one.sae.W_enc.detach().norm(dim=1)
            reset(asked)

        optimiser.clear = spy  # type: ignore[method-assign]
        one.sae.reset_latents = note  # type: ignore[method-assign]
        for step in range(STEPS):
            one.step(Batch(rows(step), torch.arange(N)))
            if found:
                break
        assert found["latents"].tolist() == dead.tolist()
        others = torch.ones(F, dtype=torch.bool)
        others[dead] = False
        for before, after in zip(found["before"], found["after"], strict=True):
            assert torch.equal(before["step"], after["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                if len(after[name]) == F:
                    assert not after[name][dead].any()
                    assert torch.equal(before[name][others], after[name][others])
                else:
                    assert torch.equal(before[name], after[name])
        asked = found["reset"]
        assert asked.encoder_norm == pytest.approx(0.2 * float(found["norms"][others].mean()))
        torch.testing.assert_close(asked.directions.norm(dim=1), torch.ones(2))
        centred = rows(step) / one.sae.scale - one.sae.b_dec.detach()
        cosine = torch.nn.functional.normalize(centred, dim=1) @ asked.directions.T
        assert (cosine.max(0).values > 0.99).all(), "no input has this direction"

    def test_none_in_the_last_fifth(self) -> None:
        one = cell([{"kind": "lifetimes", **SETTINGS}])
        for step in range(STEPS):
            if step == 155:
                silence(one.sae, torch.tensor([1]))
            one.step(Batch(rows(step), torch.arange(N)))
        part = lifetimes(one.sae)
        assert not part.resamplings[1] and bool(part.ended[1])

    def test_counting_alone_changes_nothing(self) -> None:
        plain, counted = cell([]), cell([{"kind": "lifetimes", **SETTINGS, "resample": False}])
        for one in (plain, counted):
            silence(one.sae, torch.tensor([0, 5]))
            for step in range(40):
                one.step(Batch(rows(step), torch.arange(N)))
        assert torch.equal(plain.sae.W_dec, counted.sae.W_dec)
        assert int(lifetimes(counted.sae).ended.sum()) == 2

    def test_parts_forget_latents_that_start_afresh(self) -> None:
        losses = ("reconstruction", "similarity", "auxk")
        one = cell([{"kind": "lifetimes", **SETTINGS}, "resampling"], losses)
        for step in range(5):
            one.step(Batch(rows(step), torch.arange(N)))
        terms = one.sae.loss_terms()
        terms["auxk"].get_buffer("silent").fill_(7)
        one.sae.reset_latents(Reset(torch.tensor([2]), torch.eye(D)[:1], 0.2))
        weight = terms["similarity"].moments.weight  # type: ignore[union-attr]
        assert (weight == 0).tolist() == [i == 2 for i in range(F)]
        assert not terms["similarity"].moments.ema[:, 2].any()  # type: ignore[union-attr]
        assert terms["auxk"].get_buffer("silent").tolist() == [0 if i == 2 else 7 for i in range(F)]
        assert int(one.sae.observers["resampling"].get_buffer("silent")[2]) == 0  # type: ignore[union-attr]
        assert float(terms["similarity"].loss(one.sae(rows(9), 50, STEPS)).detach()) >= 0
