"""What steps cost: seconds by how large they are, profiled at start and corrected by every step there is.

A table of sizes, linear between them. It is read as what comes nearest to it and is convex: what it decides is
whether one more pays, and noise in one place would make all beyond it look cheap.

Knows numbers; nothing of what a step is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_NEWEST = 0.08  # weight of the newest step in the sizes next to it
_DRIFT = 0.08  # and in all others: what slows one step down slows others down
_WILDEST = 0.5  # of what was expected, that one step may differ by
_PAUSE = 3.0  # steps: who waits so long has nothing to do
_UNSEEN = 0.01  # steps that a size counts for which there was none of
_PER_ROW = 0.05  # of the smallest step, that a row is thought to cost before anything was measured


class StepCosts:
    """Seconds of a step by its size."""

    def __init__(self, measured: Mapping[int, float] | None = None, is_guess: bool = False) -> None:
        """Args: measured: size -> seconds, of at least two sizes where any were profiled; is_guess: they are
        right in proportion at best, and the first step says how large they are.
        """
        self._sizes = list(_SIZES)
        self._is_known = bool(measured) and not is_guess
        if measured:
            self._seconds = _interpolated(sorted(measured.items()))
        else:
            self._seconds = [1.0 + _PER_ROW * (size - 1) for size in _SIZES]
        self._seen = [_UNSEEN] * len(_SIZES)  # steps of each size, older ones counting less
        self._fitted: list[float] | None = None  # since the newest step

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self._is_known

    def seconds(self, size: float) -> float:
        """Of a step of this size; beyond the largest as between the last two."""
        return self._read(self._convex(), size)

    def observe(self, size: int, seconds: float) -> None:
        """Learn from a step; one that was held up by something else counts for little."""
        if self._is_known:
            expected = self._read(self._seconds, size)
            bound = _WILDEST * expected
            seconds = min(max(seconds, expected - bound), expected + bound)
        self._learn(size, seconds, _NEWEST, _DRIFT)

    def size_within(self, seconds: float) -> int:
        """The largest step that lasts no longer; no bound before anything was measured."""
        if not self._is_known:
            return 1 << 30
        known = self._convex()
        if seconds >= known[-1]:
            slope = self.seconds(_SIZES[-1] + 1) - known[-1]
            beyond = (seconds - known[-1]) / slope if slope > 0 else math.inf
            return int(min(_SIZES[-1] + beyond, 1 << 30))
        at = bisect_right(known, seconds) - 1
        if at < 0:
            return 0
        span = known[at + 1] - known[at]
        share = (seconds - known[at]) / span if span > 0 else 1.0
        return int(self._sizes[at] + share * (self._sizes[at + 1] - self._sizes[at]))

    def table(self) -> dict[int, float]:
        """Size -> seconds."""
        return dict(zip(self._sizes, self._convex(), strict=True))

    def _convex(self) -> list[float]:
        """Where there are more steps than looks it is not made for every step."""
        if self._fitted is None:
            self._fitted = _convex(self._seconds, self._seen)
        return self._fitted

    def _read(self, table: Sequence[float], size: float) -> float:
        at, share = self._between(size)
        return table[at] + share * (table[at + 1] - table[at])

    def _between(self, size: float) -> tuple[int, float]:
        at = min(max(bisect_right(self._sizes, size) - 1, 0), len(self._sizes) - 2)
        return at, (size - self._sizes[at]) / (self._sizes[at + 1] - self._sizes[at])

    def _learn(self, size: int, seconds: float, newest: float, drift: float) -> None:
        expected = self._read(self._seconds, size)
        if not self._is_known:
            drift, self._is_known = 1.0, True
        scale = 1.0 + drift * (seconds / expected - 1.0)
        self._seconds = [known * scale for known in self._seconds]
        error, (at, share) = seconds - scale * expected, self._between(size)
        self._seen = [(1.0 - newest) * seen for seen in self._seen]
        for place, part in ((at, 1.0 - share), (at + 1, share)):
            weight = newest * min(max(part, 0.0), 1.0)
            self._seconds[place] += weight * error
            self._seen[place] += weight
        # More never costs less.
        for place in range(at, 0, -1):
            self._seconds[place - 1] = min(self._seconds[place - 1], self._seconds[place])
        for place in range(at + 1, len(self._seconds)):
            self._seconds[place] = max(self._seconds[place], self._seconds[place - 1])
        self._fitted = None


class Rhythm:
    """What passes between steps: the way of verdicts and trees, and drafting, as long as there is work."""

    def __init__(self) -> None:
        self.between_s = 0.0
        self._ended: float | None = None

    def observe(self, began: float, ended: float) -> None:
        """Take in a step, by one clock; after a long pause nothing is learned."""
        if self._ended is not None and began - self._ended < _PAUSE * (ended - began):
            self.between_s += _NEWEST * (began - self._ended - self.between_s)
        self._ended = ended


def _interpolated(measured: Sequence[tuple[int, float]]) -> list[float]:
    """Of every size: linear between those measured and beyond the largest; no less than of any smaller."""
    found: list[float] = []
    for size in _SIZES:
        at = min(max(bisect_right(measured, (size, math.inf)) - 1, 0), len(measured) - 2)
        (low, a), (high, b) = measured[at], measured[at + 1]
        seconds = a + (b - a) * max(size - low, 0) / (high - low)
        found.append(max([seconds, *found[-1:]]))
    return found


def _convex(seconds: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The same with slopes that never fall: pooled where they do, which is isotonic regression of the slopes.

    Args: weights: of the sizes; their mean stays.
    """
    pooled: list[tuple[float, int, int]] = []  # seconds more, sizes more, places
    for (size, low), (larger, high) in pairwise(zip(_SIZES, seconds, strict=True)):
        rise, width, places = high - low, larger - size, 1
        while pooled and pooled[-1][0] * width > rise * pooled[-1][1]:
            more, sizes, others = pooled.pop()
            rise, width, places = rise + more, width + sizes, places + others
        pooled.append((rise, width, places))
    slopes = [rise / width for rise, width, places in pooled for _ in range(places)]
    rises = (slope * (larger - size) for slope, (size, larger) in zip(slopes, pairwise(_SIZES), strict=True))
    found = list(accumulate(rises, initial=seconds[0]))
    differ = [known - value for known, value in zip(seconds, found, strict=True)]
    shift = sum(w * d for w, d in zip(weights, differ, strict=True)) / sum(weights)
    return [value + shift for value in found]
