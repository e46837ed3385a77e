"""Resident memory of this process, from /proc (Linux); bytes. Standard library only."""

from __future__ import annotations

from pathlib import Path

_SELF = Path("/proc/self")


def resident() -> int:
    """Now."""
    return _field("VmRSS")


def peak() -> int:
    """The highest since `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """The peak begins again at what is resident now."""
    (_SELF / "clear_refs").write_text("5")


def _field(name: str) -> int:
    for line in (_SELF / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
