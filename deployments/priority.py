"""How a replica's process shares its machine with others. Knows the operating system, not models."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

NICENESS = "RAY_worker_niceness"
_THREADS = Path("/proc/self/task")
logger = logging.getLogger("ray.serve")


def take_normal_priority() -> None:
    """Undo the niceness that Ray starts workers with: beside any other load they get next to no time.

    A niceness that was asked for is left. Where the system does not allow it, the log says what to do.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness <= 0 or NICENESS in os.environ:
        return
    try:
        for thread in _threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.setpriority(os.PRIO_PROCESS, thread, 0)
    except PermissionError:
        logger.warning(
            "this replica runs at niceness %d and will be slow beside other load: start Ray with %s=0",
            niceness, NICENESS,
        )  # fmt: skip


def _threads() -> list[int]:
    """Ids of this process' threads: on Linux each has a niceness of its own, which those it starts inherit."""
    return [int(thread.name) for thread in _THREADS.iterdir()] if _THREADS.is_dir() else [0]
