"""A launch whose cache is a URL: the same bits as in a folder, and nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from flaky import flaky_store, s3_server

from saelab.data import stdlib
from saelab.errors import DamageError
from saelab.files import read_json, sha256
from saelab.study.cells import Worker
from saelab.study.engine import Launch, launch
from saelab.study.plan import Arm, BaseConfig, PlanConfig, Run

SETTINGS = {
    "context": 32,
    "harvest": {"shard_tokens": 4096},
    "sae": {
        "d_sae": 256,
        "activation": {"kind": "topk", "k": 16},
        "losses": [{"kind": "reconstruction"}],
        "controllers": [],
    },
    "train": {"tokens": 16_384, "batch_size": 128, "lr": 4e-3},
    "evaluation": {
        "tokens": 4000,
        "loss_contexts": 8,
        "probing": {"train_size": 10, "test_size": 5, "context": 16, "k_values": [1]},
    },
}
PLAN = {"study": "small", "target_l0": 16, "levels": [], "seeds": 2, "seeds_other": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Settings of the two texts."""
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for name, split, size in (("train_text", "train", 120_000), ("eval_text", "held_out", 40_000)):
        file = folder / f"{name}.txt"
        file.write_text("\n".join(stdlib.texts(split))[:size], encoding="utf-8")
        found[name] = {"kind": "files", "path": str(file)}
    return found


def launched(root: Path, texts: dict[str, dict[str, str]], **harvest: object) -> dict[str, str]:
    """Runs it in this process; cell -> hash of its weights and rows."""
    root.mkdir(exist_ok=True)
    task = Launch(
        name="run_1",
        run=Run("small", [Arm("baseline"), Arm("rate", {"train.lr": 2e-3})]),
        plan=PlanConfig.parse(PLAN),
        base=BaseConfig.parse({**SETTINGS, **texts}).patched(
            {f"harvest.{name}": value for name, value in harvest.items()}
        ),
        out_dir=root / "run_1",
        root=root,
        workers=0,
    )
    launch(task)
    cells = sorted((root / "run_1" / "cells").rglob("sae.safetensors"))
    assert len(cells) == 4
    rows = read_json(root / "run_1" / "final_info.json")
    numbers = {name: str(found["means"]) for name, found in rows.items()}
    return {str(c.relative_to(root)): sha256(c) for c in cells} | numbers


@pytest.fixture(scope="module")
def in_a_folder(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, dict[str, str]]
) -> dict[str, str]:
    return launched(tmp_path_factory.mktemp("local"), texts)


def test_a_store_that_fails_one_request_in_five_changes_no_bit(
    tmp_path: Path,
    texts: dict[str, dict[str, str]],
    in_a_folder: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flaky = flaky_store(monkeypatch)
    monkeypatch.setenv("SAELAB_CACHE", "flaky://bucket/cache")
    assert launched(tmp_path / "one", texts) == in_a_folder
    assert flaky.failures > 0.1 * flaky.requests > 1
    assert not (tmp_path / "one" / ".saelab" / "activations").exists()

    def trained(*args: object) -> None:
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr(Worker, "run", trained)
    assert launched(tmp_path / "two", texts, read_ahead=0) == in_a_folder
    spoilt = next(name for name in flaky.store if name.endswith("sae.safetensors"))
    flaky.store[spoilt] = type(flaky.store[spoilt])(None, spoilt, b"spoilt")
    with pytest.raises(DamageError, match="sae.safetensors does not match its checksum"):
        launched(tmp_path / "three", texts)


def test_training_beside_the_harvest_over_a_url_changes_no_bit(
    tmp_path: Path,
    texts: dict[str, dict[str, str]],
    in_a_folder: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flaky_store(monkeypatch)
    monkeypatch.setenv("SAELAB_CACHE", "flaky://bucket/cache")
    assert launched(tmp_path / "one", texts, overlap=True) == in_a_folder


@pytest.mark.slow
def test_a_local_s3_server_gives_the_same_bits(
    tmp_path: Path,
    texts: dict[str, dict[str, str]],
    in_a_folder: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("moto.server", reason="needs moto: make test-store")
    pytest.importorskip("s3fs", reason="needs s3fs: make test-store")
    with s3_server(tmp_path) as names:
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SAELAB_CACHE", "s3://saelab/a/cache")
        assert launched(tmp_path / "one", texts) == in_a_folder
