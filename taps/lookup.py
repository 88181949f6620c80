"""Prompt lookup: what followed the last time the newest tokens appeared. Needs no model.

Drafters and verifiers both may look tokens up, so neither owns this. Knows tokens; nothing of sessions.
(Prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from taps.tree import ProposalTree

_OTHERS = 100  # tokens that what is left of the probability is thought to be spread over


@dataclass(frozen=True)
class Lookup:
    """How tokens are looked up, and for whom."""

    drafter: int  # the bit that marks what is found
    max_ngram: int = 4  # newest tokens that must have been there before, at most and at least
    min_ngram: int = 2
    num_tokens: int = 5  # that are drafted at most

    @property
    def owners(self) -> tuple[int, ...]:
        """The owner bits of as many drafted nodes as there may be."""
        return (1 << self.drafter,) * self.num_tokens


class NgramIndex:
    """One session's tokens, and where each of their runs was last followed by another token."""

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # run -> position behind it, the latest but the end

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._note(len(self.tokens))
            self.tokens.append(token)

    def clear(self) -> None:
        self.tokens.clear()
        self._after.clear()

    def lookup(self) -> tuple[int, int]:
        """Where the latest earlier occurrence of the longest known suffix ends, and that suffix's length."""
        for size in self._sizes:
            if size < len(self.tokens) and (found := self._after.get(tuple(self.tokens[-size:]))) is not None:
                return found, size
        return 0, 0

    def _note(self, end: int) -> None:
        """The runs that end here are followed by something from now on."""
        for size in self._sizes:
            if size <= end:
                self._after[tuple(self.tokens[end - size : end])] = end


def guess(index: NgramIndex, num_tokens: int) -> ProposalTree:
    """A chain of what followed, of so many tokens at most; the root alone where nothing did."""
    start, matched = index.lookup()
    if not matched:
        return ProposalTree.root_only(index.tokens[-1])
    drafted = index.tokens[start : start + num_tokens]
    # A longer match is a surer one; the score is a guess that orders these nodes among others'.
    sure = matched / (matched + 1)
    n = len(drafted) + 1
    return ProposalTree(
        (index.tokens[-1], *drafted),
        tuple(range(-1, n - 1)),
        tuple(math.log(sure) * i for i in range(n)),
        (0,) * n,
        (_entropy(sure),) * n,
    )


def _entropy(sure: float) -> float:
    """Nats, of a distribution that gives one token the probability `sure`."""
    rest = 1.0 - sure
    return -sure * math.log(sure) - rest * math.log(rest / _OTHERS)
