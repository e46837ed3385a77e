"""A launch seen while it goes on: on its own terminal, and with `saelab watch` from another."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from projects import BASE, BASELINE, RATE, Ended, Project, cli, environment, stop

from saelab.progress.watch import WatchedRun

PLAN = """\
study = "small"
base = "configs/small.toml"
target_l0 = 16
levels = []
seeds = 2
"""

#: An arm whose loss can't be had.
OWN = 'Arm("own", module=Broken)'
MODULE = """
import torch


class Broken(torch.nn.Module):
    def __init__(self, d_in, d_sae, seed):
        super().__init__()
        self.W = torch.nn.Parameter(torch.ones(d_in, d_sae))

    def encode(self, x):
        return x @ self.W

    def decode(self, f):
        return f @ self.W.T

    def loss(self, x):
        raise ValueError("mend me")
"""

#: Half of the usual training.
SHORT = BASE.replace("16_384", "8_192")


def project(folder: Path) -> Project:
    return Project.make(folder, (BASELINE, RATE), plan=PLAN, base=SHORT)


def on_terminal(made: Project, meanwhile: Callable[[], object] = lambda: None) -> Ended:
    """A launch whose stderr is a terminal of 120 columns; `meanwhile` is called as it writes."""
    ours, theirs = pty.openpty()
    variables = environment(SAELAB_WORKERS="1", TERM="xterm", COLUMNS="120", LINES="40")
    process = subprocess.Popen(
        [sys.executable, "experiment.py", "--out_dir=run_1"],
        cwd=made.folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    try:
        while True:
            try:
                added = os.read(ours, 65536)
            except OSError:  # nobody holds the other side any more
                break
            if not added:
                break
            said += added
            meanwhile()
        assert process.stdout is not None
        out, code = process.stdout.read(), process.wait(60)
    finally:
        os.close(ours)
        stop(process)
    return Ended(code, out, said.decode())


def plain(text: str) -> str:
    """Without what moves the cursor and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def test_a_launch_on_a_terminal_and_one_without_progress_give_the_same_bits(
    tmp_path: Path,
) -> None:
    silent = project(tmp_path / "silent")
    ended = silent.call()
    assert ended.code == 0, ended.err
    made = project(tmp_path / "made")
    seen: list[tuple[str, dict]] = []

    def look() -> None:
        if (made.folder / "run_1" / "metrics.jsonl").is_file():
            watched = WatchedRun(made.folder / "run_1")
            outcome = watched.update()
            seen.append((outcome, watched.as_dict(outcome)))

    ended = on_terminal(made, look)
    assert ended.code == 0, ended.err
    assert made.weights() == silent.weights() and made.info() == silent.info()
    # the table of results, alone, on stdout
    assert ended.out.startswith("arm") and "\x1b" not in ended.out
    text = plain(ended.err)
    for words in ("run_1: ", "train and evaluate", "at L0", "4/4 cells", "complete"):
        assert words in text
    # what another process sees: it grows, it knows losses and cells, and it goes on until the end
    going = [state for outcome, state in seen if not outcome]
    assert going and all(state["outcome"] == "running" for state in going)
    assert any(cell["values"] for state in going for cell in state["running"])
    assert [state["cells"]["done"] for state in going] == sorted(
        state["cells"]["done"] for state in going
    )
    ended = cli(made.folder, "watch", "run_1")
    assert ended.code == 0 and ended.out.endswith("run_1 is complete\n")
    ended = cli(made.folder, "watch", "run_1", "--json")
    state = json.loads(ended.out)
    assert (state["outcome"], state["cells"]["done"], state["cells"]["failed"]) == (
        "complete",
        4,
        0,
    )
    arms = {cell["arm"] for cell in state["finished"]}
    assert {"baseline", "rate", "control:PCA"} < arms
    assert all(cell["values"]["fvu"] > 0 for cell in state["finished"] if "fvu" in cell["values"])


def test_the_view_has_ended_when_an_error_is_printed(tmp_path: Path) -> None:
    made = Project.make(tmp_path / "p", (BASELINE, OWN), MODULE, plan=PLAN)
    ended = on_terminal(made)
    text = plain(ended.err)
    assert ended.code == 1 and text.rstrip().splitlines()[-1] == "ValueError: mend me"
    assert "train and evaluate" in text.split("Traceback")[0]
    assert [file.name for file in (made.folder / "run_1").iterdir()] == ["metrics.jsonl"]
    ended = cli(made.folder, "watch", "run_1")
    assert ended.code == 1 and "it failed (mend me); the same command goes on" in ended.last


def test_bad_words_to_watch_are_told_in_one_sentence(tmp_path: Path) -> None:
    ended = cli(tmp_path, "watch", "run_9")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "run_9 does not exist: name the folder of a run, such as run_1\n"


def test_a_tracker_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    made = project(tmp_path / "p")
    made.replace("configs/small.toml", "context = 32", 'context = 32\ntracker = "wanbd"')
    ended = made.call()
    assert ended.code == 2 and "did you mean 'wandb'" in ended.last
    assert not (made.folder / "run_1").exists()
    assert not (made.folder / ".saelab" / "activations").exists()
