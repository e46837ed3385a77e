"""Each balance on problems whose right answer is known, and its path judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.errors import SettingError
from saelab.parts.base import Dims
from saelab.parts.losses.similarity import SimilarityConfig
from saelab.parts.losses.similarity.balance import Balance, Terms, build_balance
from saelab.stats import moved_share, outside_share

LEARNED = ["descent", "uncertainty", "minimax", "gradnorm"]
STEPS = 2500

Problem = Callable[[int], Terms]


def always_larger(step: int) -> Terms:
    """S_act is three times S_w, and so is its gradient."""
    return Terms(act=1.5, weight=0.5, act_gradient=0.3, weight_gradient=0.1)


def equal(step: int) -> Terms:
    return Terms(1.0, 1.0, 0.2, 0.2)


def vanishing(step: int) -> Terms:
    """S_act halves every 50 steps."""
    left = 0.5 ** (step / 50)
    return Terms(left, 1.0, 0.2 * left, 0.2)


def path(balance: str, problem: Problem, steps: int = STEPS, **settings: Any) -> np.ndarray:
    """alpha at each step, with Adam at the default rate where it is learned on the loss."""
    config = SimilarityConfig.parse({"balance": balance, **settings})
    one: Balance = build_balance(config, 0)
    parameters = list(one.parameters())
    optimiser = torch.optim.Adam(parameters, lr=config.lr or 0) if parameters else None
    alphas = []
    for step in range(steps):
        terms = problem(step)
        act, weight = torch.tensor(terms.act), torch.tensor(terms.weight)
        alpha = one.alpha(step, steps)
        alphas.append(float(alpha.detach()))
        if optimiser is not None:
            loss = 0.03 * (alpha * act + (1 - alpha) * weight)
            objective = one.objective(act, weight)
            assert objective is None or float(objective.detach()) == 0
            optimiser.zero_grad()
            (loss if objective is None else loss + objective).backward()
            optimiser.step()
        with torch.no_grad():
            one.update(terms)
    return np.array(alphas)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


class TestKnownAnswers:
    def test_descent_runs_to_the_smaller_term(self) -> None:
        found = path("descent", always_larger)
        assert found[-1] < 0.02 and (np.diff(found) < 0).all()
        assert outside_share(found) > 0.1
        assert np.allclose(path("descent", equal), 0.5)
        assert path("descent", vanishing)[-1] > 0.98

    def test_uncertainty_weighs_by_the_inverse(self) -> None:
        """exp(-s) S + s is least at exp(-s) = 1 / S: alpha = S_w / (S_act + S_w)."""
        assert path("uncertainty", always_larger)[-1] == pytest.approx(0.25, abs=0.01)
        assert np.allclose(path("uncertainty", equal), 0.5)
        assert path("uncertainty", vanishing)[-1] > 0.98

    def test_minimax_weighs_the_larger_term(self) -> None:
        """It settles at sigmoid((S_act - S_w) / h)."""
        found = path("minimax", always_larger)
        assert found[-1] == pytest.approx(sigmoid(1.0 / 0.5), abs=1e-3)
        assert path("minimax", always_larger, entropy=2.0)[-1] == pytest.approx(sigmoid(0.5), 1e-3)
        assert np.allclose(path("minimax", equal), 0.5)
        assert path("minimax", vanishing)[-1] == pytest.approx(sigmoid(-1.0 / 0.5), abs=1e-3)
        assert outside_share(found) == 0

    def test_gradnorm_gives_equal_shares(self) -> None:
        alpha = path("gradnorm", always_larger)[-1]
        assert alpha * 0.3 == pytest.approx((1 - alpha) * 0.1, rel=1e-3)
        assert np.allclose(path("gradnorm", equal), 0.5)
        assert path("gradnorm", vanishing)[-1] > 0.98

    def test_gradnorm_skips_a_step_without_gradient(self) -> None:
        found = path("gradnorm", lambda step: Terms(1.0, 1.0, 0.0, 0.2))
        assert np.allclose(found, 0.5)

    @pytest.mark.parametrize("problem", [always_larger, equal, vanishing])
    def test_fixed_and_frozen_random_stay(self, problem: Problem) -> None:
        assert np.allclose(path("fixed", problem, alpha=0.3), 0.3)
        found = path("frozen_random", problem)
        assert (found == found[0]).all() and 0.02 <= found[0] <= 0.98
        config = SimilarityConfig.parse({"balance": "frozen_random"})
        drawn = {float(build_balance(config, seed).alpha(0, 1)) for seed in range(5)}
        assert len(drawn) == 5

    @pytest.mark.parametrize("balance", LEARNED)
    @pytest.mark.parametrize("alpha", [0.2, 0.5])
    def test_start(self, balance: str, alpha: float) -> None:
        assert path(balance, equal, 1, alpha=alpha)[0] == pytest.approx(alpha)
        one = build_balance(SimilarityConfig.parse({"balance": balance}), 0)
        state = [*one.parameters(), *one.buffers()]
        assert state and all(part.dtype == torch.float32 for part in state)


class TestReplay:
    def test_repeats_the_path(self) -> None:
        recorded = path("minimax", always_larger, 100)
        again = path("replay", equal, 100, path=tuple(recorded.tolist()))
        assert np.allclose(again, recorded)

    def test_shorter_and_longer_runs_keep_the_shares(self) -> None:
        recorded = (0.1, 0.2, 0.3, 0.4)
        assert path("replay", equal, 2, path=recorded) == pytest.approx([0.1, 0.3])
        assert path("replay", equal, 8, path=recorded)[::2] == pytest.approx(recorded)

    def test_from_a_file_the_numbers_become_settings(self, tmp_path: Path) -> None:
        (tmp_path / "alpha.json").write_text(json.dumps([0.25, 0.75]))
        named = SimilarityConfig.parse({"balance": "replay", "path": str(tmp_path / "alpha.json")})
        assert named.path == (0.25, 0.75)
        assert (
            named.digest()
            == SimilarityConfig.parse({"balance": "replay", "path": [0.25, 0.75]}).digest()
        )

    def test_refused(self) -> None:
        with pytest.raises(SettingError, match="alphas of another run"):
            SimilarityConfig.parse({"balance": "replay"}).build(Dims(4, 8))
        with pytest.raises(SettingError, match="path"):
            SimilarityConfig.parse({"balance": "replay", "path": [0.5, 1.5]})


@pytest.mark.parametrize("balance", LEARNED)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_learned_alpha_starts_inside(balance: str, alpha: float) -> None:
    with pytest.raises(SettingError, match="inside"):
        SimilarityConfig.parse({"balance": balance, "alpha": alpha}).build(Dims(4, 8))


def test_a_penalty_that_never_acts_is_refused() -> None:
    with pytest.raises(SettingError, match="never act"):
        SimilarityConfig.parse({"warmup": 0.95, "window": 0.05}).build(Dims(4, 8))


class TestPaths:
    def test_collapse(self) -> None:
        inside, low = np.full(90, 0.5), np.full(10, 0.01)
        assert outside_share(np.r_[inside, low]) == pytest.approx(0.1)
        assert outside_share(np.r_[inside, 1 - low, low]) == pytest.approx(20 / 110)
        assert outside_share([0.02, 0.98]) == 0

    def test_inertia(self) -> None:
        """A balance that stays is told from one that runs away."""
        logits = np.linspace(0, 0.4, 100)
        assert moved_share(1 / (1 + np.exp(-logits)), 4.0) == pytest.approx(0.1)
        assert moved_share(np.full(9, 0.7), 4.0) == 0
        assert moved_share(path("descent", equal), STEPS * 1e-2) < 0.05
        assert moved_share(path("descent", always_larger), STEPS * 1e-2) > 0.2
