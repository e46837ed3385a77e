"""The training loop: bitwise repeatable, cells blind to each other, and the right arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Batch, batches
from saelab.errors import CellFailure, SettingError
from saelab.parts.base import Pass
from saelab.sae import SAE, SAEConfig
from saelab.seeding import torch_stream
from saelab.training import loop
from saelab.training.cell import Log
from saelab.training.loop import Cell, train
from saelab.training.module_cell import ModuleCell
from saelab.training.optim import TrainConfig
from saelab.training.snapshots import snapshot_bytes, snapshot_steps

D_IN, D_SAE, SIZE, CONTEXT = 16, 64, 64, 16


def source(seed: int, contexts: int = 64) -> MemorySource:
    """Sums of a few of 24 unit directions, with a little noise and a mean, in two shards."""
    stream = torch_stream(seed, "synthetic activations")
    directions = nn.functional.normalize(torch.randn(24, D_IN, generator=stream), dim=1)
    shards = []
    for _ in range(2):
        shape = (contexts, CONTEXT, 24)
        f = torch.rand(shape, generator=stream) * (torch.rand(shape, generator=stream) < 0.12)
        noise = torch.randn(contexts, CONTEXT, D_IN, generator=stream)
        mask = torch.ones(contexts, CONTEXT, dtype=torch.bool)
        mask[:, 0] = False
        shards.append(Shard(f @ directions + 0.02 * noise + 0.5, mask))
    return MemorySource(shards, {})


@pytest.fixture(scope="module")
def activations(global_random_seed: int) -> MemorySource:
    return source(global_random_seed)


def sae_config(**changes: Any) -> SAEConfig:
    data: dict[str, Any] = {
        "d_sae": D_SAE,
        "controllers": [{"kind": "l0_target", "target": 6}],
        "precision": "float32",
    }
    return SAEConfig.parse(data | changes)


def train_config(steps: int = 30, **changes: Any) -> TrainConfig:
    return TrainConfig.parse({"tokens": SIZE * steps, "batch_size": SIZE, "lr": 3e-3} | changes)


def cell_of(
    activations: MemorySource,
    name: str = "cell",
    sae: SAEConfig | None = None,
    training: TrainConfig | None = None,
    seed: int = 3,
) -> Cell:
    sample = activations.shard(0).rows()[0]
    return Cell(name, sae or sae_config(), training or train_config(), sample, seed)


def run(
    activations: MemorySource,
    *cells: Cell,
    on_step: Callable[..., None] | None = None,
    seed: int = 3,
) -> dict[str, CellFailure]:
    return train(cells, batches(activations, seed, SIZE), on_step)


def one_batch(activations: MemorySource, seed: int = 3) -> Batch:
    return next(batches(activations, seed, SIZE))[0]


def state(cell: Cell) -> dict[str, Tensor]:
    """Weights, running statistics and the optimiser's moments."""
    tensors = dict(cell.sae.state_dict())
    for i, moments in enumerate(cell.optimiser.moments().values()):
        tensors |= {f"moment {i} {name}": moment for name, moment in moments.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_bitwise(a: Cell, b: Cell) -> None:
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert a.log.columns.keys() == b.log.columns.keys()
    for name, column in a.log.columns.items():
        np.testing.assert_array_equal(column, b.log.columns[name], err_msg=name)


def numpy_state() -> np.ndarray:
    return np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002


#: Every part whose state could leak: thresholds, statistics, resets, controllers.
VARIANTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "batchtopk": {
        "activation": {"kind": "batchtopk", "k": 6},
        "losses": ["reconstruction", {"kind": "auxk", "dead_after": 256}],
        "scaling": "variance",
    },
    "jumprelu": {
        "activation": "jumprelu",
        "losses": ["reconstruction", "l0"],
        "constraints": ["unit_norm"],
        "observers": [{"kind": "resampling", "every": 0.1, "patience": 128}],
        "precision": "bfloat16",
    },
}
variants = pytest.mark.parametrize("variant", list(VARIANTS))


class TestBitwise:
    @variants
    def test_same_seed_twice(self, variant: str, activations: MemorySource) -> None:
        cells = [cell_of(activations, sae=sae_config(**VARIANTS[variant])) for _ in range(2)]
        for cell in cells:
            torch.rand(7)  # the global generator has no part in it
            assert not run(activations, cell)
        assert_bitwise(*cells)
        other = cell_of(activations, sae=sae_config(**VARIANTS[variant]), seed=4)
        assert not torch.equal(other.sae.W_dec, cells[0].sae.W_dec)

    def test_global_generators_are_left_alone(self, activations: MemorySource) -> None:
        before, numpy_before = torch.get_rng_state(), numpy_state()
        run(activations, cell_of(activations, sae=sae_config(**VARIANTS["jumprelu"])))
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(numpy_state(), numpy_before)

    @variants
    def test_snapshots_change_nothing(self, variant: str, activations: MemorySource) -> None:
        config, sample = sae_config(**VARIANTS[variant]), activations.shard(0).rows()[0]
        plain, kept = (Cell("a", config, train_config(), sample, 3, n) for n in (0, 4))
        for cell in (plain, kept):
            run(activations, cell)
        assert_bitwise(plain, kept)
        assert kept.snapshots is not None and plain.snapshots is not None
        assert not plain.snapshots.tokens
        assert kept.snapshots.tokens == [SIZE * step for step in (1, 3, 10, 30)]
        last = normalize(kept.sae.W_dec, dim=1).half()
        assert torch.equal(kept.snapshots.decoders[-1], last)
        assert not torch.equal(kept.snapshots.decoders[0], last)
        assert len(kept.snapshots.thresholds) == 4

    def test_snapshots_are_evenly_spaced_in_log_tokens(self) -> None:
        steps = snapshot_steps(10, 10_000)
        assert (steps[0], steps[-1], len(steps)) == (100, 10_000, 10)
        ratios = np.diff(np.log(steps))
        np.testing.assert_allclose(ratios, math.log(100) / 9, atol=0.01)
        assert snapshot_steps(0, 50) == [] and snapshot_steps(1, 50) == [50]
        assert snapshot_steps(10, 3) == [1, 2, 3]

    def test_a_snapshot_file_takes_the_stated_bytes(
        self, activations: MemorySource, tmp_path: Path
    ) -> None:
        cell = Cell("a", sae_config(), train_config(), activations.shard(0).rows()[0], 3, 4)
        run(activations, cell)
        assert cell.snapshots is not None
        cell.snapshots.save(tmp_path / "snapshots.safetensors")
        size = (tmp_path / "snapshots.safetensors").stat().st_size
        assert 0 <= size - snapshot_bytes(4, D_SAE, cell.sae.d_in) < 600
        stored = load_file(tmp_path / "snapshots.safetensors")
        assert stored["tokens"].tolist() == cell.snapshots.tokens
        assert torch.equal(stored["b_enc"][-1], cell.sae.b_enc.detach())

    @variants
    def test_neighbours_change_nothing(self, variant: str, activations: MemorySource) -> None:
        config = sae_config(**VARIANTS[variant])
        alone = cell_of(activations, "a", config)
        run(activations, alone)
        among = cell_of(activations, "a", config)
        others = [cell_of(activations, n, sae_config(**v)) for n, v in VARIANTS.items()]
        short = cell_of(activations, "short", training=train_config(7))
        run(activations, others[0], among, *others[1:], short)
        assert_bitwise(alone, among)
        assert short.steps_done == 7

    def test_failing_neighbour_stops_alone(self, activations: MemorySource) -> None:
        alone = [cell_of(activations, n, sae_config(**v)) for n, v in VARIANTS.items()]
        for cell in alone:
            run(activations, cell)
        among = [cell_of(activations, n, sae_config(**v)) for n, v in VARIANTS.items()]
        broken = cell_of(activations, "broken", training=train_config(lr=1e30))
        failures = run(activations, among[0], broken, *among[1:])
        assert list(failures) == ["broken"]
        assert failures["broken"].step == broken.steps_done < 5
        assert not math.isnan(float(broken.log.columns["loss"][0]))
        for one, other in zip(alone, among, strict=True):
            assert_bitwise(one, other)

    def test_failure_leaves_the_weights(
        self, activations: MemorySource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cell = cell_of(activations)
        stream = batches(activations, 3, SIZE)
        for _ in range(5):
            cell.step(next(stream)[0])
        before = state(cell)
        term = cell.sae.loss_terms()["reconstruction"]
        monkeypatch.setattr(term, "loss", lambda p: p.recon.sum() * math.nan)
        with pytest.raises(CellFailure, match=r"cell cell stopped at step 5: loss nan"):
            cell.step(next(stream)[0])
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(cell).items())
        assert cell.steps_done == cell.log.length == 5
        assert all(parameter.grad is None for parameter in cell.sae.parameters())

    def test_gradients_live_as_long_as_the_step(self, activations: MemorySource) -> None:
        """None is left behind, and one that someone else left does not count."""
        one, other = cell_of(activations), cell_of(activations)
        for i, (batch, _) in enumerate(batches(activations, 3, SIZE)):
            if i == 5:
                break
            other.sae(other.rows(batch).x).recon.square().sum().backward()
            assert one.step(batch) == other.step(batch)
            assert all(parameter.grad is None for parameter in other.sae.parameters())
        assert_bitwise(one, other)

    @pytest.mark.parametrize("every", [1, 4, 1000])
    def test_looking_changes_nothing(
        self, every: int, activations: MemorySource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        silent = cell_of(activations)
        run(activations, silent)
        seen: list[tuple[int, int]] = []

        def look(steps: int, cells: list[Cell]) -> None:
            for cell in cells:
                cell.sae.scalars()
                cell.sae.settings(cell.steps_done)
                cell.log.last("loss", 0.5)
            seen.append((steps, len(cells)))

        monkeypatch.setattr(loop, "LONGEST_TURN", every)
        watched = cell_of(activations)
        run(activations, watched, on_step=look)
        assert_bitwise(silent, watched)
        assert sum(steps * cells for steps, cells in seen) == 30  # nothing is counted twice or lost
        assert all(steps == every for steps, _ in seen[:-1])

    def test_turns_are_bounded_in_bytes(
        self, activations: MemorySource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = one_batch(activations)
        size = batch.x.numel() * batch.x.element_size()
        for bound, longest in ((0, 1), (size, 1), (3 * size, 3), (100 * size, 16)):
            monkeypatch.setattr(loop, "TURN_BYTES", bound)
            lengths = [len(turn) for turn, _ in loop._turns([(batch, None)] * 18)]
            assert sum(lengths) == 18 and max(lengths) == lengths[0] == longest

    def test_evaluating_between_steps_changes_nothing(self, activations: MemorySource) -> None:
        config = sae_config(**VARIANTS["batchtopk"])
        plain, measured = (cell_of(activations, sae=config) for _ in range(2))
        for batch, _ in itertools.islice(batches(activations, 3, SIZE), 30):
            plain.step(batch)
            measured.sae.eval()
            measured.sae.decode(measured.sae.encode(batch.x))
            measured.sae.fold()
            measured.sae.train()
            measured.step(batch)
        assert_bitwise(plain, measured)


class TestLearning:
    @variants
    def test_loss_falls(self, variant: str, activations: MemorySource) -> None:
        config = sae_config(**VARIANTS[variant])
        cell = cell_of(activations, sae=config, training=train_config(120))
        assert not run(activations, cell)
        loss = cell.log.columns["loss.reconstruction"]
        assert loss[-10:].mean() < 0.6 * loss[:3].mean()
        assert not cell.sae.training

    @pytest.mark.parametrize("target", [3, 8])
    @pytest.mark.parametrize("activation", ["relu", "jumprelu"])
    def test_l0_reaches_its_target(
        self, target: float, activation: str, activations: MemorySource
    ) -> None:
        losses = ["reconstruction", "l1" if activation == "relu" else "l0"]
        config = sae_config(
            activation=activation,
            losses=losses,
            controllers=[{"kind": "l0_target", "target": target}],
        )
        cell = cell_of(activations, sae=config, training=train_config(1000, lr=8e-3))
        run(activations, cell)
        assert cell.log.last("l0", 0.1) == pytest.approx(target, rel=0.015)

    @pytest.mark.parametrize("steps", [3, 40])
    def test_controller_is_patient_in_a_short_run(
        self, steps: int, activations: MemorySource
    ) -> None:
        """The weights can't follow in a few steps, so the coefficient must not run away."""
        cell = cell_of(activations, training=train_config(steps))
        assert not run(activations, cell)
        assert cell.log.last("sparsity") < 100 * cell.log.columns["sparsity"][0]

    def test_ramp_and_its_name(self, activations: MemorySource) -> None:
        config = sae_config(
            controllers=[{"kind": "ramp", "name": "sparsity", "value": 0.1, "warmup": 0.2}]
        )
        sae = config.build(D_IN, steps=100)
        values = [sae.settings(step)["sparsity"] for step in range(100)]
        assert values[0] == pytest.approx(0.1 / 20) and values[9] == pytest.approx(0.05)
        assert values[19:] == [0.1] * 81

    def test_log_names_every_quantity(self, activations: MemorySource) -> None:
        cell = cell_of(activations, sae=sae_config(**VARIANTS["batchtopk"]))
        run(activations, cell)
        names = {"loss", "grad_norm", "l0", "dead", "loss.reconstruction", "loss.auxk"}
        assert names | {"sparsity", "beta", "theta", "tau"} <= cell.log.columns.keys()
        assert all(np.isfinite(column).all() for column in cell.log.columns.values())
        total = cell.log.columns["loss.reconstruction"] + cell.log.columns["loss.auxk"]
        np.testing.assert_allclose(cell.log.columns["loss"], total, rtol=1e-6)
        assert cell.tokens == cell.config.tokens

    def test_log_last(self) -> None:
        log = Log(5)
        for i in range(4):
            log.append({"a": float(i)} | ({"late": 1.0} if i > 1 else {}))
        assert log.last("a") == 3 and log.last("a", 0.5) == 2.5
        assert np.isnan(log.columns["late"][:2]).all() and log.last("late") == 1

    def test_dead_latents_are_counted(self, activations: MemorySource) -> None:
        cell = cell_of(activations, training=train_config(30))
        with torch.no_grad():
            cell.sae.b_enc[:16] = -100.0
        run(activations, cell)
        assert cell.dead_after == 3 * SIZE
        assert cell.log.columns["dead"][0] == 0
        assert cell.log.last("dead") >= 16 / D_SAE


class TestSchedule:
    def test_by_hand(self) -> None:
        config = train_config(100, warmup=0.1, decay=0.2)
        rates = [config.rate(step) for step in range(100)]
        assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5)
        assert rates[9:81] == [1.0] * 72
        assert rates[81] == pytest.approx(19 / 20) and rates[99] == pytest.approx(1 / 20)
        assert all(0 < rate <= 1 for rate in rates)

    @pytest.mark.parametrize("steps", [1, 2, 7])
    @pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (1, 1), (0.05, 0.2)])
    def test_bounds(self, steps: int, warmup: float, decay: float) -> None:
        config = train_config(steps, warmup=warmup, decay=decay)
        assert config.steps == steps
        assert all(0 < config.rate(step) <= 1 for step in range(steps))

    def test_each_group_has_its_own_rate(self, activations: MemorySource) -> None:
        config = sae_config(
            **VARIANTS["jumprelu"] | {"activation": {"kind": "jumprelu", "lr": 0.5}}
        )
        cell = cell_of(activations, sae=config, training=train_config(10, warmup=0.5))
        cell.step(one_batch(activations))
        rates = cell.optimiser.rates(0)
        assert rates == {"weights": pytest.approx(3e-3 / 5), "JumpReLU": pytest.approx(0.5 / 5)}


class TestResampling:
    CONFIG: ClassVar[dict[str, Any]] = {
        "kind": "resampling",
        "every": 0.1,
        "patience": 4 * SIZE,
        "encoder_norm": 0.2,
    }

    def killed(self, activations: MemorySource, *observers: dict[str, Any]) -> Cell:
        """A cell whose latent 3 has fired at the first step and can't fire again."""
        config = sae_config(observers=list(observers))
        cell = cell_of(activations, sae=config, training=train_config(100))
        cell.step(one_batch(activations))
        assert cell.fired_at[3] == SIZE
        self.kill(cell)
        return cell

    def kill(self, cell: Cell) -> None:
        with torch.no_grad():
            cell.sae.W_enc[3] = 0
            cell.sae.b_enc[3] = -50

    def test_revives_a_dead_latent_and_touches_no_other(self, activations: MemorySource) -> None:
        """Up to and with the reset the cell equals its twin without, apart from latent 3."""
        watched, twin = self.killed(activations, self.CONFIG), self.killed(activations)
        stream = batches(activations, 3, SIZE)
        for _ in range(8):
            batch = next(stream)[0]
            watched.step(batch)
            twin.step(batch)
        assert torch.equal(watched.sae.W_dec, twin.sae.W_dec)
        assert watched.optimiser.moments()[watched.sae.W_enc]["exp_avg"][3].any()
        batch = next(stream)[0]
        watched.step(batch)
        twin.step(batch)
        others = torch.arange(D_SAE) != 3
        for name in ("W_enc", "b_enc", "W_dec"):
            one, other = (getattr(c.sae, name) for c in (watched, twin))
            assert torch.equal(one[others], other[others]), name
            moments = [c.optimiser.moments()[getattr(c.sae, name)] for c in (watched, twin)]
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(moments[0][moment][others], moments[1][moment][others])
                assert not moments[0][moment][3].any() and moments[1][moment][3].any()
        assert torch.equal(watched.sae.b_dec, twin.sae.b_dec)
        sae = watched.sae
        assert (
            float(sae.W_dec[3].detach().norm()) == pytest.approx(1, rel=1e-5) and sae.b_enc[3] == 0
        )
        living = torch.linalg.vector_norm(sae.W_enc[others].detach(), dim=1).mean()
        assert float(sae.W_enc[3].detach().norm() / living) == pytest.approx(0.2, rel=1e-4)
        assert sae.scalars()["resampled"] == 1
        assert not sae(batch.x).code.firings[3].eq(0), "the new direction is an input of the batch"
        for batch, _ in itertools.islice(stream, 30):
            watched.step(batch)
        assert watched.fired_at[3] > watched.tokens - 10 * SIZE

    def test_none_in_the_last_fifth(self, activations: MemorySource) -> None:
        cell = self.killed(activations, self.CONFIG)
        resets = []
        for step, (batch, _) in enumerate(itertools.islice(batches(activations, 3, SIZE), 99), 2):
            self.kill(cell)
            before = cell.sae.scalars()["resampled"]
            cell.step(batch)
            if cell.sae.scalars()["resampled"] > before:
                resets.append(step)
        assert resets == [10, 20, 30, 40, 50, 60, 70, 80]

    def test_norm_holds_under_input_scaling(self, activations: MemorySource) -> None:
        config = sae_config(scaling={"kind": "variance", "tau": 1}, observers=[self.CONFIG])
        cell = cell_of(activations, sae=config, training=train_config(100))
        with torch.no_grad():
            cell.sae.b_enc[3] = -50
        for batch, _ in itertools.islice(batches(activations, 3, SIZE), 10):
            cell.step(batch)
        assert cell.sae.scalars()["resampled"] == 1
        norms = torch.linalg.vector_norm(cell.sae.effective_encoder(), dim=1)
        others = torch.arange(D_SAE) != 3
        assert float(norms[3] / norms[others].mean()) == pytest.approx(0.2, rel=1e-4)

    def test_clearing_spares_what_only_looks_like_latents(self, activations: MemorySource) -> None:
        """With as many latents as inputs, b_dec has the shape of a latents' vector."""
        config = sae_config(d_sae=D_IN, activation="jumprelu", losses=["reconstruction", "l0"])
        cell = cell_of(activations, sae=config)
        for batch, _ in itertools.islice(batches(activations, 3, SIZE), 3):
            cell.step(batch)
        moments = cell.optimiser.moments()
        before = {id(p): moments[p]["exp_avg"].clone() for p in moments}
        cell.optimiser.clear(cell.sae, torch.tensor([2, 5]))
        kept = torch.ones(D_IN, dtype=torch.bool)
        kept[[2, 5]] = False
        for parameter in moments:
            now, old = moments[parameter]["exp_avg"], before[id(parameter)]
            if parameter is cell.sae.b_dec:
                assert torch.equal(now, old) and old[2] != 0
            else:
                assert torch.equal(now[kept], old[kept]) and not now[~kept].any()


class TestPositions:
    def test_only_the_named_positions_are_seen(self, activations: MemorySource) -> None:
        filtered = cell_of(activations, training=train_config(positions=(2, 9)))
        by_hand = cell_of(activations)
        for batch, _ in itertools.islice(batches(activations, 3, SIZE), 10):
            keep = (batch.positions >= 2) & (batch.positions < 9)
            assert 0 < int(keep.sum()) < SIZE
            filtered.step(batch)
            by_hand.step(Batch(batch.x[keep], batch.positions[keep]))
        assert_bitwise(filtered, by_hand)
        assert filtered.tokens < 10 * SIZE

    def test_contexts_are_filtered_alike(self, activations: MemorySource) -> None:
        """Whole contexts go in; masked positions and those outside the window stay out."""
        cell = cell_of(activations, training=train_config(positions=(0, 3)))
        batch = next(batches(activations, 3, SIZE, "contexts"))[0]
        assert batch.x.shape == (SIZE // CONTEXT, CONTEXT, D_IN)
        cell.step(batch)
        assert cell.tokens == SIZE // CONTEXT * 2  # position 0 is masked

    def test_window_without_a_row(self, activations: MemorySource) -> None:
        cell = cell_of(activations, training=train_config(positions=(0, 1)))
        with pytest.raises(CellFailure, match=r"no row of the batch has a position in \(0, 1\)"):
            cell.step(one_batch(activations))


class Tied(nn.Module):
    """A small user's module: tied weights, ReLU, L1."""

    def __init__(self, d_in: int, d_sae: int, seed: int) -> None:
        super().__init__()
        draw = torch.randn(d_sae, d_in, generator=torch_stream(seed, "tied"))
        self.weight = nn.Parameter(nn.functional.normalize(draw, dim=1))
        self.bias = nn.Parameter(torch.zeros(d_in))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.bias) @ self.weight.T)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.weight + self.bias

    def loss(self, x: Tensor) -> Tensor:
        f = self.encode(x)
        return (self.decode(f) - x).square().mean() + 1e-3 * f.sum(1).mean()


class TestModuleCell:
    def cell(self, activations: MemorySource, build: Any = Tied, **changes: Any) -> ModuleCell:
        sample = activations.shard(0).rows()[0]
        return ModuleCell("own", build, D_SAE, train_config(60, **changes), sample, 3)

    def test_trains_beside_others(self, activations: MemorySource) -> None:
        cells = [self.cell(activations), self.cell(activations)]
        alone, among = cell_of(activations, "a"), cell_of(activations, "a")
        assert not run(activations, cells[0], among)
        assert not run(activations, cells[1]) and not run(activations, alone)
        loss = cells[0].log.columns["loss"]
        assert loss[-5:].mean() < 0.5 * loss[:3].mean()
        for one, other in zip(cells[0].sae.parameters(), cells[1].sae.parameters(), strict=True):
            assert torch.equal(one, other)
        assert_bitwise(alone, among)
        assert cells[0].sae.d_in == D_IN and cells[0].sae.d_sae == D_SAE
        assert not cells[0].sae.training and cells[0].tokens == 60 * SIZE

    def test_positions(self, activations: MemorySource) -> None:
        cell = self.cell(activations, positions=(0, 3))
        cell.step(next(batches(activations, 3, SIZE, "contexts"))[0])
        assert cell.tokens == SIZE // CONTEXT * 2

    def test_stops_alone_at_nan(self, activations: MemorySource) -> None:
        class Bad(Tied):
            def loss(self, x: Tensor) -> Tensor:
                return super().loss(x) * math.nan

        failures = run(activations, self.cell(activations, Bad), other := cell_of(activations))
        assert list(failures) == ["own"] and failures["own"].step == 0
        assert other.done

    def test_what_a_module_needs(self, activations: MemorySource) -> None:
        class NoLoss(nn.Module):
            def __init__(self, *_: Any) -> None:
                super().__init__()
                self.encode = self.decode = lambda x: x

        class NothingToTrain(Tied):
            def __init__(self, *a: Any) -> None:
                super().__init__(*a)
                self.requires_grad_(False)

        with pytest.raises(SettingError, match=r"own: module.*needs loss\(x\)"):
            self.cell(activations, NoLoss)
        with pytest.raises(SettingError, match="has nothing to train"):
            self.cell(activations, NothingToTrain)


class TestInitialise:
    def test_all_arms_start_alike(self, activations: MemorySource) -> None:
        a, b = (
            cell_of(activations, sae=sae_config(**VARIANTS[v])).sae for v in ("relu", "jumprelu")
        )
        assert torch.equal(a.W_dec, b.W_dec) and torch.equal(a.W_enc, b.W_enc)

    def test_by_definition(self, activations: MemorySource) -> None:
        sample, sae = activations.shard(0).rows()[0], cell_of(activations).sae
        torch.testing.assert_close(sae.b_dec.detach() * sae.scale, sample.mean(0))
        scaled = (sample - sample.mean(0)) / sae.scale
        assert float(scaled.square().sum(1).mean()) == pytest.approx(D_IN, rel=1e-5)
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(D_SAE))
        assert torch.equal(sae.W_enc, sae.W_dec) and not sae.b_enc.any()

    def test_constant_activations_are_refused(self) -> None:
        with pytest.raises(SettingError, match="are constant"):
            sae_config().build(4).initialise(torch.ones(10, 4), 0)

    def test_activations_whose_scale_is_not_finite_are_refused(self) -> None:
        sample = torch.randn(8, D_IN, generator=torch_stream(0, "test rows"))
        sample[3, 0] = 1e30
        with pytest.raises(SettingError, match="too large or not finite"):
            sae_config().build(D_IN).initialise(sample, 0)

    def test_zero_weights_are_refused(self) -> None:
        with pytest.raises(SettingError, match="W_enc = 0: is all zero"):
            sae_config().build(4).check_alive()


# ---- golden: three steps against plain torch -------------------------------------------------


def waves(*shape: int, phase: float) -> Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + phase).view(shape)


def reference(
    w: dict[str, Tensor], x: Tensor, scale: float, coefficient: float
) -> Iterator[Tensor]:
    """ReLU + L1 in plain torch, float64: forward, clipping to norm 1, and Adam written out."""
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in w.items()}
    for step in range(3):
        for tensor in w.values():
            tensor.requires_grad_().grad = None
        xn = x[step] / scale
        f = torch.relu((xn - w["b_dec"]) @ w["W_enc"].T + w["b_enc"])
        mse = (f @ w["W_dec"] + w["b_dec"] - xn).square().mean()
        sparsity = (f * w["W_dec"].norm(dim=1)).sum() / len(xn) / xn.shape[1] ** 0.5
        loss = mse + coefficient * sparsity
        loss.backward()
        grads = {name: t.grad for name, t in w.items() if t.grad is not None}
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        rate = 1e-2 * min(1.0, (step + 1) / 2, (3 - step) / 1)  # warm-up over 2 steps, no decay
        with torch.no_grad():
            for name, g in grads.items():
                g = g * min(1.0, 1.0 / norm)
                m, v = moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                w[name].sub_(rate * m_hat / (v_hat.sqrt() + 1e-8))
        yield loss.detach()


@pytest.mark.parametrize(("bias", "sparse"), [(0.0, False), (-2.6, True)])
def test_golden_three_steps(bias: float, sparse: bool) -> None:
    d_in, d_sae, n = 5, 24, 12
    x = waves(3, n, d_in, phase=0.3) + waves(3, n, 1, phase=0.1)
    weights = {
        "W_enc": waves(d_sae, d_in, phase=1.0),
        "b_enc": bias + 0.1 * waves(d_sae, phase=0.5),
        "W_dec": 0.3 * waves(d_sae, d_in, phase=2.0),
        "b_dec": 0.2 * waves(d_in, phase=0.7),
    }
    losses = ["reconstruction", {"kind": "l1", "coefficient": 0.05}]
    config = SAEConfig.parse(
        {"d_sae": d_sae, "losses": losses, "controllers": [], "precision": "float32"}
    )
    training = TrainConfig(tokens=3 * n, batch_size=n, lr=1e-2, warmup=2 / 3, decay=0)
    cell = Cell("golden", config, training, x[0].float(), 0)
    with torch.no_grad():
        for name, tensor in weights.items():
            getattr(cell.sae, name).copy_(tensor)
        scale = float(cell.sae.scale.fill_(0.9))
    assert (cell.sae(x[0].float()).code.support is not None) == sparse
    for step, wanted in enumerate(reference(weights, x, scale, 0.05)):
        record = cell.step(Batch(x[step].float(), torch.zeros(n, dtype=torch.int64)))
        assert record["loss"] == pytest.approx(float(wanted), rel=1e-6)
        for name, tensor in weights.items():
            got = getattr(cell.sae, name).detach()
            torch.testing.assert_close(got, tensor.detach().float(), rtol=1e-6, atol=1e-6)
    assert isinstance(cell.sae, SAE)


def test_loss_of_a_pass_by_hand() -> None:
    """Two latents, one row: z = (2, -1), f = (2, 0), x_hat = (2, 0), x = (2, -1)."""
    config = SAEConfig.parse(
        {
            "d_sae": 2,
            "losses": ["reconstruction", {"kind": "l1", "coefficient": 0.5}],
            "controllers": [],
            "precision": "float32",
        }
    )
    sae = config.build(2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    p: Pass = sae(torch.tensor([[2.0, -1.0]]))
    assert p.code.dense().tolist() == [[2, 0]] and p.recon.tolist() == [[2, 0]]
    terms = {name: float(term.loss(p).detach()) for name, term in sae.loss_terms().items()}
    assert terms["reconstruction"] == pytest.approx(1 / 2)
    assert terms["l1"] == pytest.approx(0.5 * 2 / math.sqrt(2))


class TestInitialBias:
    """`initial_l0`: b_enc starts at the constant that gives it."""

    @pytest.mark.parametrize("activation", ["relu", "jumprelu"])
    @pytest.mark.parametrize("scaling", [None, {"kind": "variance", "tau": 0.5}])
    def test_l0_at_the_start(
        self, activations: MemorySource, activation: str, scaling: dict[str, Any] | None
    ) -> None:
        sample = activations.shard(0).rows()[0]
        losses = ["reconstruction"]
        settings = {"activation": activation, "losses": losses, "scaling": scaling}
        for l0 in (1, 3, D_SAE):
            sae = sae_config(initial_l0=l0, controllers=[], **settings).build(D_IN)
            sae.initialise(sample, 0)
            found = (sae.eval().encode(sample) > 0).float().sum(1).mean()
            assert float(found) == pytest.approx(l0, rel=0.02)
            if scaling is None:
                assert sae.b_enc.unique().numel() == 1

    @pytest.mark.parametrize(
        "settings",
        [{"activation": {"kind": "topk", "k": 2}}, {"activation": "relu", "encoder_bias": False}],
    )
    def test_no_bias_where_it_would_mean_nothing(
        self, activations: MemorySource, settings: dict[str, Any]
    ) -> None:
        config = sae_config(initial_l0=2, losses=["reconstruction"], controllers=[], **settings)
        sae = config.build(D_IN)
        sae.initialise(activations.shard(0).rows()[0], 0)
        assert not sae.b_enc.any()
