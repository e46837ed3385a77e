"""Shards in memory and on disk: the same content, every damage found, nothing mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saelab.data.activations.foreign import ForeignSource
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.store import (
    FOREIGN_REASON,
    FolderSource,
    FolderWriter,
    MemorySource,
    Shard,
    check_identity,
)
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.seeding import torch_stream

HEADER: dict[str, Any] = {"model": "m", "hook_name": "blocks.1.hook_resid_post", "corpus": {"n": 1}}


def shards(count: int = 3, d: int = 4, dtype: torch.dtype = torch.float32) -> list[Shard]:
    stream = torch_stream(0, "test shards")
    made = []
    for _ in range(count):
        x = torch.randn(2, 3, d, generator=stream).to(dtype)
        mask = torch.tensor([[False, True, True], [False, True, False]])
        made.append(Shard(x, mask, torch.arange(6, dtype=torch.int32).view(2, 3)))
    return made


def write(path: Path, parts: list[Shard], header: dict[str, Any] = HEADER) -> FolderSource:
    facts = {"d": 4, "context": 3, "dtype": "float32", "n_tokens": 3 * len(parts)}
    writer = FolderWriter(path, {**facts, **header})
    for part in parts[writer.done :]:
        writer.add(part)
    return writer.finish()


def flip_byte(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


# ---------------------------------------------------------------- shards


def test_rows_are_the_counted_positions_in_order() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[False, True, True], [True, False, True]])
    rows, position = Shard(x.half(), mask).rows()
    assert rows.tolist() == [[2, 3], [4, 5], [6, 7], [10, 11]]
    assert position.tolist() == [1, 2, 0, 2]
    assert (rows.dtype, position.dtype) == (torch.float32, torch.int64)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_rows_agree_with_a_loop(data: st.DataObject) -> None:
    contexts, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    size = contexts * positions
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    mask = mask.view(contexts, positions)
    x = torch.arange(2.0 * size).view(contexts, positions, 2)
    wanted = [
        (x[c, p].tolist(), p) for c in range(contexts) for p in range(positions) if mask[c, p]
    ]
    rows, position = Shard(x, mask).rows()
    assert list(zip(rows.tolist(), position.tolist(), strict=True)) == wanted


# ---------------------------------------------------------------- memory and folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_gives_back_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = shards(dtype=dtype)
    header = {**HEADER, "dtype": str(dtype).removeprefix("torch.")}
    source = write(tmp_path / "h", parts, header)
    memory = MemorySource(parts, header)
    assert (source.d, source.n_shards, source.shard_counts) == (4, 3, [3, 3, 3])
    assert source.header == memory.header
    assert source.digest == memory.digest
    for i, part in enumerate(parts):
        stored = source.shard(i)
        assert stored.ids is not None and part.ids is not None
        assert stored.x.dtype == dtype
        assert torch.equal(stored.x, part.x)
        assert torch.equal(stored.mask, part.mask)
        assert torch.equal(stored.ids, part.ids)
    source.verify()


def test_the_digest_sees_values_and_identity() -> None:
    base = MemorySource(shards(), HEADER)
    changed = shards()
    changed[1].x[0, 0, 0] += 1
    assert MemorySource(shards(), HEADER).digest == base.digest
    assert MemorySource(changed, HEADER).digest != base.digest
    assert MemorySource(shards(), {**HEADER, "hook_name": "other"}).digest != base.digest
    assert MemorySource(shards()[::-1], HEADER).digest != base.digest


def test_a_memory_source_fills_in_its_facts() -> None:
    source = MemorySource(shards(2), {})
    assert source.header == {"context": 3, "d": 4, "dtype": "float32", "n_tokens": 6}
    with pytest.raises(SourceError, match="at least one shard"):
        MemorySource([], {})


def test_ids_may_be_absent(tmp_path: Path) -> None:
    parts = [Shard(part.x, part.mask) for part in shards()]
    assert write(tmp_path / "h", parts).shard(0).ids is None


# ---------------------------------------------------------------- damage


def test_a_flipped_byte_is_found_by_verify(tmp_path: Path) -> None:
    source = write(tmp_path / "h", shards())
    flip_byte(tmp_path / "h" / "shard-00001.safetensors", -5)
    reopened = FolderSource.open(tmp_path / "h")  # the size is right: only the bytes tell
    with pytest.raises(DamageError, match="shard-00001.safetensors does not match its checksum"):
        reopened.verify()
    assert source.n_shards == 3


def test_missing_and_truncated_shards_are_found_when_opened(tmp_path: Path) -> None:
    write(tmp_path / "h", shards())
    file = tmp_path / "h" / "shard-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DamageError, match=rf"shard-00002.*has {len(content) - 1} bytes, not"):
        FolderSource.open(tmp_path / "h")
    file.unlink()
    with pytest.raises(DamageError, match=r"shard-00002.*is missing"):
        FolderSource.open(tmp_path / "h")


def test_a_damaged_shard_header_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "h", shards())
    flip_byte(tmp_path / "h" / "shard-00000.safetensors", 7)  # the length of its header
    with pytest.raises(DamageError, match="shard-00000.safetensors can't be read"):
        source.shard(0)


def test_a_header_that_is_no_json_is_damage(tmp_path: Path) -> None:
    write(tmp_path / "h", shards())
    (tmp_path / "h" / "header.json").write_text('{"format": 1, "hea')
    with pytest.raises(DamageError, match=r"header.json is damaged"):
        FolderSource.open(tmp_path / "h")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "h", shards())
    file = tmp_path / "h" / "header.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(SourceError, match="has format 99"):
        FolderSource.open(tmp_path / "h")


# ---------------------------------------------------------------- interrupted writers


def test_an_interrupted_writer_goes_on_to_the_same_files(tmp_path: Path) -> None:
    parts = shards(4)
    facts = {"d": 4, "context": 3, "dtype": "float32", "n_tokens": 12, **HEADER}
    writer = FolderWriter(tmp_path / "h", facts)
    writer.add(parts[0])
    writer.add(parts[1])
    with pytest.raises(SourceError, match="unfinished harvest: run it again"):
        FolderSource.open(tmp_path / "h")
    resumed = FolderWriter(tmp_path / "h", facts)
    assert resumed.done == 2
    for part in parts[2:]:
        resumed.add(part)
    source = resumed.finish()
    whole = write(tmp_path / "whole", parts)
    assert source.digest == whole.digest
    names = sorted(file.name for file in (tmp_path / "h").iterdir())
    assert names == ["header.json", *(f"shard-0000{i}.safetensors" for i in range(4))]
    for name in names:
        assert (tmp_path / "h" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_shard_of_a_partial_harvest_is_written_again(tmp_path: Path) -> None:
    parts = shards(3)
    writer = FolderWriter(tmp_path / "h", HEADER)
    for part in parts:
        writer.add(part)
    flip_byte(tmp_path / "h" / "shard-00001.safetensors", -5)
    resumed = FolderWriter(tmp_path / "h", HEADER)
    assert resumed.done == 1
    for part in parts[1:]:
        resumed.add(part)
    resumed.finish().verify()


def test_a_partial_harvest_of_another_identity_is_refused(tmp_path: Path) -> None:
    FolderWriter(tmp_path / "h", HEADER).add(shards()[0])
    with pytest.raises(MismatchError, match="hook_name = 'blocks.1.hook_resid_post'.*'other'"):
        FolderWriter(tmp_path / "h", {**HEADER, "hook_name": "other"})


# ---------------------------------------------------------------- identity


def test_the_first_field_that_differs_is_named(tmp_path: Path) -> None:
    write(tmp_path / "h", shards())
    FolderSource.open(tmp_path / "h", {"context": 3, "corpus": {"n": 1}})
    with pytest.raises(MismatchError, match="context = 3, but 64 is needed.*another folder"):
        FolderSource.open(tmp_path / "h", {"d": 4, "context": 64, "dtype": "float16"})


def test_identity_compares_values_as_json_has_them() -> None:
    check_identity({"a": [1, 2], "b": None}, {"a": (1, 2)})
    with pytest.raises(MismatchError, match="absent = None, but 1 is needed"):
        check_identity({"a": 1}, {"absent": 1})


def test_an_empty_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no harvested activations: harvest first"):
        FolderSource.open(tmp_path)


# ---------------------------------------------------------------- while it is written

GROWING: dict[str, Any] = {
    **HEADER,
    "d": 4,
    "context": 3,
    "dtype": "float32",
    "n_contexts": 6,
    "shard_contexts": 2,
    "n_tokens": 9,
}


class Script:
    """Stands for the writing process: one more of its acts before each look of the reader."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self.acts = list(acts)

    def __call__(self) -> bool:
        if self.acts:
            self.acts.pop(0)()
        return bool(self.acts)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.data.activations.growing.FOLDER_POLL_SECONDS", 0)


def nothing() -> None: ...


@pytest.mark.usefixtures("at_once")
def test_a_growing_source_waits_for_what_it_is_asked_for(tmp_path: Path) -> None:
    parts, writer = shards(), FolderWriter(tmp_path, GROWING)
    adds = [lambda part=part: writer.add(part) for part in parts]
    script = Script(nothing, writer.announce, nothing, *adds, nothing, writer.finish)
    source = GrowingSource(tmp_path, script)
    assert len(script.acts) == 8  # opened without a look
    assert (source.d, source.n_shards, source.header) == (4, 3, GROWING)
    assert writer.done == 0 and len(script.acts) == 6
    for i, part in enumerate(parts):
        assert torch.equal(source.shard(i).x, part.x)
        assert writer.done == i + 1
    assert torch.equal(source.shard(0).x, parts[0].x)
    assert not (tmp_path / "header.json").exists()
    assert (
        source.digest == FolderSource.open(tmp_path).digest == MemorySource(parts, GROWING).digest
    )
    assert source.shard_counts == [3, 3, 3]
    assert torch.equal(source.shard(2).x, parts[2].x)  # partial.json is gone by now


@pytest.mark.usefixtures("at_once")
def test_a_growing_source_waits_no_longer_than_its_writer_lives(tmp_path: Path) -> None:
    parts, writer = shards(), FolderWriter(tmp_path, GROWING)
    script = Script(writer.announce, lambda: writer.add(parts[0]), nothing, nothing)
    source = GrowingSource(tmp_path, script)
    for asked in (lambda: source.shard(1), lambda: source.digest, lambda: source.shard_counts):
        with pytest.raises(SourceError, match=r"unfinished harvest: run it again"):
            asked()
        assert not script.acts
    assert torch.equal(source.shard(0).x, parts[0].x)  # what is there stays readable
    last = GrowingSource(tmp_path, Script(lambda: writer.add(parts[1])))
    assert torch.equal(last.shard(1).x, parts[1].x)  # written before the writer ended


def test_a_process_without_a_parent_of_its_own_kind_waits_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="unfinished harvest"):
        _ = GrowingSource(tmp_path).header


ORPHAN = """
import multiprocessing, os, sys
from pathlib import Path
from saelab.data.activations.growing import GrowingSource
source = GrowingSource(Path(sys.argv[1]))
multiprocessing.get_context("spawn").Process(target=source.shard, args=(0,)).start()
os._exit(0)
"""


def test_a_reader_whose_parent_died_ends(tmp_path: Path) -> None:
    """`run` returns when nobody holds the pipes any more: the reader is gone too."""
    FolderWriter(tmp_path, GROWING).announce()
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "holds an unfinished harvest: run it again" in done.stderr


def test_what_was_only_announced_binds_nobody(tmp_path: Path) -> None:
    FolderWriter(tmp_path, GROWING).announce()
    changed = {**GROWING, "dtype": "float16"}
    writer = FolderWriter(tmp_path, changed)
    assert writer.done == 0
    writer.add(shards(dtype=torch.float16)[0])
    with pytest.raises(MismatchError, match="dtype"):
        FolderWriter(tmp_path, GROWING)


# ---------------------------------------------------------------- made elsewhere


def test_foreign_rows_become_contexts_of_one_position(tmp_path: Path) -> None:
    x = torch.randn(5, 4, generator=torch_stream(0, "test foreign"))
    save_file({"acts": x}, tmp_path / "b.safetensors")
    save_file({"anything": (x * 2).half()}, tmp_path / "a.safetensors")
    source = ForeignSource.open(tmp_path)
    assert (source.d, source.n_shards, source.shard_counts) == (4, 2, [5, 5])
    rows, position = source.shard(1).rows()
    assert torch.equal(rows, x)
    assert position.tolist() == [0] * 5
    assert source.shard(0).rows()[0].dtype == torch.float32
    assert source.header["model"] is None
    assert source.header["reason"] == FOREIGN_REASON == "activations were made elsewhere"
    assert source.header["n_tokens"] == 10


def test_foreign_contexts_keep_their_positions(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, generator=torch_stream(0, "test foreign"))
    save_file({"acts": x}, tmp_path / "a.safetensors")
    source = ForeignSource.open(tmp_path)
    assert torch.equal(source.shard(0).x, x)
    assert source.shard(0).rows()[1].tolist() == [0, 1, 2, 0, 1, 2]
    assert source.header["context"] == 3
    first = source.digest
    save_file({"acts": x + 1}, tmp_path / "a.safetensors")
    assert ForeignSource.open(tmp_path).digest != first


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.tensor([[1.0, float("nan")]])}, "values that are not finite"),
        ({"x": torch.tensor([[1.0, float("inf")]], dtype=torch.float16)}, "not finite"),
        ({"x": torch.tensor([[1.0, 2.0], [1e30, 0.0]])}, "too large for float32 in row 1: remove"),
        ({"x": torch.full((2, 2), 1e15)}, "too large for float32 in row 0"),
        ({"x": torch.full((2, 2), 1e300, dtype=torch.float64)}, "too large for float32 in row 0"),
        ({"x": torch.full((2, 2), 3e38, dtype=torch.bfloat16)}, "too large for float32 in row 0"),
        ({"x": torch.ones(2, 2).to(torch.float8_e4m3fn)}, r"holds float8_e4m3fn \[2, 2\].*conv"),
        ({"x": torch.ones(2, 2).to(torch.float8_e5m2)}, r"holds float8_e5m2 \[2, 2\]"),
        ({"x": torch.ones(2, 2, dtype=torch.complex64)}, r"holds complex64 \[2, 2\]"),
        ({"x": torch.ones(2, 2, dtype=torch.bool)}, r"holds bool \[2, 2\]"),
        ({"x": torch.ones(2, 2, dtype=torch.uint16)}, r"holds uint16 \[2, 2\]"),
        ({"x": torch.ones(4)}, r"holds float32 \[4\]"),
        ({"x": torch.ones(1, 2, 3, 4)}, r"holds float32 \[1, 2, 3, 4\]"),
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, r"holds int64 \[2, 2\]"),
        ({"x": torch.ones(0, 2)}, r"of shape \[0, 2\] holds no value"),
        ({"x": torch.ones(2, 2), "y": torch.ones(2, 2)}, "holds 2 tensors"),
        ({"x": torch.ones(2, 3)}, "has d = 3, but a.safetensors has 2"),
    ],
)
def test_unusable_foreign_files_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file({"x": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match=rf"b.safetensors.*{message}"):
        ForeignSource.open(tmp_path)


def test_float64_activations_are_read_and_large_ones_that_can_be_computed_with(
    tmp_path: Path,
) -> None:
    x = torch.tensor([[1e13, -2.0], [0.5, 1e-300]], dtype=torch.float64)
    save_file({"x": x}, tmp_path / "a.safetensors")
    rows, _ = ForeignSource.open(tmp_path).shard(0).rows()
    assert torch.equal(rows, x.float()) and rows.dtype == torch.float32


def test_a_foreign_folder_without_readable_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no .safetensors file"):
        ForeignSource.open(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(SourceError, match=r"a.safetensors can't be read"):
        ForeignSource.open(tmp_path)
