"""The environment of the peers, and how a test runs its code with their packages alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 600


def peers_python() -> Path:
    """Skips, with the reason, where there is none."""
    named = os.environ.get("SAELAB_PEERS")
    python = Path(named) if named else ROOT / "benchmarks" / ".peers" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no peers: {python} is no python; run make test-peers, or set SAELAB_PEERS")
    return python


def run_worker(worker: Path, *arguments: Path) -> None:
    """Runs a script in a process of the peers, offline, which imports the tests' helpers only."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment[name] = "1"
    environment |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "helpers")
    done = subprocess.run(
        [str(peers_python()), str(worker), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
