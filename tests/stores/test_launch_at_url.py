"""A cache at a URL: the same bits as in a folder, and nothing is done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flaky import FlakyFileSystem, flaky_store, s3_server

from saelab import api
from saelab.data.activations.store import FolderSource
from saelab.data.text import stdlib
from saelab.errors import DamageError
from saelab.launch import prepare as preparing
from saelab.launch.launch import launch
from saelab.launch.worker import Worker
from saelab.storage.atomic import read_json, sha256
from saelab.storage.remote import Remote
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run
from saelab.study.task import Launch

SETTINGS: dict[str, Any] = {
    "context": 32,
    "harvest": {"shard_tokens": 1024},
    "sae": {
        "d_sae": 128,
        "activation": {"kind": "topk", "k": 16},
        "losses": [{"kind": "reconstruction"}],
        "controllers": [],
    },
    "train": {"tokens": 8192, "batch_size": 128, "lr": 4e-3},
    "evaluation": {"tokens": 2000, "loss_contexts": 4, "probing": {"entries": "none"}},
}
PLAN = {"study": "small", "target_l0": 16, "levels": [], "seeds": 1, "seeds_other": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    """Settings with two small texts."""
    folder = tmp_path_factory.mktemp("texts")
    texts = {}
    for name, split, size in (("train_text", "train", 60_000), ("eval_text", "held_out", 20_000)):
        file = folder / f"{name}.txt"
        file.write_text("\n".join(stdlib.texts(split))[:size], encoding="utf-8")
        texts[name] = {"kind": "files", "path": str(file)}
    return BaseConfig.parse(SETTINGS | texts)


@pytest.fixture(scope="module")
def in_a_folder(tmp_path_factory: pytest.TempPathFactory, base: BaseConfig) -> dict[str, Any]:
    """The weights of an SAE whose activations lie in a folder."""
    return api.train(base, 1, tmp_path_factory.mktemp("local")).state_dict()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def launched(root: Path, base: BaseConfig) -> dict[str, str]:
    """Runs one cell in this process; its weights and numbers."""
    root.mkdir()
    run, plan = Run("small", [Arm("baseline")]), PlanConfig.parse(PLAN)
    launch(
        Launch(
            name="run_1",
            run=run,
            plan=plan,
            base=base,
            out_dir=root / "run_1",
            root=root,
            workers=0,
        )
    )
    (weights,) = (root / "run_1" / "cells").rglob("sae.safetensors")
    info = read_json(root / "run_1" / "final_info.json")
    return {"weights": sha256(weights), "numbers": str(info["baseline"]["means"])}


def spoil(flaky: type[FlakyFileSystem], ending: str) -> None:
    """Changes the last byte of the objects whose names end so."""
    found = [name for name in flaky.store if name.endswith(ending)]
    assert found
    for name in found:
        data = bytearray(flaky.store[name].getvalue())
        data[-1] ^= 1
        flaky.store[name] = type(flaky.store[name])(None, name, bytes(data))


@pytest.mark.parametrize("ahead", [0, 2**20])
def test_a_store_that_fails_one_request_in_five_changes_no_bit(
    tmp_path: Path,
    base: BaseConfig,
    in_a_folder: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
) -> None:
    flaky = flaky_store(monkeypatch)
    monkeypatch.setenv("SAELAB_CACHE", "flaky://bucket/cache")
    ours = base.patched({"harvest.read_ahead": ahead})
    assert same(api.train(ours, 1, tmp_path / "one").state_dict(), in_a_folder)
    assert flaky.failures > 0.1 * flaky.requests > 1
    assert not (tmp_path / "one" / ".saelab").exists()
    spoil(flaky, "shard-00001.safetensors")
    with pytest.raises(DamageError, match="shard-00001.safetensors does not match its checksum"):
        api.train(ours, 1, tmp_path / "two")


@pytest.mark.slow
def test_finished_cells_are_shared_and_beside_the_harvest_no_bit_changes(
    tmp_path: Path,
    base: BaseConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = launched(tmp_path / "local", base)
    flaky = flaky_store(monkeypatch)
    monkeypatch.setenv("SAELAB_CACHE", "flaky://bucket/cache")
    assert launched(tmp_path / "one", base.patched({"harvest.overlap": True})) == wanted

    def trained(*args: object) -> None:
        raise AssertionError("a finished cell was trained again")

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "run", trained)
        assert launched(tmp_path / "two", base) == wanted
    spoil(flaky, "sae.safetensors")
    assert launched(tmp_path / "three", base) == wanted  # trained again, and put there again
    assert "sae.safetensors does not match its checksum" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(Worker, "run", trained)
        assert launched(tmp_path / "four", base) == wanted


def test_probing_activations_are_shared(
    tmp_path: Path, base: BaseConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky_store(monkeypatch)
    monkeypatch.setenv("SAELAB_CACHE", "flaky://bucket/cache")
    probing = {"entries": "embedded", "train_size": 4, "test_size": 2, "context": 8}
    ours = base.patched({"evaluation.probing": probing, "train.tokens": 1000})
    made = preparing.prepare(ours, tmp_path / "one", "cpu").probing

    def again(*args: object) -> None:
        raise AssertionError("harvested again")

    monkeypatch.setattr(preparing, "harvest_probing", again)
    found = preparing.prepare(ours, tmp_path / "two", "cpu").probing
    assert made is not None and found is not None and found != made
    for file in made.iterdir():
        assert sha256(found / file.name) == sha256(file)


def test_a_local_s3_server_gives_the_same_bits(
    tmp_path: Path,
    base: BaseConfig,
    in_a_folder: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("moto.server", reason="needs moto: make test-store")
    pytest.importorskip("s3fs", reason="needs s3fs: make test-store")
    with s3_server(tmp_path) as names:
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SAELAB_CACHE", "s3://saelab/a/cache")
        assert same(api.train(base, 1, tmp_path / "one").state_dict(), in_a_folder)
        cache = Remote("s3://saelab/a/cache")
        assert cache.has("activations/*/*/header.json")
        key = next(iter(sorted(_folders(cache / "activations"))))
        folder = cache / "activations" / key / base.hook_name
        assert FolderSource.open(folder).n_shards == len(folder.sizes()) - 1
        (folder / "shard-00000.safetensors").unlink()
        with pytest.raises(DamageError, match="s3://saelab/.*shard-00000.safetensors is missing"):
            FolderSource.open(folder)


def _folders(place: Remote) -> list[str]:
    fs, path = place._open()
    return [name.rpartition("/")[2] for name in fs.ls(path, detail=False)]
