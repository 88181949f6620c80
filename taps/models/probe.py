"""Whether a loaded model gives a row the same bits whatever shares its step: found out on its own weights.

The same tokens are computed at once, in pieces of many sizes, along a path of a tree with siblings, and beside
another sequence. It runs where steps run: another number of threads may be another order of sums.

Knows models and steps; nothing of who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from taps.models.cache import CachedSequence, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.step import Segment

_TOKENS = 72  # more than a page
_PIECES = (1, 1, 2, 3, 5, 8, 13, 17, 22)
_COMMITTED = 61  # from where the tree crosses into the next page
_SIBLINGS = 2  # beside each node of the path
Rows = tuple[Tensor, Tensor]  # features and logits


class Probe:
    """One run of the probe."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._tokens = [(7919 * i + 11) % model.vocab_size for i in range(_TOKENS)]
        self._cache = PagedCache(3, _TOKENS + _SIBLINGS * _TOKENS)

    @torch.inference_mode()
    def fault(self) -> str | None:
        """What changes a row's bits, in words; None where nothing does."""
        whole = self._extend([(self._cache.open(), self._tokens)])[0]
        if not _same(self._in_pieces(), whole):
            return "how many rows are computed at once changes a row's bits"
        if not _same(self._in_a_tree(), _rows(whole, slice(_COMMITTED, _TOKENS))):
            return "siblings in a tree change a row's bits"
        if not _same(self._beside_another(), whole):
            return "another sequence in the step changes a row's bits"
        return None

    def _extend(
        self, parts: Sequence[tuple[CachedSequence, Sequence[int]]],
        paths: Sequence[Sequence[int]] | None = None,
    ) -> list[Rows]:  # fmt: skip
        """Features and logits of each part's rows."""
        segments = []
        for sequence, tokens in parts:
            self._cache.reserve(sequence, len(tokens))
            segments.append(Segment(sequence, len(tokens), paths))
        ids = [token for _, tokens in parts for token in tokens]
        both = self._model.extend(segments, ids, range(len(ids)), self._cache)
        starts = [0, *accumulate(segment.num_rows for segment in segments)]
        return [_rows(both, slice(start, end)) for start, end in pairwise(starts)]

    def _in_pieces(self) -> Rows:
        sequence, found, start = self._cache.open(), [], 0
        for size in _PIECES:
            found += self._extend([(sequence, self._tokens[start : start + size])])
            self._cache.commit([Kept(sequence, range(size))])
            start += size
        self._cache.close(sequence)
        return torch.cat([rows[0] for rows in found]), torch.cat([rows[1] for rows in found])

    def _in_a_tree(self) -> Rows:
        """The rows along one path, siblings before and behind each of them."""
        sequence = self._cache.open()
        self._extend([(sequence, self._tokens[:_COMMITTED])])
        self._cache.commit([Kept(sequence, range(_COMMITTED))])
        tokens: list[int] = []
        paths: list[tuple[int, ...]] = []
        along: tuple[int, ...] = ()
        for token in self._tokens[_COMMITTED:]:
            above = along
            for shift in range(-1, _SIBLINGS):
                if shift == 0:
                    along = (*above, len(tokens))
                paths.append((*above, len(tokens)))
                tokens.append((token + shift) % self._model.vocab_size)
        (rows,) = self._extend([(sequence, tokens)], paths)
        self._cache.close(sequence)
        return rows[0][list(along)], rows[1][list(along)]

    def _beside_another(self) -> Rows:
        sequence, other = self._cache.open(), self._cache.open()
        rows = self._extend([(other, self._tokens[::-1]), (sequence, self._tokens)])[1]
        self._cache.close(other)
        self._cache.close(sequence)
        return rows


def _rows(of: Rows, which: slice) -> Rows:
    return of[0][which], of[1][which]


def _same(one: Rows, other: Rows) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
