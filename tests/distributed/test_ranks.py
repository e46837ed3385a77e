"""One SAE on several ranks is the SAE of one process; no rank holds a whole matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_ranks import alone, in_ranks
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from saelab import checkpoint
from saelab.checks.examples import Case, cases
from saelab.cli import app
from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Batch, Position, batches
from saelab.distributed.ranks import ALONE, Ranks
from saelab.errors import CellFailure, MismatchError, SettingError, SourceError
from saelab.evals.core import CoreData, evaluate_core
from saelab.kernels import Code, Support, kernels_for, support_of_topk, topk_over_ranks
from saelab.kernels.over_ranks import gather_code, select_latents
from saelab.launch import cell_key
from saelab.parts.base import Dims
from saelab.sae import ROWS_DRAWN_AT_ONCE, SAEConfig, _normal_rows
from saelab.seeding import torch_stream
from saelab.training.loop import Cell, train
from saelab.training.optim import TrainConfig
from saelab.training.resume import restore_cell, write_checkpoint

D_IN, D_SAE, SIZE, STEPS, SEED = 16, 130, 50, 100, 3
#: What studies.md promises of the loss over 100 steps, relative, in float32.
PROMISE = 1e-5

RESAMPLING = {"kind": "resampling", "every": 0.1, "patience": 60}
CASES: dict[str, dict[str, Any]] = {
    "relu": {"initial_l0": 6, "observers": [RESAMPLING]},
    "topk": {
        "activation": {"kind": "topk", "k": 6},
        "losses": ["reconstruction", {"kind": "auxk", "dead_after": 60}],
        "controllers": [],
        "constraints": ["unit_norm"],
    },
    "batchtopk": {
        "activation": {"kind": "batchtopk", "k": 6},
        "losses": ["reconstruction"],
        "controllers": [],
    },
    "jumprelu": {
        "activation": "jumprelu",
        "losses": ["reconstruction", "l0"],
        "constraints": ["unit_norm"],
    },
    "scaled": {
        "initial_l0": 6,
        "scaling": {"kind": "variance", "tying": "per_feature"},
        "losses": ["reconstruction", "l1", "scalar_prior"],
        "observers": [{"kind": "lifetimes", "base_steps": 1, "base_share": 0.0}],
    },
    "tied": {"tied": True, "scaling": "centring", "initial_l0": 6},
    "annealed": {
        "activation": {"kind": "topk", "k": "k"},
        "losses": ["reconstruction"],
        "controllers": [{"kind": "annealed_k", "start": 12, "end": 4}],
        "scaling": "whitening",
    },
    "frozen": {
        "losses": ["reconstruction", {"kind": "l1", "coefficient": "sparsity"}],
        "controllers": [{"kind": "ramp", "value": 0.05}],
        "constraints": ["frozen"],
        "precision": "float32",
    },
}


def source(d_in: int = D_IN, contexts: int = 40) -> MemorySource:
    """Sums of a few of 24 unit directions, with a little noise and a mean, in two shards."""
    stream = torch_stream(0, "ranks data")
    directions = nn.functional.normalize(torch.randn(24, d_in, generator=stream), dim=1)
    shards = []
    for _ in range(2):
        shape = (contexts, 16, 24)
        f = torch.rand(shape, generator=stream) * (torch.rand(shape, generator=stream) < 0.12)
        noise = 0.02 * torch.randn(contexts, 16, d_in, generator=stream)
        shards.append(Shard(f @ directions + noise + 0.5, torch.ones(shape[:2], dtype=torch.bool)))
    return MemorySource(shards, {})


def config(case: str, **changes: Any) -> SAEConfig:
    data: dict[str, Any] = {
        "d_sae": D_SAE,
        "controllers": [{"kind": "l0_target", "target": 6}],
        "precision": "float32",
    }
    return SAEConfig.parse(data | CASES[case] | changes)


def cell(ranks: Ranks, sae: SAEConfig, data: MemorySource, steps: int = STEPS) -> Cell:
    training = TrainConfig(tokens=steps * SIZE, batch_size=SIZE, lr=2e-3)
    sample = data.shard(0).rows()[0][:400]
    return Cell("cell", sae, training, sample, SEED, ranks=ranks)


def settings_of(name: str) -> SAEConfig:
    """The settings of a combination above, or of the example of a part."""
    examples = {str(case): case for case in cases(D_SAE)}
    return examples[name].settings(D_SAE) if name in examples else config(name)


def curves(ranks: Ranks, names: list[str], steps: int = STEPS) -> dict[str, dict[str, np.ndarray]]:
    """The log of each case; and b_dec, which every rank has."""
    found = {}
    for case in names:
        data = source()
        one = cell(ranks, settings_of(case), data, steps)
        assert not train([one], batches(data, SEED, SIZE))
        columns = {name: values[: one.log.length] for name, values in one.log.columns.items()}
        found[case] = columns | {"b_dec": one.sae.b_dec.detach().numpy()}
    return found


def assert_agree(data: int, latents: int, names: list[str], steps: int = STEPS) -> None:
    wanted, found = alone(curves, names, steps), in_ranks(data, latents, curves, names, steps)
    for case in names:
        one, many = wanted[case], found[0][case]
        assert one.keys() == many.keys()
        for other in found[1:]:  # bit by bit, b_dec too
            for name, values in other[case].items():
                np.testing.assert_array_equal(values, many[name], err_msg=f"{case} {name}")
        moves = np.ptp(one["loss"]) / min(1, one["loss"][0])
        assert len(one["loss"]) == steps and moves > 1e-3 * steps
        np.testing.assert_allclose(many["loss"], one["loss"], rtol=PROMISE, err_msg=case)
        for name in ("l0", "grad_norm", "dead", "resampled", "lifetime.mean_age", "threshold"):
            if name in one:
                np.testing.assert_allclose(many[name], one[name], rtol=1e-3, err_msg=name)


def works_on_ranks(case: Case) -> bool | str:
    """Says whether every part of the example's SAE does: "rows" where only rows can be split."""
    kinds = {part.shardable for part in case.settings(D_SAE).outline(D_IN).parts()}
    return False if False in kinds else "rows" if "rows" in kinds else True


SHARDABLE = [str(case) for case in cases(D_SAE) if works_on_ranks(case) is True]
BY_ROWS = [case for case in cases(D_SAE) if works_on_ranks(case) == "rows"]
UNSHARDABLE = [case for case in cases(D_SAE) if not works_on_ranks(case)]


class TestAgreement:
    def test_rows_and_latents(self) -> None:
        assert_agree(2, 2, ["relu", "topk"])

    @pytest.mark.slow
    @pytest.mark.parametrize(("data", "latents"), [(2, 2), (2, 1), (1, 2), (4, 1), (1, 4)])
    def test_other_splits(self, data: int, latents: int) -> None:
        assert_agree(data, latents, list(CASES))

    def test_the_example_of_every_part(self) -> None:
        """All of them in one start of the processes."""
        assert len(SHARDABLE) > 20
        assert_agree(2, 2, SHARDABLE, 8)

    def test_parts_that_need_all_latents_on_every_rank(self) -> None:
        pursuits = {"matching_pursuit", "orthogonal_matching_pursuit"}
        assert {case.kind for case in BY_ROWS} >= {*pursuits, "ista"}
        assert_agree(2, 1, [str(case) for case in BY_ROWS], 8)

    def test_cases_reach_what_they_are_for(self) -> None:
        found = alone(curves, ["relu", "topk", "scaled"])
        assert found["relu"]["resampled"][-1] > 0
        assert found["topk"]["loss.auxk"].max() > 0
        assert found["scaled"]["lifetime.resamplings"][-1] > 0


# ---- memory, files, evaluation ---------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns; one on the meta device has none."""

    bytes_ = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.bytes_ = max(self.bytes_, leaf.numel() * leaf.element_size())
        return out


WIDE, LATENTS = 64, 512


def held_out() -> MemorySource:
    shard = source(WIDE, 10).shard(1)
    return MemorySource([Shard(shard.x, shard.mask)], {})


def metrics(subject: Any) -> dict[str, float]:
    rows = evaluate_core(subject, CoreData(held_out(), None))
    return {f"{row.metric} {row.slice}": row.value for row in rows if row.value is not None}


def life(ranks: Ranks, case: str, folder: Path) -> dict[str, Any]:
    """An SAE is made, trained, checkpointed, saved, loaded and evaluated."""
    data = source(WIDE, 10)
    with Largest() as largest:
        one = cell(ranks, config(case, d_sae=LATENTS, initial_l0=6), data, 12)
        train([one], batches(data, SEED, SIZE))
        write_checkpoint(folder, one.state(), 12, Position(), 0.0, one.shards())
        checkpoint.save(one.sae, folder, {"seed": SEED})
        again, _ = checkpoint.load(folder, ranks=ranks)
        x = data.shard(0).rows()[0][:20]
        code = again.encode(x)
        found = {
            "metrics": metrics(again),
            "code": code,
            "decoded": again.decode(code),
            "loss": one.log.columns["loss"],
        }
    return found | {"largest": largest.bytes_}


class TestWhole:
    @pytest.mark.parametrize("case", ["topk", pytest.param("jumprelu", marks=pytest.mark.slow)])
    def test_no_rank_holds_a_matrix_and_files_are_those_of_one_process(
        self, case: str, tmp_path: Path
    ) -> None:
        many, *others = in_ranks(1, 4, life, case, tmp_path / "four")
        one = alone(life, case, tmp_path / "one")
        matrix = LATENTS * WIDE * 4
        assert one["largest"] >= matrix  # so the check can fail
        for rank in (many, *others):
            assert rank["largest"] < matrix
            assert rank["metrics"] == many["metrics"]
            assert torch.equal(rank["code"], many["code"])
        np.testing.assert_allclose(many["loss"], one["loss"], rtol=PROMISE)
        loaded, _ = checkpoint.load(tmp_path / "four")
        alike = metrics(loaded)
        assert alike.keys() == many["metrics"].keys() == one["metrics"].keys()
        for name, value in many["metrics"].items():
            assert value == pytest.approx(alike[name], rel=1e-5, abs=1e-7), name
        x = source(WIDE, 10).shard(0).rows()[0][:20]
        torch.testing.assert_close(many["code"], loaded.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(many["decoded"], loaded.decode(many["code"]))
        checkpoint.save(loaded, tmp_path / "again", {"seed": SEED})
        files = [tmp_path / name / "sae.safetensors" for name in ("four", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_a_file_is_the_one_that_safetensors_writes(self, tmp_path: Path) -> None:
        sae = cell(ALONE, config("scaled"), source()).sae
        checkpoint.save(sae, tmp_path, {})
        save_file({n: t.detach() for n, t in sae.state_dict().items()}, tmp_path / "theirs")
        assert (tmp_path / "sae.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()

    def test_initial_rows_are_one_draw(self, global_random_seed: int) -> None:
        for rows, width in (
            (3 * ROWS_DRAWN_AT_ONCE + 5, 7),
            (5, 3),
            (2 * ROWS_DRAWN_AT_ONCE - 1, 16),
            (ROWS_DRAWN_AT_ONCE, 1),
        ):
            whole = torch.randn(rows, width, generator=torch_stream(global_random_seed, "rows"))
            pieces = list(_normal_rows(rows, width, torch_stream(global_random_seed, "rows")))
            assert torch.equal(torch.cat([drawn for _, drawn in pieces]), whole)
            assert max(len(drawn) for _, drawn in pieces) < 2 * ROWS_DRAWN_AT_ONCE


def stretch(ranks: Ranks, case: str, folder: Path, until: int) -> np.ndarray:
    """Goes on from the last checkpoint to a step and writes one there; the losses so far."""
    data = source()
    kept = restore_cell(lambda: cell(ranks, config(case), data), folder)
    one, position = kept.cell, kept.position
    stream: Iterator[tuple[Batch, Position]] = batches(data, SEED, SIZE, start=position)
    while one.steps_done < until:
        batch, position = next(stream)
        one.step(batch)
    write_checkpoint(folder, one.state(), until, position, 0.0, one.shards())
    return one.log.columns["loss"][:until]


@pytest.mark.parametrize("case", ["relu", pytest.param("jumprelu", marks=pytest.mark.slow)])
def test_training_goes_on_with_another_number_of_ranks(case: str, tmp_path: Path) -> None:
    whole = alone(stretch, case, tmp_path / "whole", STEPS)
    first = in_ranks(2, 2, stretch, case, tmp_path / "parts", 40)
    assert all(np.array_equal(losses, first[0]) for losses in first)
    second = in_ranks(1, 2, stretch, case, tmp_path / "parts", 70)
    np.testing.assert_array_equal(second[0][:40], first[0])
    last = alone(stretch, case, tmp_path / "parts", STEPS)
    np.testing.assert_array_equal(last[:70], second[0])
    np.testing.assert_allclose(last, whole, rtol=PROMISE)


# ---- collectives -----------------------------------------------------------------------------


def primitives(ranks: Ranks) -> dict[str, Any]:
    """Each collective on numbers whose answers are known."""
    own = ranks.own(7)
    z = torch.randn(5, 7, generator=torch_stream(0, "primitives"))
    z[2, 1] = z[2, 5] = 9.0  # a tie across ranks: the lower latent comes first
    mine = z[:, own].clone()
    support = topk_over_ranks(mine, 2, ranks)
    code = Code(mine.flatten()[support.flat], mine.flatten()[support.flat], support)
    whole = gather_code(code, 7, ranks)
    part = select_latents(whole, own)
    x = torch.tensor([2.0], requires_grad=True)
    ranks.over_latents(ranks.spread(x) * (ranks.part_of_latents + 1)).sum().backward()
    before = ranks.payload
    ranks.over_rows(torch.ones(3))
    sent = ranks.payload - before
    failure = ""
    try:
        ranks.on_first(lambda: (_ for _ in ()).throw(SourceError("told to all")))
    except SourceError as error:
        failure = str(error)
    return {
        "topk": whole.dense(),
        "mine": torch.equal(part.dense(), code.dense()),
        "kth": float(ranks.kth_largest(mine.flatten(), 4)),
        "few": float(ranks.kth_largest(mine.flatten()[:0], 4)),
        "mean": float(ranks.mean_over_latents(mine[0])),
        "before": ranks.before(own.stop - own.start),
        "total": ranks.total(1.0, own.start),
        "smallest": float(ranks.smallest(torch.tensor(-float(ranks.rank)))),
        "gradient": float(x.grad) if x.grad is not None else None,
        "rows": [ranks.rows(5).start, ranks.rows(5).stop],
        "bytes": sent,
        "first": ranks.on_first(lambda: ranks.rank),
        "failure": failure,
        "z": z,
    }


def test_collectives() -> None:
    found = in_ranks(2, 2, primitives)
    z = found[0]["z"]
    wanted = support_of_topk(kernels_for(z.device).topk(z, 2), 7)
    top = Code(z.flatten()[wanted.flat], z.flatten()[wanted.flat], wanted).dense()
    for rank, one in enumerate(found):
        assert torch.equal(one["topk"], top) and one["mine"]
        assert one["kth"] == float(z.flatten().sort(descending=True).values[3])
        assert one["few"] == -math.inf
        assert one["mean"] == pytest.approx(float(z[0].mean()), rel=1e-6)
        assert one["before"] == ((0, 7), (3, 7))[rank % 2]
        assert one["total"] == [4.0, 6.0]
        assert one["smallest"] == -3 and one["gradient"] == 3.0  # 1 + 2
        assert one["rows"] == ([0, 2], [2, 5])[rank // 2]
        assert one["bytes"] == 12 and one["first"] == 0 and one["failure"] == "told to all"


def test_one_rank_sends_nothing() -> None:
    one = primitives(Ranks())
    assert one["bytes"] == 0 and one["failure"] == "told to all"
    assert Ranks().rows(5) == slice(0, 5) and ALONE.payload == 0


# ---- what a part declares, and what is refused -----------------------------------------------


@pytest.mark.parametrize("case", cases(64), ids=str)
def test_tensors_per_latent_are_declared(case: Case) -> None:
    part = case.part.build(Dims(4, 64))
    if part.shardable is not True:
        pytest.skip("its latents are not split")
    split = case.part.build(Dims(4, 64, ranks=Ranks(1, 4, 1)))
    whole = {n: t.shape for n, t in [*part.named_parameters(), *part.named_buffers()]}
    own = {n: t.shape for n, t in [*split.named_parameters(), *split.named_buffers()]}
    assert {name for name in whole if whole[name] != own[name]} == set(part.per_latent)
    assert all(whole[name][0] == 64 and own[name][0] == 16 for name in part.per_latent)


@pytest.mark.parametrize(("data", "latents"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("case", UNSHARDABLE, ids=str)
def test_parts_that_are_not_shardable_are_refused(case: Case, data: int, latents: int) -> None:
    sae = case.settings(D_SAE)
    sae.build(4)
    with pytest.raises(SettingError, match="works on one rank only: leave it out"):
        sae.build(4, ranks=Ranks(data, latents, 1))


@pytest.mark.parametrize("case", BY_ROWS, ids=str)
def test_parts_that_need_all_latents_are_refused_where_these_are_split(case: Case) -> None:
    sae = case.settings(D_SAE)
    sae.build(4, ranks=Ranks(2, 1, 1))
    with pytest.raises(SettingError, match=r"set parallel\.latents to 1"):
        sae.build(4, ranks=Ranks(2, 2, 1))


def test_a_batch_has_a_row_for_every_rank() -> None:
    one = cell(Ranks(), config("relu"), source())
    one.ranks = Ranks(4, 1, 3)
    with pytest.raises(CellFailure, match="a batch of 2 rows is too small for 4 ranks"):
        one.step(Batch(torch.zeros(2, D_IN), torch.zeros(2, dtype=torch.int64)))


class TestCommand:
    def refused(self, *changes: str, seeds: int = 1) -> str:
        sets = [word for change in changes for word in ("--set", change)]
        config = Path(__file__).parents[2] / "configs" / "embedded.toml"
        words = ["train", str(config), "--out_dir", "out", "--seeds", str(seeds), *sets]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output and len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_without_torchrun(self) -> None:
        assert "torchrun --nproc-per-node 6 -m saelab" in self.refused(
            "parallel.data=2", "parallel.latents=3"
        )

    def test_a_split_of_other_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert "does not split 4 processes" in self.refused("parallel.latents=3")
        assert "one SAE is trained, by several processes" in self.refused(seeds=2)
        assert "there are only 1,536 latents" in self.refused("parallel.latents=2000")

    def test_a_part_that_is_not_shardable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        told = self.refused('sae.losses+={kind = "similarity"}')
        assert "'Similarity': works on one rank only" in told
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")  # the first of each machine speaks for all
        words = ["train", str(Path(__file__).parents[2] / "configs" / "embedded.toml")]
        words += ["--out_dir", "out", "--set", 'sae.losses+={kind = "similarity"}']
        silent = CliRunner().invoke(app, words)
        assert silent.exit_code == 2 and not silent.output

    def test_a_support_stays_sorted(self) -> None:
        support = topk_over_ranks(torch.tensor([[3.0, 1.0, 2.0]]), 2, Ranks())
        assert isinstance(support, Support) and support.latents.tolist() == [0, 2]


def refusal(ranks: Ranks, others: bool) -> str:
    """The sentence of one rank, where the last one may have other kernels."""
    if others and ranks.rank == ranks.size - 1:
        cell_key.kernels_kind = lambda device: "eager"
    try:
        cell_key.check_ranks(ranks, "cpu")
    except MismatchError as error:
        return str(error)
    return ""


def test_ranks_with_different_kernels_refuse() -> None:
    assert in_ranks(1, 2, refusal, False) == ["", ""]
    first, last = in_ranks(1, 2, refusal, True)
    assert "kernels = eager" in last and first != last
    assert "machines of one kind" in first and "\n" not in first
