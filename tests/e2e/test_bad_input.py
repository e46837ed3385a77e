"""Bad input: exit code 2, one sentence as the last line of stderr, no traceback, nothing lost."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from projects import BASE, BASELINE, RATE, Ended, Project, called, cli, run
from safetensors.torch import save_file

from saelab.launch.executors.local import worker_count


def told(ended: Ended, *words: str, code: int = 2) -> None:
    """One sentence at the end of stderr that holds the words."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.last, ended.last
    assert len(ended.last) > 20


def project_with(folder: Path, *edits: tuple[str, str, str], arms: tuple[str, ...] = ()) -> Project:
    project = Project.make_smallest(folder / "project", *arms)
    for edit in edits:
        project.replace(*edit)
    return project


# ---------------------------------------------------------------- arguments and settings

TO_BASE = "configs/small.toml"
EDITS: dict[str, tuple[tuple[str, str, str], tuple[str, ...]]] = {
    "unknown setting of the plan": (
        ("plan.toml", "seeds = 2", "seads = 2"),
        ("plan.toml.seads", "did you mean 'seeds'"),
    ),
    "plan of the wrong type": (
        ("plan.toml", "seeds = 2", "seeds = 'eight'"),
        ("plan.toml.seeds", "'eight'", "integer"),
    ),
    "no TOML": (("plan.toml", "seeds = 2", "seeds = "), ("plan.toml", "not valid TOML")),
    "no such base": (
        ("plan.toml", "small.toml", "smal.toml"),
        ("smal.toml", "does not exist"),
    ),
    "unknown primary metric": (
        ("plan.toml", "seeds = 2", "seeds = 2\nprimary = 'fvuu'"),
        ("primary = 'fvuu'", "did you mean 'fvu'"),
    ),
    "primary metric that is not measured": (
        ("plan.toml", "seeds = 2", "seeds = 2\nprimary = 'sae_top_5_test_accuracy'"),
        ("primary = 'sae_top_5_test_accuracy'", "probing"),
    ),
    "unknown setting of the base": (
        (TO_BASE, "d_sae = 64", "d_sea = 256"),
        ("small.toml.sae.d_sea", "did you mean 'd_sae'"),
    ),
    "unknown table of the base": (
        (TO_BASE, "[train]", "[training]"),
        ("small.toml.training", "did you mean 'train"),
    ),
    "unknown part": (
        (TO_BASE, '"auxk"', '"auxx"'),
        ("auxx", "did you mean 'auxk'"),
    ),
    "unknown setting of a part": (
        (TO_BASE, "k = 16", "kk = 16"),
        ("kk", "no such setting", "did you mean 'k"),
    ),
    "k above d_sae": ((TO_BASE, "d_sae = 64", "d_sae = 8"), ("k = 16", "at most d_sae = 8")),
    "negative size": ((TO_BASE, "d_sae = 64", "d_sae = -256"), ("sae.d_sae = -256", "greater")),
    "no such layer": (
        (TO_BASE, "blocks.2.", "blocks.4."),
        ("hook_name = 'blocks.4.hook_resid_post'", "4 layers", "blocks.3.hook_resid_post"),
    ),
    "no such hook": (
        (TO_BASE, "hook_resid_post", "hook_resid_pots"),
        ("hook_resid_pots", "did you mean 'hook_resid_post'"),
    ),
    "context beyond the model's": (
        (TO_BASE, "context = 32", "context = 1_000"),
        ("context = 1000", "lower the context"),
    ),
    "context without a token": ((TO_BASE, "context = 32", "context = 1"), ("context = 1", ">= 2")),
    "no such model": (
        (TO_BASE, "[sae]", "[model]\npath = './nothing/here'\n[sae]"),
        ("nothing/here does not exist", "name an existing folder"),
    ),
    "folder without a model": (
        (TO_BASE, "[sae]", "[model]\npath = './configs'\n[sae]"),
        ("configs has no config.json",),
    ),
    "no such dtype": (
        (TO_BASE, "[sae]", "[model]\ndtype = 'float7'\n[sae]"),
        ("model.dtype = 'float7'", "'float32', 'bfloat16' or 'float16'"),
    ),
    "no such device": (
        (TO_BASE, "[sae]", "[model]\ndevice = 'gpu'\n[sae]"),
        ("model.device = 'gpu'", "use 'cpu' or 'cuda'"),
    ),
    "more latents than any SAE has": (
        (TO_BASE, "d_sae = 64", "d_sae = 4_000_000_000"),
        ("d_sae = 4000000000", "less than or equal to"),
    ),
    "a rate that is no number": (
        (TO_BASE, "lr = 4e-3", "lr = inf"),
        ("lr = inf", "finite number"),
    ),
    "a path that none can be": (
        (TO_BASE, '"train.txt"', '"\\u0000"'),
        ("small.toml.train_text.path = '\\x00'", "NUL", "leave it out"),
    ),
    "a boolean in place of a number": (
        (TO_BASE, "d_sae = 64", "d_sae = true"),
        ("small.toml.sae.d_sae = True", "should be a number"),
    ),
    "a study without a name": (
        ("plan.toml", 'study = "small"', "study = ''"),
        ("plan.toml.study = ''", "at least 1 character"),
    ),
    "more seeds than cells can be listed": (
        ("plan.toml", "seeds = 2", "seeds = 1_000_000_000"),
        ("seeds = 1000000000", "less than or equal to 1000"),
    ),
    "no such text": (
        (TO_BASE, "train.txt", "trian.txt"),
        ("trian.txt does not exist", "name an existing one"),
    ),
    "more tokens than there are": (
        (TO_BASE, "2_048", "5_000_000"),
        ("train.txt", "5,000,000 are wanted", "lower train.tokens or evaluation.tokens to 6,138"),
    ),
    "more evaluation tokens than there are": (
        (TO_BASE, "1_000", "5_000_000"),
        ("held_out.txt", "5,000,000 are wanted"),
    ),
    "evaluation on the training text": (
        (TO_BASE, "held_out.txt", "train.txt"),
        ("eval_text", "train.txt", "name another"),
    ),
    "batch above all data": (
        (TO_BASE, "batch_size = 128", "batch_size = 32_768"),
        ("batch_size = 32768", "lower the batch size"),
    ),
    "no such activations": (
        (TO_BASE, "context = 32", "context = 32\nactivations = 'elsewhere'"),
        ("elsewhere", "folder with activations"),
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_impossible_file_is_told_in_one_sentence(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, words = EDITS[case]
    monkeypatch.setenv("SAELAB_MEMORY", "999GB")  # so that memory is no reason
    project = project_with(tmp_path, edit)
    told(project.call(), *words)
    assert not (project.folder / "run_1").exists()
    assert not project.finished_cells()


ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown setting": (
        'Arm("wide", {"sae.d_saee": 512})',
        ("wide", "d_saee", "did you mean 'd_sae'"),
    ),
    "unknown setting of a part": (
        'Arm("early", {"sae.losses+": {"kind": "auxk", "k_auxx": 3}})',
        ("early", "k_auxx", "no such setting"),
    ),
    "wrong value": ('Arm("fast", {"train.lr": -1})', ("fast", "train.lr = -1", "greater than 0")),
    "impossible k": (
        'Arm("dense", {"sae.d_sae": 8})',
        ("dense", "k = 16", "at most d_sae = 8"),
    ),
    "shared setting": (
        'Arm("deep", {"hook_name": "blocks.3.hook_resid_post"})',
        ("deep: hook_name", "run's changes"),
    ),
    "own batches": (
        'Arm("big", {"train.batch_size": 256})',
        ("big: train.batch_size = 256", "change it for the run"),
    ),
    "same settings": ('Arm("twin", {})', ("arm = 'twin'", "'baseline'", "declare twin_of")),
    "same name": ('Arm("baseline", {"train.lr": 1e-3})', ("arm = 'baseline'", "occurs twice")),
    "folder in the name": ('Arm("a/b", {"train.lr": 1e-3})', ("a/b", "'/'")),
    "unknown check": (
        'Arm("dead", {"train.lr": 1e-3}, expected=["no_fireing"])',
        ("dead", "no_fireing", "did you mean 'no_firing'"),
    ),
    "controller that is not there": (
        'Arm("free", {"sae.losses+": {"kind": "l1", "coefficient": "sparsitty"}})',
        ("free", "sparsitty", "controller"),
    ),
    "positions beyond the context": (
        'Arm("late", {"train.positions": (40, 64)})',
        ("late", "train.positions", "context"),
    ),
}


@pytest.mark.parametrize("case", ARMS)
def test_an_impossible_arm_is_told_before_anything_is_trained(tmp_path: Path, case: str) -> None:
    arm, words = ARMS[case]
    project = project_with(tmp_path, arms=(BASELINE, arm))
    told(project.call(), *words)
    assert not (project.folder / "run_1").exists()
    assert not project.finished_cells()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out_dir=run_11",), ("out_dir = 'run_11'", "did you mean 'run_1'")),
        (("--out_dir=baseline",), ("out_dir = 'baseline'", "run_1")),
        (("--outdir=run_1",), ("usage", "did you mean '--out_dir'")),
        (("--out_dir=run_1", "--seeds=3"), ("usage: python experiment.py --out_dir=run_1",)),
        (("run_1",), ("usage: python experiment.py --out_dir=run_1",)),
        (("--out_dir=",), ("usage: python experiment.py --out_dir=run_1",)),
    ],
)
def test_a_wrong_argument_is_told_with_the_right_one(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    told(project_with(tmp_path).call(*arguments), *words)


def test_without_an_argument_the_usage_is_told(tmp_path: Path) -> None:
    ended = project_with(tmp_path).call("--help")
    assert ended.code == 0
    assert "--out_dir=run_1" in ended.out
    ended = project_with(tmp_path / "other").call("")
    told(ended, "usage")


def test_a_misspelled_number_of_workers_is_told(tmp_path: Path) -> None:
    ended = called(project_with(tmp_path).folder, lambda: worker_count("cpu"), workers="two")
    assert "SAELAB_WORKERS = 'two': use a number" in ended.last


def test_a_run_without_baseline_is_refused(tmp_path: Path) -> None:
    told(project_with(tmp_path, arms=(RATE,)).call(), "every run trains the baseline")


@pytest.mark.parametrize("content", ["", " \n\n", "too short"])
def test_a_text_without_enough_words_is_told(tmp_path: Path, content: str) -> None:
    project = project_with(tmp_path)
    project.write("train.txt", content)
    ended = project.call()
    told(ended, "train.txt", "name a")
    assert "tokens to 0" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", "0"), ("tokens = 0", "ask for more")),
        (("--device", "gpu"), ("'gpu'", "no such device")),
        (("--out", "."), ("out = '.'", "holds a finished model")),
    ],
)
def test_a_language_model_that_can_not_be_made(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"finished")
    told(cli(tmp_path, "lm", "train", *arguments), *words)
    assert (tmp_path / "model.safetensors").read_bytes() == b"finished"
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_unreachable_hub_is_told_soon(tmp_path: Path) -> None:
    """A closed port stands for the network that is not there."""
    model = project_with(
        tmp_path, (TO_BASE, "[sae]", "[model]\npath = 'nobody/no-such-model'\n[sae]")
    )
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    ended = run(model.folder, "experiment.py", "--out_dir=run_1", variables=hub, timeout=120)
    told(ended, "nobody/no-such-model", "local folder")


@pytest.mark.slow
def test_without_a_network_nothing_hangs(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for edit in (
        (TO_BASE, "[sae]", "[model]\npath = 'nobody/no-such-model'\n[sae]"),
        (TO_BASE, "path = 'nobody/no-such-model'", "path = 'embedded'"),
    ):
        project.replace(*edit)
        if "embedded" in edit[2]:
            project.replace(TO_BASE, '"files"\npath = "train.txt"', '"dataset"\npath = "no/set"')
        ended = run(project.folder, "experiment.py", "--out_dir=run_1", variables=hub, timeout=180)
        told(ended, "local")
        assert "Retry" not in ended.err


# ---------------------------------------------------------------- places and disks


def test_a_file_in_place_of_the_run_folder_is_told_before_training(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    project.write("run_1", "notes")
    told(project.call(), "run_1", "folder")
    assert not project.finished_cells()
    assert (project.folder / "run_1").read_text() == "notes"


#: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH as bits of the first word of linux/capability.h.
ABOVE_PERMISSIONS = 1 << 1 | 1 << 2


def no_longer_above_permissions() -> None:
    """Takes root's right to write everywhere from this process, for good (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    words = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert not libc.capget(header, words), os.strerror(ctypes.get_errno())
    for i in range(3):
        words[i] &= ~ABOVE_PERMISSIONS
    assert not libc.capset(header, words), os.strerror(ctypes.get_errno())


@pytest.mark.skipif(sys.platform != "linux", reason="root's rights are dropped on Linux only")
def test_a_read_only_folder_is_told_before_training(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    (project.folder / "results").mkdir()
    (project.folder / "results").chmod(0o555)
    ended = project.call_forked(no_longer_above_permissions, "--out_dir=results/run_1")
    told(ended, "results/run_1", "can't be written", "another folder")
    assert not project.finished_cells()


@pytest.mark.skipif(sys.platform != "linux", reason="root's rights are dropped on Linux only")
def test_a_read_only_cache_is_told(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    (project.folder / ".saelab").mkdir()
    (project.folder / ".saelab").chmod(0o555)
    ended = project.call_forked(no_longer_above_permissions)
    told(ended, ".saelab", "can't be written", "another folder")


@contextmanager
def full_disk(name: str) -> Iterator[None]:
    """The disk is full whenever a file of this name is to be put in its place."""
    real: Callable[..., None] = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    with patch.object(os, "replace", replace):
        yield


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "sae.json", "metrics.parquet"])
def test_a_full_disk_is_told_and_finished_work_is_kept(tmp_path: Path, name: str) -> None:
    project = project_with(tmp_path)
    with full_disk(name):
        ended = project.call()
    told(ended, name, "the disk is full", "free some space")
    assert not (project.folder / "run_1" / "final_info.json").exists()
    assert not list(project.folder.rglob("*.tmp"))
    done = len(project.finished_cells())
    assert bool(done) == (name == "metrics.parquet")
    ended = project.call()
    assert ended.code == 0, ended.err
    assert ("to train" in ended.err) == (not done)


def test_what_a_worker_refuses_is_told_as_in_this_process(tmp_path: Path) -> None:
    """The sentence survives its way between processes: here a module without `decode`."""
    code = """
from torch import nn

class Half(nn.Linear):
    def encode(self, x):
        return self(x)

def build(d_in, d_sae, seed):
    return Half(d_in, d_sae)
"""
    project = project_with(tmp_path)
    project.table((BASELINE, 'Arm("half", module=build)'), code)
    told(project.call(workers=1), "half", "Half", "needs decode(x)")


# ---------------------------------------------------------------- activations made elsewhere


def test_bad_activations_are_told_with_the_file(tmp_path: Path) -> None:
    project = project_with(
        tmp_path, (TO_BASE, "context = 32", "context = 32\nactivations = 'acts'")
    )
    folder = project.folder / "acts"
    folder.mkdir()
    told(project.call(), "acts", ".safetensors")
    (folder / "a.safetensors").write_bytes(b"no tensors")
    told(project.call(), "a.safetensors", "can't be read")
    x = torch.randn(64, 8)
    x[3, 4] = float("nan")
    save_file({"x": x}, folder / "a.safetensors")
    told(project.call(), "a.safetensors", "not finite")
    save_file({"x": torch.ones(4096, 8)}, folder / "a.safetensors")
    told(project.call(), "are the same")


def test_shards_that_are_all_smaller_than_a_batch_are_told(tmp_path: Path) -> None:
    """And do not make the stream of batches look for one for ever."""
    project = project_with(
        tmp_path, (TO_BASE, "context = 32", "context = 32\nactivations = 'acts'")
    )
    (project.folder / "acts").mkdir()
    for i in range(4):
        save_file({"x": torch.randn(100, 8)}, project.folder / "acts" / f"{i}.safetensors")
    told(project.call(), "batch_size = 128", "lower the batch size")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "configs/none.toml", "--out_dir", "out"), ("none.toml", "does not exist")),
        (
            ("train", TO_BASE, "--out_dir", "out", "--set", "train.lrr=1"),
            ("lrr", "did you mean 'lr'"),
        ),
        (("train", TO_BASE, "--out_dir", "out", "--set", "lr"), ("--set = 'lr'", "NAME=VALUE")),
        (("train", TO_BASE, "--out_dir", "out", "--seeds", "0"), ("seeds = 0", "greater than 0")),
        (("train", TO_BASE, "--out_dir", "out", "--sets", "a=1"), ("--sets", "--set")),
        (("train", TO_BASE), ("--out_dir",)),
        (("eval", "configs", "--config", TO_BASE), ("holds no sae.json",)),
        (("run", "run_7"), ("run_7", "run_1")),
        (("run", "run_1", "--experiment", "no.py"), ("no.py does not exist",)),
        (("trian",), ("trian", "train")),
    ],
)
def test_a_wrong_command_is_told(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    told(cli(project_with(tmp_path).folder, *arguments), *words)


def test_an_sae_of_another_place_is_not_evaluated(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    assert cli(project.folder, "train", TO_BASE, "--out_dir", "out").code == 0
    folder = next((project.folder / "out" / "cells").glob("*/*"))
    other_hook = ("--set", "hook_name=blocks.1.hook_resid_post")
    ended = cli(project.folder, "eval", str(folder), "--config", TO_BASE, *other_hook)
    told(ended, "blocks.2.hook_resid_post", "blocks.1.hook_resid_post")
    wide = project.folder / "acts"
    wide.mkdir()
    save_file({"x": torch.randn(4096, 8)}, wide / "x.safetensors")
    ended = cli(
        project.folder, "eval", str(folder), "--config", TO_BASE, "--set", "activations=acts"
    )
    told(ended, "d_in")
    ended = cli(project.folder, "eval", str(folder), "--config", TO_BASE, "--evals", "core,prob")
    told(ended, "prob", "did you mean 'probing'")
    (folder / "sae.safetensors").write_bytes(b"0" * 100)
    ended = cli(project.folder, "eval", str(folder), "--config", TO_BASE)
    told(ended, "sae.safetensors was changed after the run wrote it", code=1)


def test_the_base_of_these_tests_is_possible(tmp_path: Path) -> None:
    """So that every refusal above has the one reason that is asserted."""
    assert 'path = "held_out.txt"' in BASE
    ended = project_with(tmp_path).call()
    assert ended.code == 0, ended.err
    assert ended.last.startswith("run_1: 4 cells to train")
