"""Test files that need POSIX: they fork, send signals, set limits or make links."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: Calls and imports that Windows lacks, helpers that make them, and commands in folders of POSIX.
NEEDS_POSIX = re.compile(
    r"\bos\.(fork|kill|killpg|setsid|mkfifo|getuid|geteuid|openpty|wait\w*|sysconf)\b"
    r"|^\s*(import|from) (fcntl|resource|pty|pwd|termios)\b"
    r"|\bsignal\.(SIGKILL|SIGHUP|SIGSTOP|SIGCONT|SIGALRM|setitimer|alarm|pthread_\w+)\b"
    r"|\bpreexec_fn\b|\bprocess_group\b|\bsymlink_to\b|\bin_ranks\b|\blike_windows\b"
    r"|\.(forked|call_forked|start)\(|/dev/|/proc/|/bin/",
    re.MULTILINE,
)


def needs_posix(file: Path) -> bool:
    """Returns whether a file of tests can't run without POSIX."""
    name = file.name.startswith("test_") and file.suffix == ".py"
    return name and NEEDS_POSIX.search(file.read_text(encoding="utf-8")) is not None


def left_out(file: Path, is_posix: bool = hasattr(os, "fork")) -> bool:
    """Returns whether a file is left out on a system."""
    return not is_posix and needs_posix(file)
