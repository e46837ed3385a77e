"""Synthetic activations: the process is the one that was asked for, and repeats bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.data.activations.store import MemorySource
from saelab.data.activations.stream import batches
from saelab.data.synthetic import chains
from saelab.data.synthetic.chains import SyntheticConfig, Truth, generate, truth_of
from saelab.errors import MismatchError, SettingError
from saelab.evals.dictionary_matching import random_directions
from saelab.evals.known_features import mcc
from saelab.sae import SAEConfig
from saelab.seeding import torch_stream

#: Standard errors within which a mean over contexts must lie. Over all tests some ten thousand
#: means are looked at, and of a million normal ones .002 would lie beyond.
SIGMAS = 6.0
CONTEXTS = 3000


def config(**changes: Any) -> SyntheticConfig:
    return SyntheticConfig.parse({"d": 8, "features": 24, "l0": 2.4, "positions": 12, **changes})


def firings(made: SyntheticConfig, seed: int, contexts: int = CONTEXTS) -> Tensor:
    """bool [contexts, positions, features]."""
    return Truth(made, seed, "train", contexts).codes() != 0


def assert_mean(samples: Tensor, expected: Tensor | float) -> None:
    """Each mean over the independent first dimension is as expected, within sampling error."""
    samples = samples.double()
    error = samples.std(0) / len(samples) ** 0.5
    distance = (samples.mean(0) - torch.as_tensor(expected)).abs()
    assert bool((distance <= SIGMAS * error).all()), float((distance / error).max())


PROCESSES: dict[str, dict[str, Any]] = {
    "independent": {},
    "equal": {"frequency": "equal"},
    "zipf": {"frequency": "zipf", "l0": 1.5},
    "persistent": {"persistence": 0.7},
    "refractory": {"refractory": 3},
    "correlated": {"correlation": "correlated"},
    "correlated and persistent": {"correlation": "correlated", "persistence": 0.5},
    "correlated and refractory": {"correlation": "correlated", "refractory": 2},
    "hierarchical": {"correlation": "hierarchical"},
    "hierarchical and persistent": {"correlation": "hierarchical", "persistence": 0.6},
}


@pytest.mark.parametrize("name", PROCESSES)
def test_features_fire_as_often_as_asked_at_every_position(
    name: str, global_random_seed: int
) -> None:
    made = config(**PROCESSES[name])
    fires = firings(made, global_random_seed).double()
    assert float(made.probabilities.sum()) == pytest.approx(made.l0)
    assert_mean(fires, made.probabilities)  # position by position: the chains start stationary
    assert_mean(fires.mean(1), made.probabilities)
    assert_mean(fires.sum(2).mean(1), made.l0)


@pytest.mark.parametrize("persistence", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("correlation", ["independent", "correlated"])
def test_persistence(persistence: float, correlation: str, global_random_seed: int) -> None:
    made = config(persistence=persistence, correlation=correlation, ratio=2)
    fires = firings(made, global_random_seed).double()
    p = made.probabilities
    for lag in (1, 2, 3):
        both = (fires[:, lag:] * fires[:, :-lag]).mean(1)
        assert_mean(both, p**2 + persistence**lag * p * (1 - p))


def test_refractory(global_random_seed: int) -> None:
    made = config(refractory=3, ratio=2)
    fires = firings(made, global_random_seed).double()
    p = made.probabilities
    for lag in (1, 2, 3):
        assert not bool((fires[:, lag:] * fires[:, :-lag]).any())
    again = (fires[:, 4:] * fires[:, :-4]).mean(1)  # free again: fires with the hazard
    assert_mean(again, p * p / (1 - 3 * p))


def test_refractory_period_at_its_longest_is_a_clock(global_random_seed: int) -> None:
    fires = firings(
        config(features=3, l0=0.75, frequency="equal", refractory=3), global_random_seed
    )
    assert bool((fires.unfold(1, 4, 1).sum(-1) == 1).all())


def test_correlated_firings_have_the_signs_of_their_loadings(global_random_seed: int) -> None:
    made = config(
        features=10, l0=3, frequency="equal", correlation="correlated", rank=2, strength=0.8
    )
    truth = Truth(made, global_random_seed, "train", CONTEXTS)
    fires = (truth.codes() != 0).double()
    excess = torch.einsum("cti,ctj->cij", fires, fires) / made.positions - 0.3**2
    likeness = (truth.loadings @ truth.loadings.T).fill_diagonal_(0)
    error = excess.std(0) / CONTEXTS**0.5
    assert bool((excess.mean(0) > SIGMAS * error)[likeness > 0.2].all())
    assert bool((excess.mean(0) < -SIGMAS * error)[likeness < -0.2].all())
    assert bool((likeness > 0.2).any()) and bool((likeness < -0.2).any())


def test_independent_firings(global_random_seed: int) -> None:
    made = config(features=10, l0=3, ratio=2)
    fires = firings(made, global_random_seed).double()
    together = torch.einsum("cti,ctj->cij", fires, fires) / made.positions
    p = made.probabilities
    apart = ~torch.eye(10, dtype=torch.bool)
    assert_mean(together[:, apart], p.outer(p)[apart])


@pytest.mark.parametrize("persistence", [0.0, 0.5])
def test_children_are_silent_where_their_parent_is(
    persistence: float, global_random_seed: int
) -> None:
    made = config(correlation="hierarchical", children=2, given=0.4, persistence=persistence)
    fires = firings(made, global_random_seed)
    children = slice(made.parents, None)
    parent = fires[..., made.parent_of[children]]
    assert made.parents == 8
    assert not bool((fires[..., children] & ~parent).any())
    assert_mean((fires[..., children].double() - 0.4 * parent.double()).mean(1), 0.0)


def test_values_have_their_magnitudes(global_random_seed: int) -> None:
    made = config(jitter=0.4, scale=3.0)
    truth = Truth(made, global_random_seed, "train", CONTEXTS)
    codes = truth.codes()
    logs = codes[codes > 0].log() - truth.magnitudes.log().expand_as(codes)[codes > 0]
    assert_mean(logs, -(0.4**2) / 2)
    assert_mean((logs + 0.4**2 / 2).square(), 0.4**2)
    assert not bool((codes < 0).any())
    flat = Truth(config(jitter=0, spread=0, scale=3.0), global_random_seed, "train", 5).codes()
    assert set(flat.unique().tolist()) == {0.0, 3.0}


def test_activations_are_the_code_times_the_directions_and_noise(global_random_seed: int) -> None:
    made = config(noise=0.3)
    source = generate(made, global_random_seed, CONTEXTS)
    truth = truth_of(source)
    assert truth is not None
    x = torch.cat([source.shard(i).x for i in range(source.n_shards)])
    rest = x - truth.codes() @ truth.directions
    assert_mean(rest.flatten(0, 1), 0.0)
    assert_mean(rest.flatten(0, 1).square(), 0.3**2)
    quiet = generate(config(noise=0), global_random_seed, 10)
    codes = Truth(config(noise=0), global_random_seed, "train", 10).codes()
    torch.testing.assert_close(quiet.shard(0).x, codes @ truth.directions)


configs = st.builds(
    lambda **changes: config(**changes),
    d=st.integers(1, 30),
    l0=st.floats(0.1, 2.0),
    frequency=st.sampled_from(["equal", "linear", "zipf"]),
    exponent=st.floats(0, 0.9),
    correlation=st.sampled_from(["independent", "correlated", "hierarchical"]),
    strength=st.floats(0, 0.95),
    rank=st.integers(1, 5),
    persistence=st.floats(0, 0.95),
    orthogonal=st.booleans(),
    positions=st.integers(1, 9),
)


@settings(max_examples=40)
@given(configs, st.integers(0, 2**31), st.integers(1, 20))
def test_any_setting_gives_what_it_says(made: SyntheticConfig, seed: int, contexts: int) -> None:
    source = generate(made, seed, contexts)
    truth = truth_of(source)
    assert truth == Truth(made, seed, "train", contexts)
    shard = source.shard(0)
    codes = truth.codes()
    assert shard.x.shape == (contexts, made.positions, made.d)
    assert shard.x.dtype == codes.dtype == torch.float32
    assert codes.shape == (contexts, made.positions, made.features)
    assert bool(shard.mask.all()) and bool(torch.isfinite(shard.x).all())
    assert bool((codes >= 0).all())
    norms = truth.directions.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
    assert generate(made, seed, contexts).digest == source.digest


@settings(max_examples=20)
@given(configs, st.integers(0, 2**31), st.integers(-6, 6))
def test_scale_multiplies_everything(made: SyntheticConfig, seed: int, power: int) -> None:
    larger = made.patched({"scale": 2.0**power})
    one, other = Truth(made, seed, "train", 6), Truth(larger, seed, "train", 6)
    assert torch.equal(one.shard(0).x * 2.0**power, other.shard(0).x)
    assert torch.equal(one.codes() * 2.0**power, other.codes())
    assert torch.equal(one.directions, other.directions)


def test_orthogonal_directions(global_random_seed: int) -> None:
    truth = Truth(config(orthogonal=True, features=20), global_random_seed, "train", 1)
    for block in truth.directions.split(8):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.eye(len(block)), rtol=0, atol=1e-5)


def test_parts_share_the_dictionary_alone(global_random_seed: int) -> None:
    made = config()
    one, other = (Truth(made, global_random_seed, part, 50) for part in ("train", "held_out"))
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(one.magnitudes, other.magnitudes)
    assert not torch.equal(one.codes(), other.codes())
    different = Truth(made, global_random_seed + 1, "train", 50)
    assert not torch.equal(one.directions, different.directions)
    assert not torch.equal(one.codes(), different.codes())


def test_an_sae_of_the_same_seed_knows_nothing_of_the_dictionary(global_random_seed: int) -> None:
    seed = global_random_seed
    made = SyntheticConfig(d=24, features=64, l0=3)
    source = generate(made, seed, 50)
    truth = truth_of(source)
    assert truth is not None
    sae = SAEConfig.parse({"d_sae": 64}).build(24)
    sae.initialise(source.shard(0).rows()[0], seed)
    chance = torch.tensor(
        [mcc(random_directions(64, 24, seed, i), truth.directions) for i in range(50)]
    )
    assert abs(mcc(sae.W_dec.detach(), truth.directions) - chance.mean()) < SIGMAS * chance.std()


# ---- shards, chunks, folders ---------------------------------------------------------------


def test_shards_and_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config()
    monkeypatch.setattr(chains, "SHARD_ROWS", 12 * 7)
    monkeypatch.setattr(chains, "ENTRIES", 12 * 24 * 3)
    truth = Truth(made, 0, "train", 17)
    assert [len(truth.shard(i).x) for i in range(truth.n_shards)] == [7, 7, 3]
    assert [len(codes) for codes in truth.chunks(0)] == [3, 3, 1]
    codes = truth.codes()
    assert codes.shape == (17, 12, 24)
    assert len({tuple(row) for row in codes.flatten(1).tolist()}) == 17  # no context twice


def test_a_folder_holds_what_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "SHARD_ROWS", 12 * 7)
    made = config(persistence=0.5)
    memory = generate(made, 3, 17)
    folder = generate(made, 3, 17, folder=tmp_path / "activations")
    assert folder.digest == memory.digest
    assert truth_of(folder) == truth_of(memory)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = generate(made, 3, 17, folder=tmp_path / "activations")
    assert again.digest == memory.digest
    assert {file: file.stat().st_mtime_ns for file in written} == written
    with pytest.raises(MismatchError, match="synthetic"):
        generate(made, 4, 17, folder=tmp_path / "activations")


def test_both_layouts_of_the_stream() -> None:
    source = generate(config(), 0, 40)
    rows, _ = next(batches(source, 1, 24, "rows"))
    contexts, _ = next(batches(source, 1, 24, "contexts"))
    assert rows.x.shape == (24, 8) and contexts.x.shape == (2, 12, 8)
    assert contexts.positions[0].tolist() == list(range(12))
    assert contexts.mask is not None and bool(contexts.mask.all())


def test_other_activations_have_no_known_truth() -> None:
    shard = Truth(config(), 0, "train", 3).shard(0)
    assert truth_of(MemorySource([shard], {})) is None


@pytest.mark.parametrize(
    ("changes", "setting", "remedy"),
    [
        ({"l0": 20}, "l0", "flatten the frequencies"),
        ({"frequency": "zipf", "exponent": 3}, "l0", "flatten the frequencies"),
        ({"correlation": "hierarchical", "features": 25}, "features", "multiple of 1 [+] children"),
        ({"refractory": 2, "persistence": 0.1}, "refractory", "needs persistence = 0"),
        ({"refractory": 12}, "refractory", "no time for it"),
        ({"persistence": 1.0}, "persistence", "less than 1"),
        ({"persistance": 0.1}, "persistance", "did you mean 'persistence'"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], setting: str, remedy: str) -> None:
    with pytest.raises(SettingError, match=remedy) as error:
        config(**changes)
    assert error.value.setting == setting


def test_no_contexts() -> None:
    with pytest.raises(SettingError, match="at least one"):
        generate(config(), 0, 0)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    generate(config(correlation="correlated", refractory=1), 0, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        torch_stream(0, "synthetic codes").initial_seed() != torch_stream(0, "init").initial_seed()
    )
