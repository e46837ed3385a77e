"""Resident memory of this process in bytes, from /proc (Linux). Uses only the standard library."""

from __future__ import annotations

from pathlib import Path

_SELF = Path("/proc/self")


def resident() -> int:
    """Returns the resident memory now."""
    return _field("VmRSS")


def peak() -> int:
    """Returns the highest resident memory since `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Resets the peak to the current resident memory."""
    (_SELF / "clear_refs").write_text("5")


def _field(name: str) -> int:
    for line in (_SELF / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
