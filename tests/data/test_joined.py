"""Several hook points side by side: rows belong together, identities are checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pairs import READ, WRITTEN, hook_sources, pair_source

from saelab.data.activations.joined import (
    JoinedShard,
    JoinedSource,
    Paths,
    joined,
    target_hooks,
    target_rows,
    widths,
)
from saelab.data.activations.store import MemorySource
from saelab.data.activations.stream import Position, batches
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.training.sample import initial_sample


def test_one_input_without_a_target_is_itself() -> None:
    (source,) = hook_sources([READ])
    assert joined([source]) is source
    assert target_rows(source.shard(0)) is None and widths(source) == ((READ,), ())
    assert target_hooks(source) == ("hook.0",)


def test_rows_belong_together() -> None:
    a, b, c = hook_sources([READ, 5, WRITTEN])
    source = JoinedSource([a, b], [c])
    assert source.d == READ + 5 and widths(source) == ((READ, 5), (WRITTEN,))
    assert target_hooks(source) == ("hook.2",) and source.header["hook_name"] == "hook.0, hook.1"
    assert target_hooks(joined([a, b])) == ("hook.0", "hook.1")
    for i in range(source.n_shards):
        shard = source.shard(i)
        assert isinstance(shard, JoinedShard)
        x, positions = shard.rows()
        y = shard.target_rows()
        for whole, place, part in ((x, slice(0, READ), a), (x, slice(READ, None), b), (y, ..., c)):
            rows, at = part.shard(i).rows()
            assert torch.equal(whole[:, place] if place is not ... else whole, rows)
            assert torch.equal(at, positions)


def test_a_single_input_is_not_copied() -> None:
    a, b = hook_sources([READ, WRITTEN])
    shard = JoinedSource([a], [b]).shard(1)
    assert shard.x.data_ptr() == a.shard(1).x.data_ptr()
    assert shard.y is not None and shard.y.data_ptr() == b.shard(1).x.data_ptr()


@pytest.mark.parametrize("layout", ["rows", "contexts"])
def test_batches_keep_rows_and_targets_together(layout: str) -> None:
    a, b = hook_sources([READ, WRITTEN])
    source, alone = JoinedSource([a], [b]), batches(a, 3, 16, layout)  # type: ignore[arg-type]
    whole = dict(zip(map(bytes_of, a_rows(a)), a_rows(b), strict=True))
    stream, places = batches(source, 3, 16, layout), []  # type: ignore[arg-type]
    for _ in range(30):
        (batch, place), (other, _) = next(stream), next(alone)
        places.append(place)
        rows = batch.rows()
        assert torch.equal(rows.x, other.rows().x) and rows.y is not None
        for x, y in zip(rows.x, rows.y, strict=True):
            assert torch.equal(whole[bytes_of(x)], y)
        part = rows.part(slice(2, 7))
        assert part.y is not None and torch.equal(part.y, rows.y[2:7])
        late = rows.within(4, 8)
        assert late.y is not None and torch.equal(late.y, rows.y[rows.positions >= 4])
    again = batches(source, 3, 16, layout, places[6])  # type: ignore[arg-type]
    resumed, straight = next(again)[0], batches(source, 3, 16, layout)  # type: ignore[arg-type]
    wanted = [next(straight)[0] for _ in range(8)][7]
    assert torch.equal(resumed.x, wanted.x) and torch.equal(resumed.y, wanted.y)
    assert places[6] != Position()


def a_rows(source: MemorySource) -> torch.Tensor:
    return torch.cat([source.shard(i).rows()[0] for i in range(source.n_shards)])


def bytes_of(x: torch.Tensor) -> bytes:
    return x.numpy().tobytes()


def test_the_sample_leaves_out_rows_that_are_not_finite_on_either_side() -> None:
    a, b = hook_sources([READ, WRITTEN])
    a.shard(0).x[0, 1, 2], b.shard(0).x[0, 3, 1] = float("nan"), float("inf")
    sample = initial_sample(JoinedSource([a], [b]))
    assert sample.y is not None and len(sample.x) == len(sample.y) == a.shard_counts[0] - 2
    assert bool(sample.x.isfinite().all()) and bool(sample.y.isfinite().all())
    assert (sample.d_in, sample.d_out) == (READ, (WRITTEN,))
    b.shard(0).x[:] = 1.0
    with pytest.raises(SourceError, match="rows of the training targets are the same"):
        initial_sample(JoinedSource([a], [b]))


@pytest.mark.parametrize("field", ["text_digest", "model_digest", "n_contexts", "shard_contexts"])
def test_sources_of_two_harvests_are_refused(field: str) -> None:
    a, b = hook_sources([READ, WRITTEN])
    b.header[field] = "another"
    with pytest.raises(MismatchError, match=f"hook.0 and hook.1 differ in {field}.*in one pass"):
        JoinedSource([a], [b])


def test_shards_that_count_other_positions_are_refused() -> None:
    a, b = hook_sources([READ, WRITTEN])
    shard = b.shard(1)
    mask = shard.mask.clone()
    mask[0, 0] = True
    other = MemorySource([b.shard(0), replace(shard, mask=mask)], b.header)
    other.header["n_tokens"] = a.header["n_tokens"]
    source = JoinedSource([a], [other])
    source.shard(0)
    with pytest.raises(DamageError, match="shard 1 at hook.0 counts other positions"):
        source.shard(1)


def test_the_digest_is_of_all_sources_and_their_roles() -> None:
    a, b, c = hook_sources([READ, WRITTEN, WRITTEN])
    digests = {
        source.digest
        for source in (a, joined([a], [b]), joined([b], [a]), joined([a, b]), joined([a], [c]))
    }
    assert len(digests) == 5
    assert pair_source().digest == pair_source().digest


def test_paths_are_for_sources_in_folders() -> None:
    with pytest.raises(SourceError, match="needs its activations in a folder"):
        _ = JoinedSource(hook_sources([READ, 5])).path  # type: ignore[attr-defined]
    assert Paths(("a",), ("b",)).all == ("a", "b")  # type: ignore[arg-type]
