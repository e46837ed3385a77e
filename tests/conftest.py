"""What all tests share: one thread, a seed that can be changed, and the place of the real data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from posix_tests import left_out

from saelab.runtime.signals import preserve_handlers

# A busy machine must not fail a property test.
settings.register_profile("saelab", deadline=None)
settings.load_profile("saelab")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Sparse CSR tensor support is in beta")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if left_out(collection_path) else None


def pytest_report_header() -> str | None:
    files = [file for file in Path(__file__).parent.rglob("test_*.py") if left_out(file)]
    return f"left out, since they need POSIX: {len(files)} files" if files else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Tests send SIGINT, which a command in the background of a shell ignores."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_again() -> Iterator[None]:
    """A process that a signal ends ignores further ones: not so the tests after it."""
    with preserve_handlers():
        yield


@pytest.fixture(scope="session")
def global_random_seed() -> int:
    """$SAELAB_TEST_SEED or 0: any value must do, so that no test depends on a lucky seed."""
    return int(os.environ.get("SAELAB_TEST_SEED", "0"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """$SAELAB_REAL_DATA, or shared/data beside the repository; skips where there is none."""
    named = os.environ.get("SAELAB_REAL_DATA")
    path = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data in {path}: name a folder in SAELAB_REAL_DATA")
    return path
