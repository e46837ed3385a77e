"""`saelab train` under torchrun: one SAE, files as of one process, refusals in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saelab import api, checkpoint
from saelab.seeding import torch_stream

pytestmark = pytest.mark.slow
STEPS = 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Activations made elsewhere, and settings for them."""
    x = torch.randn(6000, 16, generator=torch_stream(0, "torchrun data"))
    (tmp_path / "acts").mkdir()
    save_file({"x": x.relu() + 0.1 * x}, tmp_path / "acts" / "x.safetensors")
    (tmp_path / "small.toml").write_text(
        'activations = "acts"\n'
        '[sae]\nd_sae = 64\nprecision = "float32"\ninitial_l0 = 8\n'
        'controllers = [{ kind = "l0_target", target = 8 }]\n'
        'observers = [{ kind = "resampling" }]\n'
        f"[train]\ntokens = {STEPS * 50}\nbatch_size = 50\n"
    )
    return tmp_path


def command(processes: int, out: str, *changes: str, torchrun: bool = False) -> list[str]:
    sets = [word for change in changes for word in ("--set", change)]
    run = [sys.executable, "-m"]
    if processes > 1 or torchrun:
        run += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*run, "saelab", "train", "small.toml", "--out_dir", out, *sets]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "SAELAB_PROGRESS": "off"} | more


def run(
    folder: Path, *words: str, processes: int = 1, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, *words, torchrun=torchrun),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )


def loss_curve(path: Path) -> list[float]:
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pydict()
    named = zip(table["name"], table["value"], strict=True)
    return [value for name, value in named if name == "loss"]


def test_one_process_and_four_train_the_same_sae(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(folder, "four", "parallel.latents=2", processes=4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("explained_variance") == 1  # one rank talks
    rows = json.loads((folder / "four" / "metrics.json").read_text())
    values = {row["metric"]: row["value"] for row in rows if not row["slice"]}
    assert values["loss_recovered"] is None  # no language model: a row with its reason
    assert all(row["reason"] for row in rows if row["value"] is None)
    assert run(folder, "one").returncode == 0
    (cell,) = (folder / "one" / "cells" / "baseline").iterdir()
    many, alone = (loss_curve(folder / name / "curves.parquet") for name in ("four", "one"))
    assert many == pytest.approx(alone, rel=1e-5) and len(many) == STEPS
    sae, about = checkpoint.load(folder / "four")
    theirs, known = checkpoint.load(cell)
    assert about == known
    torch.testing.assert_close(sae.W_dec, theirs.W_dec, rtol=1e-3, atol=1e-4)
    monkeypatch.chdir(folder)
    again = api.evaluate(sae, api.settings(folder / "small.toml"), ["core"])
    assert again["fvu"] == pytest.approx(values["fvu"], rel=1e-5)
    assert not list((folder / ".saelab" / "resume").glob("*/*"))
    assert "is complete" in run(folder, "four", "parallel.latents=2", processes=4).stderr


def test_refused_in_one_sentence(folder: Path) -> None:
    done = run(folder, "out", 'sae.losses+={kind = "similarity"}', processes=2)
    assert done.returncode != 0
    assert done.stderr.count("works on one rank only") == 1
    assert "exitcode  : 2" in done.stderr  # torchrun's own report of the ranks


def kill_with_ranks(first: subprocess.Popen[bytes]) -> None:
    """Kills torchrun and its ranks, which lead sessions of their own, and waits for their end."""
    ranks = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.killpg(first.pid, signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(rank), signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 60
    while any(is_running(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)


def is_running(process: str) -> bool:
    """Whether the process exists and has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1), (1, 2)])
def test_killed_and_gone_on_with_other_ranks(before: int, after: int, folder: Path) -> None:
    words = ("long", "train.tokens=150000")
    first = subprocess.Popen(
        command(before, *words, f"parallel.latents={before}", torchrun=True),
        cwd=folder,
        env=environment(SAELAB_CHECKPOINT_SECONDS="0"),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(folder.glob(".saelab/resume/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_with_ranks(first)
    (kept,) = folder.glob(".saelab/resume/*")
    last = max(file.stem for file in kept.glob("*.json"))
    assert not (folder / "long").exists()
    done = run(folder, *words, f"parallel.latents={after}", processes=after, torchrun=True)
    assert done.returncode == 0, done.stderr
    assert int(last) > 0 and not kept.exists()  # it went on from there
    assert (folder / "long" / "metrics.json").is_file()
    whole = run(folder, "whole", *words[1:], processes=after, torchrun=True)
    assert whole.returncode == 0, whole.stderr
    found, wanted = (loss_curve(folder / name / "curves.parquet")[:6] for name in ("long", "whole"))
    assert found == pytest.approx(wanted, rel=1e-5)
