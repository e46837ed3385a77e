"""Objects at a URL: whole or not at all, repeated requests, one sentence at the end."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from flaky import FlakyFileSystem, flaky_store

from saelab.data.activations.foreign import ForeignSource
from saelab.data.activations.growing import GrowingSource
from saelab.data.activations.read_ahead import ReadAhead
from saelab.data.activations.store import FolderSource, FolderWriter, Shard, reopen
from saelab.errors import DamageError, MismatchError, SourceError
from saelab.storage import cache, remote
from saelab.storage.atomic import read_json, sha256, write_atomically, write_json
from saelab.storage.remote import TRIES, Remote, RemoteError, place_of

HEADER = {"d": 4, "context": 3, "dtype": "float32", "n_tokens": 12, "hook_name": "h"}


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[FlakyFileSystem]:
    return flaky_store(monkeypatch)


def shards(count: int) -> list[Shard]:
    mask = torch.tensor([[False, True, True], [False, True, False]])
    return [Shard(torch.full((2, 3, 4), float(i)), mask) for i in range(count)]


def written(folder: Remote | Path, count: int = 4) -> FolderSource:
    writer = FolderWriter(folder, HEADER)
    for shard in shards(count)[writer.done :]:
        writer.add(shard)
    return writer.finish()


# ---------------------------------------------------------------- places


def test_a_text_is_a_path_or_a_url() -> None:
    assert place_of("a/b") == Path("a/b") and place_of("file:///a/b%20c") == Path("/a/b c")
    found = place_of("s3://bucket/prefix/")
    assert found == Remote("s3://bucket/prefix") and str(found / "x") == "s3://bucket/prefix/x"
    assert isinstance(found, Remote) and (found / "x").name == "x"
    assert pickle.loads(pickle.dumps(found)) == found


def test_json_and_bytes_come_back(flaky: type[FlakyFileSystem]) -> None:
    folder = Remote("flaky://bucket/things")
    for i in range(30):
        write_json(folder / f"{i}.json", {"i": i})
        assert read_json(folder / f"{i}.json") == {"i": i}
    assert len(folder.sizes()) == 30 and folder.has("*.json") and not folder.has("*.txt")
    assert flaky.failures > 0.1 * flaky.requests  # it did fail
    with pytest.raises(SourceError, match="flaky://bucket/things/none.json does not exist"):
        read_json(folder / "none.json")
    assert Remote("flaky://bucket/nowhere").sizes() == {}


def test_what_fails_while_it_is_made_is_not_put(flaky: type[FlakyFileSystem]) -> None:
    file = Remote("flaky://bucket/half")

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        write_atomically(file, half)
    assert not file.is_file()


def test_tries_are_bounded_and_end_in_one_sentence(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    write_json(Remote("flaky://bucket/x"), {})
    flaky.requests = 0
    monkeypatch.setattr(remote, "PAUSE", 0.25)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr("flaky.FAILING", 1.1)
    with pytest.raises(RemoteError) as told:
        Remote("flaky://bucket/x").read_bytes()
    said = str(told.value)
    assert f"flaky://bucket/x can't be read, {TRIES} tries failed" in said and "\n" not in said
    assert pauses == [0.25, 0.5, 1, 2, 4, 8, 8] and flaky.requests == TRIES
    assert told.value.exit_code == 2


def test_refused_access_and_missing_packages_are_not_tried_again(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        flaky.requests += 1
        raise PermissionError("Access Denied")

    monkeypatch.setattr(flaky, "cat_file", refused)
    with pytest.raises(RemoteError, match="access is refused \\(Access Denied\\)"):
        Remote("flaky://bucket/x").read_bytes()
    assert flaky.requests == 1
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteError, match="pip install 'saelab\\[gcs\\]'"):
        Remote("gs://bucket/x").read_bytes()
    with pytest.raises(RemoteError, match="such as s3://bucket/prefix"):
        Remote("nonsense://bucket/x").read_bytes()


# ---------------------------------------------------------------- shards


def test_shards_at_a_url_are_those_on_disk(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    here, there = written(tmp_path / "h"), written(Remote("flaky://bucket/h"))
    assert there.digest == here.digest and there.shard_counts == here.shard_counts
    opened = FolderSource.open(Remote("flaky://bucket/h"), {"d": 4}, ahead=1 << 20)
    for i in (0, 0, 1, 2, 3, 0, 2):  # twice, on, back, and past one
        assert torch.equal(opened.shard(i).x, here.shard(i).x)
    opened.verify()
    assert opened.checks_reads and not here.checks_reads
    with pytest.raises(MismatchError, match="hook_name"):
        FolderSource.open(Remote("flaky://bucket/h"), {"hook_name": "other"})


def test_an_interrupted_writer_goes_on(flaky: type[FlakyFileSystem]) -> None:
    folder = Remote("flaky://bucket/h")
    FolderWriter(folder, HEADER).add(shards(1)[0])
    growing = GrowingSource(folder, alive=lambda: False)
    assert torch.equal(growing.shard(0).x, shards(1)[0].x)
    with pytest.raises(SourceError, match="unfinished harvest: run it again"):
        growing.shard(1)
    with pytest.raises(SourceError, match="unfinished"):
        FolderSource.open(folder)
    assert FolderWriter(folder, HEADER).done == 1
    assert written(folder).n_shards == 4
    assert GrowingSource(folder, alive=lambda: False).digest == written(folder).digest


def test_a_damaged_object_is_named(flaky: type[FlakyFileSystem]) -> None:
    folder = Remote("flaky://bucket/h")
    written(folder)
    key = next(name for name in flaky.store if name.endswith("shard-00002.safetensors"))
    data = bytearray(flaky.store[key].getvalue())
    data[-1] ^= 1
    flaky.store[key] = type(flaky.store[key])(None, key, bytes(data))
    opened = FolderSource.open(folder, ahead=1 << 20)  # the size is right: only the bytes tell
    opened.shard(1)
    with pytest.raises(
        DamageError, match="flaky://bucket/h/shard-00002.safetensors does not match"
    ):
        opened.shard(2)
    del flaky.store[key]
    with pytest.raises(DamageError, match="shard-00002.safetensors is missing"):
        FolderSource.open(folder)
    reopen(folder)
    assert FolderWriter(folder, HEADER).done == 2
    assert torch.equal(written(folder).shard(2).x, shards(3)[2].x)


def test_bytes_spoilt_on_their_way_are_read_again(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(Remote("flaky://bucket/h"))
    plain, answers = Remote.read_bytes, [b"spoilt"]
    monkeypatch.setattr(
        Remote, "read_bytes", lambda self: answers.pop() if answers else plain(self)
    )
    assert torch.equal(source.shard(0).x, shards(1)[0].x) and not answers


def test_foreign_activations_may_lie_at_a_url(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Remote("flaky://bucket/foreign")
    (tmp_path / "foreign").mkdir()
    for i in range(3):
        save_file({"x": torch.randn(5, 4)}, tmp_path / "foreign" / f"{i}.safetensors")
        (folder / f"{i}.safetensors").put(tmp_path / "foreign" / f"{i}.safetensors")
    here, there = ForeignSource.open(tmp_path / "foreign"), ForeignSource.open(folder, 1 << 20)
    assert here.digest == there.digest and here.shard_counts == there.shard_counts
    assert all(torch.equal(here.shard(i).x, there.shard(i).x) for i in range(3))


# ---------------------------------------------------------------- reading ahead


def test_no_more_than_the_bound_waits() -> None:
    sizes, bound = [3, 5, 2, 8, 1, 4, 4, 9, 2, 2], 10
    lock, begun, most = threading.Lock(), set(), 0

    def read(i: int) -> bytes:
        with lock:
            begun.add(i)
        return bytes([i]) * sizes[i]

    ahead = ReadAhead(read, sizes, bound)
    for order in (range(10), [0, 1, 5, 2, 3, 9, 0]):
        for i in order:
            assert ahead.get(i) == bytes([i]) * sizes[i]
            assert ahead.waiting_bytes <= bound
            most = max(most, ahead.waiting_bytes)
    assert most > 0.7 * bound  # the bound is used
    begun.clear()
    alone = ReadAhead(read, sizes, 0)
    assert alone.get(0) == bytes(3) and begun == {0} and alone.waiting_bytes == 0


def test_the_next_ones_are_read_meanwhile() -> None:
    reached = threading.Event()

    def read(i: int) -> bytes:
        if i == 1:
            reached.set()
        return b"x"

    ReadAhead(read, [1] * 4, 2).get(0)
    assert reached.wait(10)


MEMORY = """
import re, sys
from pathlib import Path
from saelab.data.activations.store import FolderSource
from saelab.storage.remote import Remote
def status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+)", text)[1])
source = FolderSource.open(Remote(sys.argv[1]), ahead=int(sys.argv[2]))
source.shard(0)
before = status("VmRSS")
for i in range(1, source.n_shards):
    assert int(source.shard(i).x[0, 0, 0]) == i
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ahead", [0, 3])
def test_memory_of_reading_ahead_is_bounded(tmp_path: Path, ahead: int) -> None:
    """Measured in a process of its own: the bound, the shard at hand, and one on its way."""
    size, mask = 8 << 20, torch.ones(8, 256, dtype=torch.bool)
    writer = FolderWriter(tmp_path / "h", HEADER | {"d": 1024})
    for i in range(12):
        writer.add(Shard(torch.full((8, 256, 1024), float(i)), mask))
    writer.finish()
    command = [sys.executable, "-c", MEMORY, f"local://{tmp_path / 'h'}", str(ahead * size * 2)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= (2 * ahead + 5) * size  # 12 shards are 96 MB, all at once


# ---------------------------------------------------------------- finished folders


def test_finished_folders_go_to_the_shared_cache_and_come_back(
    flaky: type[FlakyFileSystem],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SAELAB_CACHE", "flaky://bucket/cache")
    one, other = cache.cache_folder(tmp_path / "one"), cache.cache_folder(tmp_path / "other")
    assert one == tmp_path / "one" / ".saelab"
    folder = one / "cells" / "key"
    folder.mkdir(parents=True)
    (folder / "sae.safetensors").write_bytes(bytes(100))
    assert not cache.fetch(other, other / "cells" / "key", "cell.json")
    write_json(folder / "cell.json", {"rows": []})
    cache.share(one, folder)
    assert cache.fetch(other, other / "cells" / "key", "cell.json")
    for name in ("sae.safetensors", "cell.json"):
        assert sha256(folder / name) == sha256(other / "cells" / "key" / name)
    key = next(name for name in flaky.store if name.endswith("sae.safetensors"))
    flaky.store[key] = type(flaky.store[key])(None, key, bytes(99))
    third = tmp_path / "third" / "cells" / "key"
    assert not cache.fetch(tmp_path / "third", third, "cell.json")
    named = "flaky://bucket/cache/cells/key/sae.safetensors does not match its checksum"
    assert named in capsys.readouterr().err and not (third / "cell.json").exists()
    cache.share(one, folder)  # made again, it takes the damaged one's place
    assert cache.fetch(tmp_path / "third", third, "cell.json")
    assert sha256(third / "sae.safetensors") == sha256(folder / "sae.safetensors")


def test_without_a_url_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named in (str(tmp_path / "c"), (tmp_path / "c").as_uri()):
        monkeypatch.setenv("SAELAB_CACHE", named)
        assert cache.cache_folder(tmp_path) == tmp_path / "c" and cache.remote_cache() is None
    folder = tmp_path / "c" / "cells" / "key"
    assert not cache.fetch(tmp_path / "c", folder, "cell.json")
    write_json(folder / "cell.json", {})
    cache.share(tmp_path / "c", folder)
    assert cache.fetch(tmp_path / "c", folder, "cell.json")
    assert [file.name for file in folder.iterdir()] == ["cell.json"]
    assert json.loads((folder / "cell.json").read_text()) == {}
