"""Passes side by side: the bits of one thread, in order; groups of like length."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.data.activations import parallel_passes
from saelab.data.activations.harvest import HarvestConfig, harvest
from saelab.data.activations.parallel_passes import group_by_length, lane_count, run_in_lanes
from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.probing.activations import harvest_probing
from saelab.data.probing.embedded import Entry
from saelab.data.text.tokens import Tokens
from saelab.errors import SourceError
from saelab.seeding import torch_stream

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(ModelConfig())


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel_passes, "usable_cores", lambda: 3)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_PROGRESS", "off")


def some_tokens(contexts: int = 37, positions: int = 12) -> Tokens:
    ids = torch.randint(3, 4096, (contexts, positions), generator=torch_stream(0, "test ids"))
    ids[:, 0] = 0
    return Tokens(ids, ids > 2)


def test_a_harvest_has_the_same_bits_for_any_number_of_threads(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HarvestConfig(batch=4, shard_tokens=120)
    digests = []
    for threads, cores in ((1, 3), (2, 3), (3, 3), (3, 1)):  # the last: a container's quota
        monkeypatch.setattr(parallel_passes, "usable_cores", lambda n=cores: n)
        torch.set_num_threads(threads)
        try:
            memory = harvest(model, some_tokens(), HOOKS, config)
            folder = harvest(model, some_tokens(), HOOKS, config, tmp_path / f"{threads} {cores}")
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        digests += [[made[hook].digest for hook in HOOKS] for made in (memory, folder)]
    assert all(digest == digests[0] for digest in digests)


def test_probing_rows_have_the_same_bits_for_any_number_of_threads(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, three_threads: None
) -> None:
    monkeypatch.setattr("saelab.data.probing.activations.PASS_TOKENS", 64)
    texts = {c: tuple(f"{c} = {c * n}({n})" for n in range(1, 30)) for c in ("a", "b")}
    entries = [
        Entry(name=name, classes=("a", "b"), train=texts, test=texts, source="made for a test")
        for name in ("p", "q")
    ]
    side = harvest_probing(model, HOOKS[1], entries, context=16)
    torch.set_num_threads(1)
    alone = harvest_probing(model, HOOKS[1], entries, context=16)
    assert side.digest == alone.digest


@pytest.mark.parametrize("cores", [1, 3])
def test_results_come_in_the_order_of_the_items(
    cores: int, model: LanguageModel, three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_passes, "usable_cores", lambda: cores)
    seen: set[str] = set()

    def work(twin: LanguageModel, item: int) -> int:
        seen.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        time.sleep(0.001 * (item % 3))
        return item

    assert list(run_in_lanes(model, work, range(30))) == list(range(30))
    assert len(seen) == cores


def test_twins_share_weights_but_no_hooks(model: LanguageModel) -> None:
    twin = model.twin()
    for own, other in zip(model.model.parameters(), twin.model.parameters(), strict=True):
        assert own is other
    handle = model.blocks[0].register_forward_hook(lambda *_: pytest.fail("the model ran"))
    ids = some_tokens().ids
    found = twin.activations(ids, None, HOOKS)
    handle.remove()
    wanted = model.activations(ids, None, HOOKS)
    assert all(torch.equal(found[hook], wanted[hook]) for hook in HOOKS)


def test_what_a_pass_raises_ends_the_harvest(model: LanguageModel, three_threads: None) -> None:
    started = []

    def work(twin: LanguageModel, item: int) -> int:
        started.append(item)
        if item == 4:
            raise SourceError("no such item")
        return item

    with pytest.raises(SourceError, match="no such item"):
        list(run_in_lanes(model, work, range(1000)))
    assert len(started) < 30


def test_wide_models_and_other_devices_run_one_pass_at_a_time(three_threads: None) -> None:
    assert lane_count("cpu", 768) == 3
    assert lane_count("cpu", 2304) == lane_count("cuda:0", 768) == 1


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 100))
def test_groups_hold_every_text_once_and_stay_below_the_bound(
    lengths: list[int], tokens: int
) -> None:
    sizes = torch.tensor(lengths, dtype=torch.int64)
    groups = group_by_length(sizes, tokens)
    order = torch.cat(groups) if groups else torch.empty(0, dtype=torch.int64)
    assert torch.equal(order, sizes.argsort(stable=True))
    assert all(len(g) == 1 or len(g) * int(sizes[g].max()) <= tokens for g in groups)
