"""`saelab sweep` from the command line, on activations made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from projects import cli
from safetensors.torch import save_file

from saelab.seeding import torch_stream

CONFIG = """\
activations = "activations"

[sae]
preset = "topk"
d_sae = 32
activation = { k = 4 }

[train]
tokens = 2_048
batch_size = 64
lr = 4e-3

[evaluation]
tokens = 256
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    (root / "activations").mkdir()
    mix = torch.randn(12, 8, generator=torch_stream(0, "sweep", "directions"))
    for i in range(2):
        sources = torch.rand(2_048, 12, generator=torch_stream(i, "sweep", "rows")).pow(4)
        save_file({"x": sources @ mix}, root / "activations" / f"{i}.safetensors")
    (root / "mine.toml").write_text(CONFIG, encoding="utf-8")
    return root


def test_a_sweep_names_the_best_arm_and_draws_the_frontier(folder: Path) -> None:
    over = ("--over", "train.lr=1e-4,1e-2", "--over", "sae.d_sae=[16, 48]")
    ended = cli(
        folder, "sweep", "mine.toml", "--out_dir", "grid", *over, "--l0", "4", "--levels", "2,8"
    )
    assert ended.code == 0, ended.err
    data = json.loads((folder / "grid" / "sweep.json").read_text(encoding="utf-8"))
    assert list(data["arms"]) == [
        "baseline",
        *(f"lr {rate}, d_sae {size}" for rate in ("0.0001", "0.01") for size in (16, 48)),
    ]
    numbers = {name: arm["fvu"] for name, arm in data["arms"].items()}
    best = min(numbers, key=numbers.__getitem__)
    assert data["best"] == best and best.startswith("lr 0.01, d_sae ")
    assert all(abs(arm["l0"] - 4) < 0.2 for arm in data["arms"].values())
    size = best.rpartition(" ")[2]
    assert f"best: {best} (--set train.lr=0.01 --set sae.d_sae={size})" in ended.out
    assert (folder / "grid_frontier.png").is_file()
    # each arm has two seeds at each of three L0s
    assert len(list((folder / "grid" / "cells").glob("*/*/sae.safetensors"))) == 5 * 2 * 3


def test_what_a_sweep_printed_is_json_for_programs(folder: Path) -> None:
    arguments = ("--out_dir", "other", "--over", "sae.activation.k=2,6", "--seeds", "1", "--json")
    ended = cli(folder, "sweep", "mine.toml", *arguments)
    assert ended.code == 0, ended.err
    data = json.loads(ended.out)
    best = min(data["arms"], key=lambda name: data["arms"][name]["fvu"])
    assert data["target_l0"] is None and data["best"] == best
    assert [round(arm["l0"]) for arm in data["arms"].values()] == [4, 2, 6]
    again = cli(folder, "sweep", "mine.toml", *arguments[:-1], "--force")
    assert again.code == 0, again.err
    assert "the arms' L0s are 2 to 6, so a lower fvu may be bought: use --l0" in again.out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--over", "train.lr"), "use NAME=VALUE,VALUE"),
        (("--over", "train.rate=1,2"), "train.rate"),
        (("--over", "train.lr=1", "--over", "train.lr=2"), "is named twice"),
        (("--over", "train.lr=1,2", "--levels", "16"), "name the L0 of the comparison too"),
        (("--over", "sae.activation.k=2,6", "--l0", "4"), "sweep over L0s by --levels"),
        (("--over", "train.batch_size=32,64"), "is shared by all arms"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_sentence(
    folder: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    ended = cli(folder, "sweep", "mine.toml", "--out_dir", "refused", *arguments)
    assert ended.code == 2 and sentence in ended.last, ended.err
    assert "Traceback" not in ended.err and not (folder / "refused").exists()
