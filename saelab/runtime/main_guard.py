"""Scripts without a main guard: each worker process would run them again while it starts."""

from __future__ import annotations

import multiprocessing
import os

from saelab.errors import UsageError

#: Environment variable of a worker that starts, and exit code of one that runs a script again.
STARTING, UNGUARDED = "SAELAB_STARTING", 97
GUARD = (
    "the script starts worker processes, and each of them runs the script again: put the call "
    'under `if __name__ == "__main__":`, or use workers=0'
)


def refuse_unguarded_script() -> None:
    """Ends a worker that runs the user's script again while it starts: it would start workers too.

    Raises: SystemExit in a worker of a launch, which reports it; UsageError in any other process
        that a script without a main guard has started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        if os.environ.get(STARTING):
            raise SystemExit(UNGUARDED)
        raise UsageError(GUARD)
