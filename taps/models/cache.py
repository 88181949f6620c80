"""The KV cache in pages: 64 positions each, given to sequences as they grow.

Keys of a page lie side by side, [kv_head, d, 64], so that scores need no horizontal sums; values lie
[kv_head, 64, d_v]. Knows keys, values and pages; nothing of trees or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from taps.peers import PeerBusy

PAGE = 64  # positions


class CacheFull(PeerBusy):
    """No page or place is left; the caller should wait or turn the session away."""


@dataclass(eq=False)
class CachedSequence:
    """One sequence's pages, in order; positions beyond the committed ones are scratch of the next step."""

    pages: list[int] = field(default_factory=list)
    length: int = 0  # committed positions

    def place(self, position: int) -> int:
        """Where a position lies in the pool: page times 64 and its lane."""
        return self.pages[position // PAGE] * PAGE + position % PAGE


class Kept(NamedTuple):
    """Rows of a step that stay: at these offsets behind the committed positions, in this order."""

    sequence: CachedSequence
    path: Sequence[int]


class PagedCache:
    """Keys and values of many sequences. Buffers are allocated on a layer's first use."""

    def __init__(self, max_sequences: int, max_len: int) -> None:
        """Args: max_sequences: that are open at once; max_len: positions of each, scratch included."""
        self.max_len = max_len
        self.num_pages = max_sequences * -(-max_len // PAGE)
        self._places = max_sequences
        self._free = list(reversed(range(self.num_pages)))
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def open(self) -> CachedSequence:
        """An empty sequence; raises `CacheFull` when there are as many as may be. Free it with `close`."""
        if not self._places:
            raise CacheFull("all places for sessions are in use")
        self._places -= 1
        return CachedSequence()

    def close(self, sequence: CachedSequence) -> None:
        self.forget(sequence)
        self._places += 1

    def reserve(self, sequence: CachedSequence, num_rows: int) -> None:
        """Give the sequence pages for so many rows behind its committed ones; raises `CacheFull`."""
        missing = -(-(sequence.length + num_rows) // PAGE) - len(sequence.pages)
        if missing > len(self._free):
            raise CacheFull(f"{missing} pages of {PAGE} positions are wanted, {len(self._free)} are free")
        for _ in range(missing):
            sequence.pages.append(self._free.pop())

    def forget(self, sequence: CachedSequence) -> None:
        """Take all its pages back; it is empty, and open."""
        self._free += reversed(sequence.pages)
        sequence.pages.clear()
        sequence.length = 0

    def layer(self, index: int, like: Tensor, kv_heads: int, dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """The pools of one layer: keys [pages, kv_heads, d, 64] and values [pages, kv_heads, 64, d_v].

        Args: like: a tensor of the layer, looked at for type and device.
        """
        if index not in self._layers:
            keys = like.new_zeros(self.num_pages, kv_heads, dim, PAGE)
            self._layers[index] = keys, like.new_zeros(self.num_pages, kv_heads, PAGE, value_dim)
        return self._layers[index]

    @torch.inference_mode()
    def commit(self, kept: Sequence[Kept]) -> None:
        """Keep these rows of the newest step and drop the others."""
        sources: list[int] = []
        places: list[int] = []
        for sequence, path in kept:
            start = sequence.length
            moved = [(i, offset) for i, offset in enumerate(path) if i != offset]
            sources += [sequence.place(start + offset) for _, offset in moved]
            places += [sequence.place(start + i) for i, _ in moved]
            sequence.length += len(path)
        if sources:
            self._move(torch.tensor(sources), torch.tensor(places))

    def _move(self, sources: Tensor, places: Tensor) -> None:
        """All rows of all sequences at once: none is overwritten before it was read."""
        for keys, values in self._layers.values():
            source, place = sources.to(keys.device), places.to(keys.device)
            page, lane, to_page, to_lane = source // PAGE, source % PAGE, place // PAGE, place % PAGE
            keys[to_page, :, :, to_lane] = keys[page, :, :, lane]
            values[to_page, :, to_lane] = values[page, :, lane]
