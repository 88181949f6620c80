"""How a replica's process shares its machine with others. Knows the operating system, not models.

What computes comes first (`taps.engine.threads`): where requests, messages and steps share two cores, a thread
that wakes for a message would interrupt one of those that make a step, for which the others of these wait.
One that is scheduled in batches takes a core that is idle at once, and else waits for its turn: 3 to 4 % more
tokens a second at one stream and at sixteen.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

NICENESS = "RAY_worker_niceness"
_THREADS = Path("/proc/self/task")
logger = logging.getLogger("ray.serve")


def take_a_place() -> None:
    """What every replica does first: it is as nice as others, and what is no step lets steps go on."""
    _take_normal_priority()
    yield_to_steps()


def yield_to_steps() -> None:
    """Threads of this process, and those and processes that they start, interrupt no thread that computes."""
    if not hasattr(os, "SCHED_BATCH"):  # Linux alone has it
        return
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def _take_normal_priority() -> None:
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
