"""Harvests in memory and on disk against single forward passes; interruption and reuse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_neox
from torch import Tensor

from saelab.data.activations.harvest import HarvestConfig, bytes_needed, harvest, harvest_steps
from saelab.data.activations.store import FolderSource, MemorySource
from saelab.data.language_model import LanguageModel, ModelConfig, load
from saelab.data.text.corpus import TextConfig, manifest
from saelab.data.text.tokens import Tokens, tokenize
from saelab.errors import DamageError, MismatchError, SettingError, SourceError
from saelab.seeding import torch_stream

REAL = Path(os.environ.get("SAELAB_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
STORIES = REAL / "models" / "stories-260k"
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
CONTEXT, CONTEXTS, WIDTH = 6, 11, 8


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_PROGRESS", "off")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_neox(WIDTH, 16, 0.3)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = torch.randint(2, 20, (CONTEXTS, CONTEXT), generator=torch_stream(0, "test ids"))
    ids[:, 0], ids[4, 3] = 0, 1
    return Tokens(ids, ids > 1)


class Counting:
    """Counts the contexts that the model reads; raises after `limit` of them."""

    def __init__(self, model: LanguageModel, limit: int = 1_000_000) -> None:
        self.contexts, self.limit, self._plain = 0, limit, model.activations

    def __call__(self, ids: Tensor, mask: Tensor | None, hooks: list[str]) -> dict[str, Tensor]:
        if ids.shape[1] == CONTEXT:  # not the two positions that tell the widths
            self.contexts += len(ids)
            if self.contexts > self.limit:
                raise KeyboardInterrupt
        return self._plain(ids, mask, hooks)


@pytest.fixture
def counting(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    counter = Counting(model)
    monkeypatch.setattr(model, "activations", counter)
    yield counter


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("batch", "shard_tokens"), [(3, 24), (32, 1), (2, 10_000)])
def test_shards_hold_what_one_pass_gives(
    model: LanguageModel,
    tokens: Tokens,
    tmp_path: Path,
    on_disk: bool,
    batch: int,
    shard_tokens: int,
) -> None:
    config = HarvestConfig(batch=batch, shard_tokens=shard_tokens)
    sources = harvest(model, tokens, HOOKS, config, tmp_path if on_disk else None)
    wanted = model.activations(tokens.ids, None, HOOKS)
    assert list(sources) == HOOKS
    for hook, source in sources.items():
        shards = [source.shard(i) for i in range(source.n_shards)]
        assert torch.equal(torch.cat([s.ids for s in shards if s.ids is not None]), tokens.ids)
        assert torch.equal(torch.cat([shard.mask for shard in shards]), tokens.mask)
        x = torch.cat([shard.x for shard in shards])
        torch.testing.assert_close(x, wanted[hook].clone(), rtol=1e-4, atol=1e-6)
        assert sum(source.shard_counts) == source.header["n_tokens"] == tokens.n_tokens
        assert all(shard.mask.numel() <= max(CONTEXT, shard_tokens) for shard in shards)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_padded_contexts_hold_what_each_gives_alone(
    model: LanguageModel, tokens: Tokens, batch: int
) -> None:
    lengths = torch.tensor([3, 6, 2, 5, 3, 6, 2, 2, 4, 3, 5])
    inside = torch.arange(CONTEXT) < lengths[:, None]
    padded = Tokens(tokens.ids.where(inside, 1), tokens.mask & inside, lengths)
    config = HarvestConfig(batch=batch, shard_tokens=4 * CONTEXT)
    for hook, source in harvest(model, padded, HOOKS, config).items():
        x = torch.cat([source.shard(i).x for i in range(source.n_shards)])
        masks = torch.cat([source.shard(i).mask for i in range(source.n_shards)])
        assert torch.equal(masks, padded.mask)
        assert not x[~inside].any()
        for context, length in enumerate(lengths.tolist()):
            ids = padded.ids[context : context + 1, :length]
            alone = model.activations(ids, None, [hook])[hook][0]
            torch.testing.assert_close(x[context, :length], alone.clone(), rtol=1e-4, atol=1e-6)


def test_rows_leave_out_bos_and_eos(model: LanguageModel, tokens: Tokens) -> None:
    rows, position = harvest(model, tokens, HOOKS)[HOOKS[0]].shard(0).rows()
    assert len(rows) == CONTEXTS * (CONTEXT - 1) - 1
    assert 0 not in position
    wanted = model.activations(tokens.ids, None, HOOKS)[HOOKS[0]]
    torch.testing.assert_close(rows[0], wanted[0, 1])


def test_shards_are_evened_out(model: LanguageModel, tokens: Tokens) -> None:
    source = harvest(model, tokens, HOOKS[:1], HarvestConfig(shard_tokens=5 * CONTEXT))[HOOKS[0]]
    assert [source.shard(i).mask.shape[0] for i in range(source.n_shards)] == [4, 4, 3]


def test_the_header_tells_where_activations_come_from(model: LanguageModel, tokens: Tokens) -> None:
    corpus = {"corpus": {"corpus": "words", "files": 3}}
    source = harvest(model, tokens, HOOKS, identity=corpus)[HOOKS[1]]
    wanted = {
        "model": "tiny",
        "model_digest": "0123",
        "hook_name": HOOKS[1],
        "text_digest": tokens.digest,
        "context": CONTEXT,
        "n_tokens": CONTEXTS * (CONTEXT - 1) - 1,
        "d": WIDTH,
        "dtype": "float32",
        **corpus,
    }
    assert {name: source.header[name] for name in wanted} == wanted


def test_memory_and_folder_are_the_same_source(
    model: LanguageModel, tokens: Tokens, tmp_path: Path
) -> None:
    config = HarvestConfig(batch=2, shard_tokens=24, dtype="bfloat16")
    memory = harvest(model, tokens, HOOKS, config)
    folder = harvest(model, tokens, HOOKS, config, tmp_path)
    for hook in HOOKS:
        assert isinstance(memory[hook], MemorySource)
        assert isinstance(folder[hook], FolderSource)
        assert memory[hook].header == folder[hook].header
        assert memory[hook].digest == folder[hook].digest
        assert folder[hook].shard(0).x.dtype == torch.bfloat16


def test_hooks_of_different_width_share_a_pass(model: LanguageModel, tokens: Tokens) -> None:
    inner = "gpt_neox.layers.1.mlp.dense_h_to_4h"
    sources = harvest(model, tokens, [inner, HOOKS[0]])
    assert [source.d for source in sources.values()] == [16, WIDTH]


def test_overflow_in_the_stored_dtype_is_an_error(model: LanguageModel, tokens: Tokens) -> None:
    class Loud(LanguageModel):
        def activations(self, ids, attention_mask, hooks):
            found = super().activations(ids, attention_mask, hooks)
            return {name: x * 1e6 for name, x in found.items()}

    loud = Loud(model.model, model.tokenizer, model.config, "0123", True)
    with pytest.raises(SourceError, match=r"blocks.0.hook_resid_post are not finite as float16"):
        harvest(loud, tokens, HOOKS[:1], HarvestConfig(dtype="float16"))
    assert harvest(loud, tokens, HOOKS[:1], HarvestConfig(dtype="bfloat16"))


def test_activations_that_can_not_be_squared_are_an_error(
    model: LanguageModel, tokens: Tokens
) -> None:
    class Loud(LanguageModel):
        def activations(self, ids, attention_mask, hooks):
            found = super().activations(ids, attention_mask, hooks)
            return {name: x * 1e20 for name, x in found.items()}

    loud = Loud(model.model, model.tokenizer, model.config, "0123", True)
    with pytest.raises(SourceError, match=r"blocks.0.hook_resid_post are too large as float32"):
        harvest(loud, tokens, HOOKS[:1])


def test_bytes_needed_is_what_a_harvest_takes(model: LanguageModel, tokens: Tokens) -> None:
    full = Tokens(tokens.ids, tokens.ids != 0)  # EOS counts: contexts without a gap
    for dtype in ("float32", "float16"):
        config = HarvestConfig(dtype=dtype, shard_tokens=24)  # type: ignore[arg-type]
        source = harvest(model, full, HOOKS[:1], config)[HOOKS[0]]
        held = sum(
            part.numel() * part.element_size()
            for i in range(source.n_shards)
            for part in source.shard(i).tensors().values()
        )
        assert bytes_needed(full.n_tokens, CONTEXT, WIDTH, dtype) == held
    # 1M tokens of pythia-160m (d 768) in contexts of 128: 7875 contexts x 128 x (768 x 4 + 5)
    assert bytes_needed(1_000_000, 128, 768, "float32") == 7875 * 128 * 3077


# ---------------------------------------------------------------- folders


def test_an_interrupted_harvest_goes_on(
    model: LanguageModel, tokens: Tokens, tmp_path: Path, counting: Counting
) -> None:
    config = HarvestConfig(batch=2, shard_tokens=24)  # shards of 4, 4 and 3 contexts
    counting.limit = 9
    with pytest.raises(KeyboardInterrupt):
        harvest(model, tokens, HOOKS, config, tmp_path / "cut")
    with pytest.raises(SourceError, match="unfinished harvest"):
        FolderSource.open(tmp_path / "cut" / HOOKS[0])
    counting.contexts, counting.limit = 0, 1_000_000
    resumed = harvest(model, tokens, HOOKS, config, tmp_path / "cut")
    assert counting.contexts == 3  # only the last shard was still to do
    whole = harvest(model, tokens, HOOKS, config, tmp_path / "whole")
    for hook in HOOKS:
        assert resumed[hook].digest == whole[hook].digest
        for file in (tmp_path / "whole" / hook).iterdir():
            assert (tmp_path / "cut" / hook / file.name).read_bytes() == file.read_bytes()


def test_a_harvest_in_steps_is_the_harvest(
    model: LanguageModel, tokens: Tokens, tmp_path: Path, counting: Counting
) -> None:
    config = HarvestConfig(batch=2, shard_tokens=24)  # shards of 4, 4 and 3 contexts
    hook = HOOKS[0]
    found, steps = harvest_steps(model, tokens, [hook], config, tmp_path / "steps", {})
    growing = found[hook]
    assert counting.contexts == 0
    assert (growing.d, growing.n_shards) == (WIDTH, 3)
    with pytest.raises(SourceError, match="unfinished harvest"):
        growing.shard(0)
    whole = harvest(model, tokens, [hook], config, tmp_path / "whole")[hook]
    next(steps)
    assert torch.equal(growing.shard(0).x, whole.shard(0).x)
    steps.close()  # the rest is left to a later harvest
    with pytest.raises(SourceError, match="unfinished harvest"):
        growing.shard(1)
    found, steps = harvest_steps(model, tokens, [hook], config, tmp_path / "steps", {})
    growing = found[hook]
    assert torch.equal(growing.shard(0).x, whole.shard(0).x)
    assert len(list(steps)) == 3
    assert (growing.header, growing.digest) == (whole.header, whole.digest)
    assert growing.shard_counts == whole.shard_counts


@pytest.mark.parametrize(
    ("overlap", "device", "wanted"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("auto", "cuda:1", True),
        (True, "cpu", True),
        (False, "cuda", False),
    ],
)
def test_a_launch_overlaps_on_cuda_or_where_it_is_told(
    overlap: Any, device: str, wanted: bool
) -> None:
    assert HarvestConfig(overlap=overlap).overlaps(device) is wanted


def test_overlap_is_no_part_of_what_a_harvest_is(
    model: LanguageModel, tokens: Tokens, tmp_path: Path
) -> None:
    made = [
        harvest(model, tokens, HOOKS[:1], HarvestConfig(overlap=overlap), tmp_path / str(overlap))
        for overlap in (True, False)
    ]
    assert made[0][HOOKS[0]].header == made[1][HOOKS[0]].header
    assert made[0][HOOKS[0]].digest == made[1][HOOKS[0]].digest


def test_an_overlap_that_is_none_is_refused() -> None:
    with pytest.raises(SettingError, match=r"^overlap = 'sometimes': "):
        HarvestConfig.parse({"overlap": "sometimes"})


def test_a_complete_harvest_is_reused(
    model: LanguageModel, tokens: Tokens, tmp_path: Path, counting: Counting
) -> None:
    first = harvest(model, tokens, HOOKS, None, tmp_path)
    assert counting.contexts == CONTEXTS
    again = harvest(model, tokens, HOOKS, None, tmp_path)
    assert counting.contexts == CONTEXTS
    assert [source.digest for source in again.values()] == [s.digest for s in first.values()]
    more = harvest(model, tokens, [*HOOKS, "blocks.2.hook_resid_pre"], None, tmp_path)
    assert counting.contexts == 2 * CONTEXTS  # one pass, for the new hook point alone
    assert len(more) == 3


def test_a_harvest_of_another_identity_is_refused(
    model: LanguageModel, tokens: Tokens, tmp_path: Path
) -> None:
    harvest(model, tokens, HOOKS, None, tmp_path, {"corpus": "a"})
    fewer = Tokens(tokens.ids[:-1], tokens.mask[:-1])
    with pytest.raises(MismatchError, match="text_digest"):
        harvest(model, fewer, HOOKS, None, tmp_path, {"corpus": "a"})
    with pytest.raises(MismatchError, match="dtype = 'float32', but 'bfloat16' is needed"):
        harvest(model, tokens, HOOKS, HarvestConfig(dtype="bfloat16"), tmp_path, {"corpus": "a"})
    with pytest.raises(MismatchError, match="corpus = 'a', but 'b' is needed"):
        harvest(model, tokens, HOOKS, None, tmp_path, {"corpus": "b"})


def test_a_flipped_byte_is_found(model: LanguageModel, tokens: Tokens, tmp_path: Path) -> None:
    harvest(model, tokens, HOOKS, None, tmp_path)
    file = tmp_path / HOOKS[1] / "shard-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    source = harvest(model, tokens, HOOKS, None, tmp_path)[HOOKS[1]]
    assert isinstance(source, FolderSource)
    with pytest.raises(DamageError, match=str(file)):
        source.verify()


# ---------------------------------------------------------------- bad settings


def test_bad_settings_are_refused(model: LanguageModel, tokens: Tokens) -> None:
    with pytest.raises(SettingError, match="hook_names"):
        harvest(model, tokens, [])
    with pytest.raises(SettingError, match="blocks.7.hook_resid_post"):
        harvest(model, tokens, ["blocks.7.hook_resid_post"])
    with pytest.raises(SettingError, match=r"harvest.batch = 0"):
        harvest(model, tokens, HOOKS, HarvestConfig.parse({"batch": 0}, where="harvest"))
    with pytest.raises(SettingError, match=r"harvest.shard_tokens = 0"):
        harvest(model, tokens, HOOKS, HarvestConfig.parse({"shard_tokens": 0}, where="harvest"))


# ---------------------------------------------------------------- real model and text


@pytest.mark.skipif(not STORIES.is_dir(), reason="real data stories-260k is absent")
def test_a_trained_model_on_real_text(tmp_path: Path) -> None:
    stories = load(ModelConfig(path=str(STORIES)))
    path = str(REAL / "corpora" / "tinystories.parquet")
    text = TextConfig(kind="files", path=path, split="validation")
    tokens = tokenize(text, stories.tokenizer, context=32, tokens=1500)
    hook = "blocks.2.hook_resid_post"
    config = HarvestConfig(batch=8, shard_tokens=512)
    source = harvest(stories, tokens, [hook], config, tmp_path, {"corpus": manifest(text)})[hook]
    assert source.n_shards > 1
    rows = torch.cat([source.shard(i).rows()[0] for i in range(source.n_shards)])
    with torch.no_grad():
        states = stories.model(tokens.ids, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(rows, states[tokens.mask], rtol=1e-4, atol=1e-5)
    files = source.header["corpus"]["files"]
    assert list(files) == ["tinystories.parquet"] and len(files["tinystories.parquet"]) == 64
