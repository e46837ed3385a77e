"""The stream of batches: complete, decided by seed and buffer alone, resumable anywhere."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.data.activations.store import MemorySource, Shard
from saelab.data.activations.stream import Batch, Layout, Position, batches, steps_in
from saelab.errors import SettingError

CONTEXT = 4


def source(*contexts: int, masked: bool = True) -> MemorySource:
    """Row r of the whole source has value r in its first dimension; position 0 does not count."""
    shards, first = [], 0
    for count in contexts:
        x = torch.arange(first, first + count * CONTEXT, dtype=torch.float32).view(
            count, CONTEXT, 1
        )
        first += count * CONTEXT
        mask = torch.ones(count, CONTEXT, dtype=torch.bool)
        mask[:, 0] = not masked
        shards.append(Shard(torch.cat([x, -x], dim=2), mask))
    return MemorySource(shards, {})


def take(n: int, *args: Any, **named: Any) -> list[tuple[Batch, Position]]:
    return list(itertools.islice(batches(*args, **named), n))


def ids(pairs: list[tuple[Batch, Position]]) -> list[int]:
    return [int(value) for batch, _ in pairs for value in batch.x[..., 0].flatten()]


class TestRows:
    @given(st.integers(0, 2**31), st.integers(1, 9))
    def test_each_row_at_most_once_per_buffer(self, seed: int, size: int) -> None:
        data = source(5, 3)  # 15 and 9 counted rows
        per_buffer = [15 // size, 9 // size]
        pairs = take(sum(per_buffer) * 2, data, seed, size)
        start = 0
        for buffer, count in enumerate(per_buffer * 2):
            some = pairs[start : start + count]
            start += count
            rows = ids(some)
            allowed = set(data.shard(buffer % 2).rows()[0][:, 0].int().tolist())
            assert len(set(rows)) == len(rows) == count * size and set(rows) <= allowed
            assert all(position.buffer == buffer for _, position in some)

    def test_exactly_once_when_it_divides(self) -> None:
        data = source(5, 3)
        assert sorted(ids(take(5, data, 1, 3))) == sorted(
            data.shard(0).rows()[0][:, 0].int().tolist()
        )

    def test_rows_keep_their_position_and_their_other_values(self) -> None:
        for batch, _ in take(8, source(5, 3), 0, 3):
            assert batch.n == 3 and batch.x.dtype == torch.float32
            assert torch.equal(batch.positions, batch.x[:, 0].long() % CONTEXT)
            assert torch.equal(batch.x[:, 1], -batch.x[:, 0])
            assert batch.rows() is batch

    def test_order_is_that_of_seed_and_buffer_alone(self) -> None:
        """Other buffers, another batch size or another start do not change a buffer's order."""
        whole = ids(take(5, source(5, 3), 7, 3))
        assert whole == ids(take(3, source(5), 7, 5))
        both = ids(take(8, source(5, 3), 7, 3))
        assert both[15:] == ids(take(3, source(5, 3), 7, 3, start=Position(1, 0)))
        assert ids(take(5, source(5, 3), 7, 3)) == whole

    def test_seeds_and_passes_differ(self) -> None:
        one, other = ids(take(5, source(5), 7, 3)), ids(take(5, source(5), 8, 3))
        assert one != other and sorted(one) == sorted(other)
        two_passes = ids(take(10, source(5), 7, 3))
        assert two_passes[:15] == one and two_passes[15:] != one
        assert sorted(two_passes[15:]) == sorted(one)

    @given(st.integers(0, 13))
    def test_resumes_exactly(self, stop: int) -> None:
        data = source(5, 3)
        whole = take(20, data, 3, 4)
        _, position = whole[stop]
        rest = take(20 - stop - 1, data, 3, 4, start=position)
        assert ids(rest) == ids(whole[stop + 1 :])
        assert [p for _, p in rest] == [p for _, p in whole[stop + 1 :]]

    def test_global_generator_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        take(8, source(5, 3), 0, 3)
        assert torch.equal(torch.get_rng_state(), before)


class TestContexts:
    def test_whole_contexts_in_order(self) -> None:
        pairs = take(2, source(5, masked=True), 0, 2 * CONTEXT, "contexts")
        seen = []
        for batch, _ in pairs:
            assert batch.x.shape == (2, CONTEXT, 2) and batch.positions.shape == (2, CONTEXT)
            assert torch.equal(batch.positions, torch.arange(CONTEXT).expand(2, CONTEXT))
            assert (batch.x[..., 0].diff(dim=1) == 1).all()
            assert batch.mask is not None and not batch.mask[:, 0].any()
            rows = batch.rows()
            assert rows.n == 2 * (CONTEXT - 1) and rows.mask is None
            assert torch.equal(rows.positions, rows.x[:, 0].long() % CONTEXT)
            seen += (batch.x[:, 0, 0].int() // CONTEXT).tolist()
        assert len(set(seen)) == 4

    def test_resumes_exactly(self) -> None:
        data = source(5, 3)
        whole = take(9, data, 3, CONTEXT, "contexts")
        assert ids(take(6, data, 3, CONTEXT, "contexts", start=whole[2][1])) == ids(whole[3:])

    def test_less_than_a_context_gives_one(self) -> None:
        assert take(1, source(5), 0, 1, "contexts")[0][0].x.shape == (1, CONTEXT, 2)


class TestWithin:
    def test_positions(self) -> None:
        batch = Batch(torch.arange(6.0).view(6, 1), torch.tensor([0, 1, 2, 3, 1, 5]))
        some = batch.within(1, 3)
        assert some.x.flatten().tolist() == [1, 2, 4] and some.positions.tolist() == [1, 2, 1]


@pytest.mark.parametrize("layout", ["rows", "contexts"])
@pytest.mark.parametrize("contexts", [(2,), (2, 1), (1, 2, 1)])
def test_shards_below_one_batch_are_refused(layout: Layout, contexts: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=r"batch_size = 16.*lower the batch size"):
        next(batches(source(*contexts), 0, 16, layout))


def test_a_short_last_shard_is_passed_over() -> None:
    pairs = take(4, source(3, 1), 0, 9)
    assert [position.buffer for _, position in pairs] == [0, 2, 4, 6]


def test_steps_in() -> None:
    data = source(5, 3)
    assert [steps_in(data, size) for size in (1, 2, 4, 9, 10, 16)] == [24, 11, 5, 2, 1, 0]


def test_stored_half_precision_arrives_as_float32() -> None:
    def half(x: Tensor) -> Tensor:
        return x.to(torch.float16)

    shard = source(5).shard(0)
    data = MemorySource([Shard(half(shard.x), shard.mask)], {})
    for layout in ("rows", "contexts"):
        assert take(1, data, 0, 4, layout)[0][0].x.dtype == torch.float32
