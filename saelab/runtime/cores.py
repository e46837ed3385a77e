"""Control groups of this process, and the number of cores that it may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Mount point of the control groups, and the list of those that this process is in.
GROUPS, MEMBERSHIPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Returns the number of cores that this process may use: those that it may run on, and no more
    than the quota of its container allows, rounded up."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, core_quota())))


def core_quota(groups: Path = GROUPS, memberships: Path = MEMBERSHIPS) -> float:
    """Returns the smallest quota of the control groups of this process, in cores; infinity where
    there is none.

    Args:
        groups: mount point of the control groups.
        memberships: file that lists those of this process.
    """
    quotas = [math.inf]
    for folder, version in group_folders("cpu", groups, memberships):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = _words(folder / "cpu.max")
            else:
                files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                quota, period = (_words(file)[0] for file in files)
            if int(quota) > 0:  # -1 in version 1, the word 'max' in version 2: none
                quotas.append(int(quota) / int(period))
    return min(quotas)


def group_folders(
    controller: str, groups: Path = GROUPS, memberships: Path = MEMBERSHIPS
) -> Iterator[tuple[Path, int]]:
    """Yields the folder of each control group of this process and of those above it.

    Args:
        controller: 'memory' or 'cpu'.
        groups: mount point of the control groups.
        memberships: file that lists those of this process.

    Returns: folders, not all of which need exist, with the version of their files: 1 or 2.
    """
    try:
        lines = memberships.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            root, version = groups, 2
        elif controller in controllers.split(","):
            root, version = groups / controller, 1
        else:
            continue
        place = root / path.strip("/")
        for folder in (place, *place.parents):
            yield folder, version
            if folder == root:
                break


def _words(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split()
