"""The rows of one forward: many sequences' newest tokens, packed side by side, and what each row may see.

A row sees its sequence's committed positions and its own path behind them. A chain is prefill or plain
decoding, a tree is verification, and levels added one after the other are draft growth.

Knows sequences and paths; nothing of models or of how attention is computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from taps.models.cache import PAGE, CachedSequence

_HOST = torch.device("cpu")


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
    """A step in integers: int32 tensors on one device."""

    tokens: Tensor  # [rows] ids
    chosen: Tensor  # [n] rows: whose logits are asked for, or of the level before, which this one goes on from
    positions: Tensor  # [rows] absolute
    places: Tensor  # [rows] where each row's key and value go: page times 64 and the lane in it
    committed: Tensor  # [segments] positions
    drafted: Tensor  # [segments] rows there already behind them
    starts: Tensor  # [segments + 1] a segment's rows are from starts[i] to starts[i + 1]
    is_chain: Tensor  # [segments] 1 where no paths are listed
    path_ends: Tensor  # [rows + 1] a row's path is from path_ends[i] to path_ends[i + 1]
    path_offsets: Tensor  # [n]
    table: Tensor  # [segments, pages] pages of each sequence, filled up with 0


class StepInputs:
    """Where the integers of a model's steps lie: each field at its place in one buffer, step after step.

    One copy takes a step's to a device, and the next step's overwrite them. Places change only when a field
    outgrows its room, which doubles.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device  # the model's
        self.num_written = 0
        self._room = [0] * len(Layout._fields)
        self._starts: list[int] = []
        self._host = array("i")
        self._buffers: dict[torch.device, Tensor] = {}
        self._current: set[torch.device] = set()

    def write(self, fields: Sequence[Sequence[int]]) -> None:
        """Args: fields: of `Layout`, in its order."""
        if any(len(field) > room for field, room in zip(fields, self._room, strict=True)):
            self._make_room([len(field) for field in fields])
        for start, field in zip(self._starts, fields, strict=True):
            self._host[start : start + len(field)] = array("i", field)
        self.num_written += 1
        self._current = {_HOST}

    def read(self, device: torch.device, counts: Sequence[int]) -> Sequence[Tensor]:
        """As much of every field as there is of it. Nothing waits for the device."""
        if device not in self._buffers:
            self._buffers[device] = torch.empty(len(self._host), dtype=torch.int32, device=device)
        buffer = self._buffers[device]
        if device not in self._current:
            # From pageable memory: it has been read when this returns, and may be written again.
            buffer.copy_(self._buffers[_HOST], non_blocking=True)
            self._current.add(device)
        sizes = [n for count, room in zip(counts, self._room, strict=True) for n in (count, room - count)]
        return buffer.split_with_sizes(sizes)[::2]

    def _make_room(self, counts: Sequence[int]) -> None:
        self._room = [
            room if room >= n else 1 << (n - 1).bit_length() for n, room in zip(counts, self._room, strict=True)
        ]
        self._starts = [0, *accumulate(self._room)][:-1]
        self._host = array("i", bytes(4 * sum(self._room)))
        self._buffers = {_HOST: torch.frombuffer(self._host, dtype=torch.int32)}


class Step:
    """The segments of one forward and their rows' tokens."""

    def __init__(
        self, segments: Sequence[Segment], inputs: StepInputs, tokens: Sequence[int] = (),
        chosen: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Serves until the next one is written to the same inputs. Args: tokens, chosen: as in `Layout`."""
        for s in segments:
            assert len(s.sequence.pages) * PAGE >= s.sequence.length + s.offsets.stop, (
                "pages are reserved first"
            )
        self.segments = segments
        self.starts = [0, *accumulate(s.num_rows for s in segments)]
        self._num_pages = max(len(s.sequence.pages) for s in segments)
        fields = [tokens, chosen, *self._fields()]
        inputs.write(fields)
        self._inputs, self._number = inputs, inputs.num_written
        self._counts = [len(field) for field in fields]
        self._layouts: dict[torch.device, Layout] = {}

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    @property
    def num_positions(self) -> int:
        """More than any row's position."""
        return max(s.sequence.length + s.offsets.stop for s in self.segments)

    def on(self, device: torch.device) -> Layout:
        """What attention and the model's first and last layers read; layers may lie on several devices."""
        assert self._number == self._inputs.num_written, "another step was written since"
        if device not in self._layouts:
            layout = Layout._make(self._inputs.read(device, self._counts))
            table = layout.table.view(len(self.segments), self._num_pages)
            self._layouts[device] = layout._replace(table=table)
        return self._layouts[device]

    def _fields(self) -> Iterator[Sequence[int]]:
        """Those of `Layout` after the first two."""
        segments = self.segments
        positions: list[int] = []
        places: list[int] = []
        paths: list[Sequence[int]] = []
        table: list[int] = []
        for s in segments:
            c, pages = s.sequence.length, s.sequence.pages
            positions += range(c, c + s.num_rows) if s.paths is None else [c - 1 + len(p) for p in s.paths]
            places += s.sequence.places(c + s.offsets.start, c + s.offsets.stop)
            paths += [()] * s.num_rows if s.paths is None else s.paths
            table += pages
            table += [0] * (self._num_pages - len(pages))
        yield positions
        yield places
        yield [s.sequence.length for s in segments]
        yield [s.drafted for s in segments]
        yield self.starts
        yield [s.paths is None for s in segments]
        yield [0, *accumulate(map(len, paths))]
        yield [*chain.from_iterable(paths)]
        yield table
