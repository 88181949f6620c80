"""Tensors in huge pages, where the system gives them: what every step reads is found faster.

Many weights are smaller than such a page, so they lie side by side in regions. Knows memory alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_REGION = 64 << 20
_LINE = 64  # bytes: what a processor reads at once, where a tensor begins


class HugePages:
    """Gives out memory of the CPU; a region is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in memory that nothing else lies in."""
        num_bytes = prod(shape) * dtype.itemsize
        if self._used + num_bytes > len(self._region):
            self._region, self._used = _region(max(num_bytes, _REGION)), 0
        start, self._used = self._used, self._used + -(-num_bytes // _LINE) * _LINE
        return self._region[start : start + num_bytes].view(dtype).view(*shape)


def _region(num_bytes: int) -> Tensor:
    pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + num_bytes]


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of the type and on the device of `like`, which take memory as they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return _region(prod(shape) * like.dtype.itemsize).view(like.dtype).view(*shape)
