"""How many threads the kernel computes with, for each thread that calls it.

Its team is its own, so it may be larger than what torch computes with. Knows numbers alone.
"""

from __future__ import annotations

from threading import local

import torch


class _Set(local):
    number: int | None = None


_set = _Set()


def use_threads(number: int | None) -> None:
    """Calls from this thread compute with so many from now on. Args: number: None is as many as torch does."""
    _set.number = number


def num_threads() -> int:
    """That a call from this thread computes with."""
    return torch.get_num_threads() if _set.number is None else _set.number
