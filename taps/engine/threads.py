"""How many threads torch computes with, set for one thread of this process alone.

Every thread that computes in parallel has OpenMP workers of its own. Once a process has more of all these
together than there are cores, libgomp's barriers sleep instead of spinning: on two cores a verify pass of the
135M target took 85 ms instead of 52, a pass over 96 sessions 1.2 s instead of 0.4. So one thread of a process
computes in parallel, the one that runs the steps; the others, such as the one that loads, do it alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from taps.models.cpu_kernel.team import use_threads

_setting = Lock()


def compute_with(num_threads: int) -> None:
    """Operations of the calling thread use so many from now on; those of other threads stay as they are.

    Raises ValueError when there is not at least one.
    """
    if num_threads < 1:
        raise ValueError(f"at least one thread computes, not {num_threads}")
    with _setting:
        torch.set_num_threads(num_threads)
        # A thread takes over the number last set anywhere when it first looks: it looks now.
        torch.get_num_threads()


@contextmanager
def computing_with(num_threads: int) -> Iterator[int]:
    """`compute_with` for the length of a block, which is given the number there was before."""
    before = torch.get_num_threads()
    compute_with(num_threads)
    try:
        yield before
    finally:
        compute_with(before)


def computing(num_threads: int | None, in_kernel: bool = False) -> Callable[[], None]:
    """What a worker thread calls before its first step. Args: num_threads: None leaves it to torch; in_kernel:
    the kernel computes all that is large: its team has the threads, and nothing waits for torch's.
    """

    def prepare() -> None:
        _come_first()
        if num_threads is None:
            return
        compute_with(1 if in_kernel else num_threads)
        if in_kernel:
            use_threads(num_threads)

    return prepare


def _come_first() -> None:
    """The calling thread, and those that it starts, are scheduled as usual, also in a process whose others are
    scheduled in batches: these do not interrupt it.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux alone has it
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
