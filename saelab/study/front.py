"""The former place of `main`, kept for one release: import it from `saelab.launch.entry`."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def main(*arguments: Any) -> None:
    """Calls `saelab.launch.entry.main`, which experiment.py should import."""
    import_module("saelab.launch.entry").main(*arguments)
