"""The rows of one forward: many sequences' newest tokens, packed side by side, and what each row may see.

A row sees its sequence's committed positions and its own path behind them. A chain is prefill or plain
decoding, a tree is verification, and levels added one after the other are draft growth.

Knows sequences and paths; nothing of models or of how attention is computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from taps.models.cache import PAGE, CachedSequence


@dataclass(frozen=True)
class Segment:
    """One sequence's rows in a forward."""

    sequence: CachedSequence
    num_rows: int
    # Each row's path as offsets behind the committed positions, itself last; None is a chain.
    paths: Sequence[Sequence[int]] | None = None
    drafted: int = 0  # rows there already behind the committed positions: the levels before

    @property
    def offsets(self) -> range:
        """Of the rows, behind the committed positions."""
        return range(self.drafted, self.drafted + self.num_rows)

    def path(self, row: int) -> Sequence[int]:
        return range(row + 1) if self.paths is None else self.paths[row]


class Layout(NamedTuple):
    """A step's segments: int32 tensors on the CPU."""

    table: Tensor  # [segments, pages] pages of each sequence, filled up with 0
    committed: Tensor  # [segments] positions
    drafted: Tensor  # [segments] rows there already behind them
    starts: Tensor  # [segments + 1] a segment's rows are from starts[i] to starts[i + 1]
    path_ends: Tensor  # [rows + 1] a row's path is from path_ends[i] to path_ends[i + 1]
    path_offsets: Tensor  # [n]
    is_chain: Tensor  # [segments] 1 where no paths are listed


class Step:
    """The segments of one forward, and the tensors that attention reads of them."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self._elsewhere: dict[torch.device, Step] = {}
        for s in segments:
            assert len(s.sequence.pages) * PAGE >= s.sequence.length + s.offsets.stop, (
                "pages are reserved first"
            )
        self.starts = [0, *accumulate(s.num_rows for s in segments)]

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    def to(self, device: torch.device) -> Step:
        """The same step with its tensors on another device; itself where they are."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Step(self.segments, device)
        return self._elsewhere[device]

    @property
    def num_positions(self) -> int:
        """More than any row's position."""
        return max(s.sequence.length + s.offsets.stop for s in self.segments)

    @cached_property
    def positions(self) -> Tensor:
        """[rows] absolute position of every row."""
        found: list[int] = []
        for s in self.segments:
            c = s.sequence.length
            found += range(c, c + s.num_rows) if s.paths is None else [c - 1 + n for n in map(len, s.paths)]
        return torch.tensor(found, device=self.device)

    @cached_property
    def layout(self) -> Layout:
        """The same segments in integers, as a kernel reads them."""
        segments = self.segments
        paths: list[Sequence[int]] = []
        for s in segments:
            paths += [()] * s.num_rows if s.paths is None else s.paths
        num_pages = max(len(s.sequence.pages) for s in segments)
        table = [p for s in segments for p in [*s.sequence.pages, *[0] * (num_pages - len(s.sequence.pages))]]
        pages, *others = _integers(
            table, [s.sequence.length for s in segments], [s.drafted for s in segments], self.starts,
            [0, *accumulate(map(len, paths))], [*chain.from_iterable(paths)],
            [s.paths is None for s in segments],
        )  # fmt: skip
        return Layout(pages.view(len(segments), num_pages), *others)

    @cached_property
    def places(self) -> Tensor:
        """[rows] where every row's key and value go: page times 64 and the lane in it."""
        found = [s.sequence.place(s.sequence.length + offset) for s in self.segments for offset in s.offsets]
        return torch.tensor(found, device=self.device)


def _integers(*fields: Sequence[int]) -> Sequence[Tensor]:
    """Each as int32 on the CPU. They are made as one tensor: making it costs more than what is in it."""
    joined = array("i", chain.from_iterable(fields))
    return torch.frombuffer(joined, dtype=torch.int32).split_with_sizes([len(field) for field in fields])
