"""Memory that this machine leaves a launch, and how many workers fit into it.

A launch takes fewer workers where its need is above what this machine, its control group or
SAELAB_MEMORY leave it, and is refused where not even one fits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from saelab.errors import SettingError
from saelab.preflight.cost import launch_needs
from saelab.runtime.cores import group_folders
from saelab.runtime.system import address_space_left, memory_table
from saelab.study.plan import BaseConfig, CellSpec

#: Variable that names how much memory a launch may take.
BUDGET = "SAELAB_MEMORY"
#: Bytes where nothing limits them.
ENDLESS = 2**62
#: Version of control groups -> their files with the limit and the use of memory.
MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


def fit_workers(
    base: BaseConfig, specs: Sequence[CellSpec], workers: int, group: int
) -> int | None:
    """The largest number of workers, up to `workers`, that the memory here holds; None for none."""
    room = room_here()
    for n in range(workers, -1, -1):
        if launch_needs(base, specs, n, group).memory <= room:
            return n
    return None


def refuse(base: BaseConfig, specs: Sequence[CellSpec], group: int) -> NoReturn:
    """Raises: SettingError that says what a launch needs at least, and what there is."""
    least, room = launch_needs(base, specs, 0, group).memory, room_here()
    remedy = (
        f"only {room / 1e9:.2f} GB are free here: lower harvest.shard_tokens, harvest.batch or "
        f"sae.d_sae, free memory, or set {BUDGET} (as in 8GB) to what may be used"
    )
    raise SettingError("memory that is needed", f"{least / 1e9:.2f} GB", remedy)


def room_here() -> int:
    """Bytes that a launch may take: SAELAB_MEMORY where it is set; otherwise what the machine has
    free, swap included, and what control groups and limits of the process leave.

    Raises: SettingError for a budget that is not a size.
    """
    budget = os.environ.get(BUDGET, "").strip()
    if not budget:
        return min([_free_memory(), *_room_of_groups(), *_room_of_process()])
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]?)B?", budget, re.IGNORECASE | re.ASCII)
    if not match:
        raise SettingError(BUDGET, budget, "is not an amount of memory: write it as in 8GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _free_memory() -> int:
    """Bytes that the machine has free."""
    free = dict(re.findall(r"^(MemAvailable|SwapFree):\s+(\d+) kB", memory_table(), re.MULTILINE))
    return 1024 * sum(map(int, free.values())) if "MemAvailable" in free else ENDLESS


def _room_of_groups() -> Iterator[int]:
    """Bytes left by each memory control group of this process and those above it (v2 or v1)."""
    for folder, version in group_folders("memory"):
        with suppress(OSError, ValueError):
            files = (folder / name for name in MEMORY_FILES[version])
            limit, used = (int(file.read_text(encoding="utf-8")) for file in files)
            yield max(0, limit - used + _cached_bytes(folder))


def _cached_bytes(folder: Path) -> int:
    """Bytes of files in memory that a control group counts and gives back when asked."""
    text = (folder / "memory.stat").read_text(encoding="utf-8")
    match = re.search(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else 0


def _room_of_process() -> Iterator[int]:
    """Bytes that a limit on address space leaves; a worker has the same one for itself."""
    if (left := address_space_left()) is not None:
        yield left
