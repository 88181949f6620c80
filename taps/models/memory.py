"""Tensors in huge pages, where the system gives them: what every step reads is found faster.

Many weights are smaller than such a page, so they lie side by side in regions. And how much memory there is:
what a container or a device may still take. Knows memory alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

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
    num_bytes = prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or num_bytes < _HUGE_PAGE:
        return like.new_zeros(shape)
    return _region(num_bytes).view(like.dtype).view(*shape)


def require_memory(num_bytes: int, device: torch.device, what: str, lower: str) -> None:
    """Raise ValueError unless so much is still to be had. Args: what: takes it; lower: settings that help."""
    there = free_memory(device)
    if num_bytes > there:
        raise ValueError(
            f"{what} takes {_gigabytes(num_bytes)}, and {_gigabytes(there)} of memory are left: lower {lower}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the device, or of the container's limit and the machine."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return min([_machine_free(), *_container_free()])


def _machine_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux: nothing is known
        return 1 << 62
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Of the control group, in either version's files; pages of files that it can drop count as free."""
    for limit, used, name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = int((root / limit).read_text()), int((root / used).read_text())
            statistics = (root / limit).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):  # no such version, or no limit: "max"
            continue
        droppable = int(statistics[statistics.index(name) + 1]) if name in statistics else 0
        yield max(most - taken + droppable, 0)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
