"""Checks the environment variables of a launch before anything is harvested or trained."""

from __future__ import annotations

from saelab.kernels.native import eager_requested
from saelab.launch.executors import check_executor
from saelab.preflight.memory import room_here
from saelab.progress.bar import display_mode
from saelab.storage.cache import check_cache
from saelab.training.resume import fixed_interval


def check_environment(executor: str) -> None:
    """Checks each variable that a launch or one of its workers would read later.

    Args:
        executor: that the launch names, '' for that of SAELAB_EXECUTOR.

    Raises: SettingError or RemoteError for a variable with an impossible value.
    """
    check_executor(executor)
    for read in (check_cache, fixed_interval, eager_requested, display_mode, room_here):
        read()
