"""The forest of correlated features: its process, its memory, and that it repeats bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.data.activations.stream import batches
from saelab.data.synthetic import trees
from saelab.data.synthetic.chains import (
    SyntheticConfig,
    SyntheticSource,
    generate,
    parse_process,
    truth_of,
)
from saelab.data.synthetic.trees import ForestConfig, ForestTruth, push_apart
from saelab.errors import SettingError
from saelab.evals.dictionary_matching import random_directions
from saelab.evals.known_features import evaluate_truth
from saelab.launch.synthetic.study import SyntheticStudyConfig, read_study

#: Standard errors within which a mean must lie; a few hundred are looked at.
SIGMAS = 5.5
SHIPPED = Path(__file__).parents[2] / "configs" / "synthetic" / "synth-sae-bench-16k.toml"


def config(**changes: Any) -> ForestConfig:
    """2 trees of 1 + 3 + 9 features and 14 that stand alone."""
    small = {"d": 8, "features": 40, "highest": 0.4, "lowest": 0.02, "roots": 2, "children": 3}
    rest = {"depth": 2, "apart_steps": 0, "positions": 4, "sd_sd": 0.1}
    return ForestConfig.parse({**small, **rest, **changes})


def drawn(made: ForestConfig, seed: int, contexts: int = 8000) -> tuple[ForestTruth, Tensor]:
    """The truth and its codes [rows, features]."""
    truth = ForestTruth(made, seed, "train", contexts)
    return truth, truth.codes().flatten(0, 1)


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    samples = samples.double()
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - expected).abs() <= SIGMAS * error).all())


def test_parents_go_level_by_level() -> None:
    parent = config().parent_of.tolist()
    assert parent[:2] == [0, 1]
    assert parent[2:8] == [0, 0, 0, 1, 1, 1]
    assert parent[8:11] == [2, 2, 2] and parent[25] == 7
    assert parent[26:] == list(range(26, 40))
    assert config(depth=0).parent_of.tolist() == list(range(40))


def test_features_without_parents_fire_as_often_as_asked(global_random_seed: int) -> None:
    made = config()
    _, codes = drawn(made, global_random_seed)
    alone = [0, 1, *range(26, 40)]
    assert_mean((codes[:, alone] != 0), made.probabilities[alone])


def test_without_correlations_children_fire_with_their_parent_alone_and_one_at_a_time(
    global_random_seed: int,
) -> None:
    made = config(strength=0.0, sd_mean=0.0, sd_sd=0.0)
    _, codes = drawn(made, global_random_seed)
    on, parent = codes != 0, made.parent_of
    children = torch.arange(2, 26)
    assert not bool((on[:, children] & ~on[:, parent[children]]).any())
    families = on[:, children].view(len(on), -1, 3)
    assert int(families.sum(2).max()) == 1
    # of the siblings that fire at once, one stays: child i of i, j, k that fire with q each is on
    # with q_i (1 - (q_j + q_k) / 2 + q_j q_k / 3) where its parent is
    q = made.unsilenced_probabilities[children].view(-1, 3)
    j, k = q.roll(1, 1), q.roll(2, 1)
    given = (q * (1 - (j + k) / 2 + j * k / 3)).flatten()
    excess = on[:, children].double() - given * on[:, parent[children]].double()
    assert_mean(excess, torch.zeros(24))


def test_values_follow_those_of_their_parents(global_random_seed: int) -> None:
    truth, codes = drawn(config(sd_mean=0.0, sd_sd=0.0), global_random_seed)
    own = truth.magnitudes.expand_as(codes)[codes != 0]
    torch.testing.assert_close(codes[codes != 0], own)  # no spread: every parent is at its mean
    truth, codes = drawn(config(), global_random_seed)
    root, child = codes[:, 0], codes[:, 2]
    both = (child != 0) & (truth.deviations[2] < 1)
    like = torch.stack([root[both], child[both]]).double().corrcoef()[0, 1]
    assert float(like) > 0.3


def test_correlated_features_fire_together(global_random_seed: int) -> None:
    truth, codes = drawn(config(depth=0, rank=1, strength=0.8), global_random_seed)
    likeness = (truth.loadings @ truth.loadings.T).fill_diagonal_(0)
    firing = (codes != 0).double().T.corrcoef()
    strong = likeness.abs() > 0.5
    assert bool(strong.any()) and bool((firing * likeness)[strong].gt(0).all())
    assert float(truth.loadings.norm(dim=1).max()) <= 0.99**0.5 + 1e-6


def test_activations_are_the_code_times_the_directions_and_the_bias(
    global_random_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "ROWS_AT_ONCE", 28)
    monkeypatch.setattr(trees, "SHARD_ROWS", 80)
    truth = ForestTruth(config(apart_steps=3), global_random_seed, "train", 50)
    assert truth.n_shards == 3 and float(truth.offset.norm()) == pytest.approx(0.5)
    for i in range(3):
        codes = torch.cat(list(truth.chunks(i)))
        x = truth.shard(i).x
        assert x.shape == (len(codes), 4, 8)
        torch.testing.assert_close(x, codes @ truth.directions + truth.offset)
    lengths = truth.directions.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(40))


def test_made_on_the_way_is_what_is_kept(
    global_random_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "SHARD_ROWS", 80)
    kept = generate(config(), global_random_seed, 50)
    made = generate(config(), global_random_seed, 50, keep=False)
    assert isinstance(made, SyntheticSource)
    assert made.shard_counts == kept.shard_counts == [80, 80, 40]
    for i in (0, 2, 1, 1):
        assert torch.equal(made.shard(i).x, kept.shard(i).x)
    (one, _), (other, _) = next(batches(made, 1, 16)), next(batches(kept, 1, 16))
    assert torch.equal(one.x, other.x)
    assert truth_of(made) == truth_of(kept)
    assert made.digest != generate(config(), global_random_seed + 1, 50, keep=False).digest
    assert generate(SyntheticConfig(), 0, 20, keep=False).shard_counts == [20 * 64]


def test_pushing_apart_is_adam_on_the_loss_that_is_written() -> None:
    start = random_directions(30, 6, 0)
    rows = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=0.01)
    for _ in range(5):
        optimiser.zero_grad()
        gram = rows @ rows.T
        square = gram.diagonal()
        loss = gram.square().sum() - square.square().sum() + 30 * (square - 1).square().sum()
        loss.backward()
        optimiser.step()
    expected = torch.nn.functional.normalize(rows.detach(), dim=1)
    found = push_apart(start, 5, 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def crowd(w: Tensor) -> float:
        return float((w @ w.T).fill_diagonal_(0).square().mean())

    assert crowd(push_apart(start, 200, 0.01)) < crowd(start)


def test_the_scores_take_it(global_random_seed: int) -> None:
    held_out = generate(config(), global_random_seed, 100, "held_out")
    truth = truth_of(held_out)
    assert isinstance(truth, ForestTruth)

    class Exact:
        d_in, d_sae = 8, 40

        def encode(self, x: Tensor) -> Tensor:
            return (x @ truth.directions.T).relu()

        def decode(self, f: Tensor) -> Tensor:
            return f @ truth.directions + truth.offset

    found = {row.metric: row.value for row in evaluate_truth(Exact(), held_out, truth)}
    assert found["oracle_fvu"] == pytest.approx(0, abs=1e-9)
    assert found["mcc"] == pytest.approx(1, abs=1e-6)
    assert found["oracle_latent_f1"] <= 1 and found["chance_mcc"] < 1


def test_the_shipped_file_is_the_published_model() -> None:
    settings = read_study(SHIPPED)
    made = settings.data
    assert isinstance(made, ForestConfig) and (made.features, made.d) == (16_384, 768)
    assert made.nodes == 10_880 and settings.arms["batchtopk"].d_sae == 4096
    assert settings.contexts * made.positions == settings.train.tokens == 5_000_000
    assert not settings.keep
    rows = ForestTruth(made.patched({"apart_steps": 0}), 0, "train", 16)
    assert 28 < float((rows.codes() != 0).sum(-1).float().mean()) < 40  # published: about 34
    assert SyntheticStudyConfig.parse(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("changes", "setting", "remedy"),
    [
        ({"features": 25}, "features", "26 nodes"),
        ({"lowest": 0.5}, "lowest", "below highest"),
        ({"root": 3}, "root", "did you mean 'roots'"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], setting: str, remedy: str) -> None:
    with pytest.raises(SettingError, match=remedy) as error:
        config(**changes)
    assert error.value.setting == setting


def test_an_unknown_kind() -> None:
    with pytest.raises(SettingError, match="use 'forest'"):
        parse_process({"kind": "forrest"})
