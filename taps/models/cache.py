"""The KV cache in pages: 64 positions each, given to sequences as they grow, shared where prefixes are equal.

Keys of a page lie side by side, [kv_head, d, 64], so that scores need no horizontal sums; values lie
[kv_head, 64, d_v]. Knows keys, values and pages; nothing of trees or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from taps.models.memory import zeros
from taps.models.prefixes import PrefixIndex, first_name, next_name
from taps.peers import PeerBusy

PAGE = 64  # positions


class CacheFull(PeerBusy):
    """No page or place is left; the caller should wait or turn the session away."""


class LayerShape(NamedTuple):
    """What a layer keeps of a position."""

    kv_heads: int
    dim: int
    value_dim: int
    device: torch.device  # layers may lie on several

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.dim + self.value_dim)


@dataclass(eq=False)
class CachedSequence:
    """One sequence's pages, in order; positions beyond the committed ones are scratch of the next step."""

    pages: list[int] = field(default_factory=list)
    length: int = 0  # committed positions
    tokens: list[int] = field(default_factory=list)  # of them, where they were told: what pages are named by
    names: list[bytes] = field(default_factory=list)  # of the full pages; the first is what they begin from
    has_place: bool = True  # is one of as many as may be open

    def place(self, position: int) -> int:
        """Where a position lies in the pool: page times 64 and its lane."""
        return self.pages[position // PAGE] * PAGE + position % PAGE

    def places(self, start: int, stop: int) -> Sequence[int]:
        """Of the positions from `start` to `stop`."""
        found: list[int] = []
        while start < stop:
            count = min(stop - start, PAGE - start % PAGE)
            place = self.place(start)
            found += range(place, place + count)
            start += count
        return found


class Kept(NamedTuple):
    """Rows of a step that stay: at these offsets behind the committed positions, in this order."""

    sequence: CachedSequence
    path: Sequence[int]
    tokens: Sequence[int] = ()  # of these rows; without them a page is never found again


class Pool(NamedTuple):
    """Keys and values of layers of one shape."""

    keys: Tensor  # [layers, pages, kv_heads, d, 64]
    values: Tensor  # [layers, pages, kv_heads, 64, d_v]


class PagedCache:
    """Keys and values of many sequences. Buffers are allocated on a layer's first use."""

    def __init__(
        self, max_sequences: int, max_len: int, num_tokens: int | None = None, layers: Sequence[LayerShape] = ()
    ) -> None:
        """Args: max_sequences: that are open at once; max_len: positions of each, scratch included; num_tokens:
        positions of all together, by default what all sequences at their longest need; layers: as far as known,
        those of one shape and device are moved together.
        """
        self.max_len = max_len
        self.num_pages = max_sequences * -(-max_len // PAGE) if num_tokens is None else -(-num_tokens // PAGE)
        self._shapes = layers
        self._places = max_sequences
        self._free = list(reversed(range(self.num_pages)))
        self._users = [0] * self.num_pages
        self._prefixes = PrefixIndex()
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pools: list[Pool] = []

    def open(self, beside: bool = False) -> CachedSequence:
        """An empty sequence; raises `CacheFull` when there are as many as may be, unless it is beside one of
        those. Free it with `close`.
        """
        if beside:
            return CachedSequence(has_place=False)
        if not self._places:
            raise CacheFull("all places for sessions are in use")
        self._places -= 1
        return CachedSequence()

    def close(self, sequence: CachedSequence) -> None:
        self.forget(sequence)
        self._places += sequence.has_place

    @property
    def num_available(self) -> int:
        """Pages that can be given: free ones, and those kept in case their prefix comes again."""
        return len(self._free) + self._prefixes.num_unused

    def missing(self, sequence: CachedSequence, num_rows: int) -> int:
        """Pages that the sequence lacks for so many rows behind its committed ones."""
        return max(-(-(sequence.length + num_rows) // PAGE) - len(sequence.pages), 0)

    def reserve(self, sequence: CachedSequence, num_rows: int) -> None:
        """Give the sequence pages for so many rows behind its committed ones; raises `CacheFull`."""
        missing = self.missing(sequence, num_rows)
        if missing > self.num_available:
            raise CacheFull(f"{missing} pages of {PAGE} positions are wanted, {self.num_available} are free")
        for _ in range(missing):
            page = self._free.pop() if self._free else self._prefixes.evict()
            self._users[page] = 1
            sequence.pages.append(page)

    def reuse(self, sequence: CachedSequence, tokens: Sequence[int], salt: str = "") -> None:
        """Begin an empty sequence of `tokens` with the pages that are there of their prefix.

        The last token is always left to compute. Pages that the sequence fills are found by others of its salt.
        """
        sequence.names = [first_name(salt)]
        for start in range(0, len(tokens) - PAGE, PAGE):
            name = next_name(sequence.names[-1], tokens[start : start + PAGE])
            page = self._prefixes.find(name)
            if page is None:
                break
            self._prefixes.use(page)
            self._users[page] += 1
            sequence.pages.append(page)
            sequence.names.append(name)
        sequence.length = PAGE * len(sequence.pages)
        sequence.tokens = list(tokens[: sequence.length])

    def forget(self, sequence: CachedSequence) -> None:
        """Take all its pages back; it is empty, and open."""
        for page in reversed(sequence.pages):
            self._users[page] -= 1
            if not self._users[page] and not self._prefixes.leave(page):
                self._free.append(page)
        sequence.pages.clear()
        sequence.tokens.clear()
        sequence.names.clear()
        sequence.length = 0

    def layer(self, index: int, like: Tensor, kv_heads: int, dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """The pools of one layer: keys [pages, kv_heads, d, 64] and values [pages, kv_heads, 64, d_v].

        Args: like: a tensor of the layer, looked at for type and device.
        """
        if index not in self._layers:
            shape = LayerShape(kv_heads, dim, value_dim, like.device)
            alike = [i for i, other in enumerate(self._shapes) if other == shape]
            self._allocate(alike if index in alike else [index], shape, like)
        return self._layers[index]

    @property
    def shapes(self) -> list[LayerShape]:
        """Of the layers that were used."""
        found = (self._layers[index] for index in sorted(self._layers))
        return [LayerShape(k.shape[1], k.shape[2], v.shape[3], k.device) for k, v in found]

    def _allocate(self, layers: Sequence[int], shape: LayerShape, like: Tensor) -> None:
        size = len(layers), self.num_pages, shape.kv_heads
        pool = Pool(zeros((*size, shape.dim, PAGE), like), zeros((*size, PAGE, shape.value_dim), like))
        self._pools.append(pool)
        self._layers |= zip(layers, zip(*pool, strict=True), strict=True)

    @torch.inference_mode()
    def commit(self, kept: Sequence[Kept]) -> None:
        """Keep these rows of the newest step and drop the others."""
        sources: list[int] = []
        places: list[int] = []
        for sequence, path, tokens in kept:
            start = sequence.length
            moved = [(i, offset) for i, offset in enumerate(path) if i != offset]
            sources += [sequence.place(start + offset) for _, offset in moved]
            places += [sequence.place(start + i) for i, _ in moved]
            sequence.length += len(path)
            sequence.tokens += tokens
        if sources:
            self._move(torch.tensor(sources), torch.tensor(places))
        for sequence, _, _ in kept:
            self._name_full_pages(sequence)

    def _move(self, sources: Tensor, places: Tensor) -> None:
        """All rows of all sequences and layers at once: none is overwritten before it was read."""
        for keys, values in self._pools:
            source, place = sources.to(keys.device), places.to(keys.device)
            page, lane, to_page, to_lane = source // PAGE, source % PAGE, place // PAGE, place % PAGE
            keys[:, to_page, :, :, to_lane] = keys[:, page, :, :, lane]
            values[:, to_page, :, to_lane] = values[:, page, :, lane]

    def _name_full_pages(self, sequence: CachedSequence) -> None:
        while sequence.names and len(sequence.names) * PAGE <= len(sequence.tokens):
            full = len(sequence.names) - 1
            name = next_name(sequence.names[-1], sequence.tokens[full * PAGE : (full + 1) * PAGE])
            sequence.names.append(name)
            self._prefixes.add(name, sequence.pages[full])
