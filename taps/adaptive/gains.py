"""What a drafter adds to a pass: tokens accepted of its trees, by how deep they may be.

A session's own history counts quickly, since domains shift within an answer; all sessions' is the prior, and
goes on counting: few trees of a session's own tell little of those to come.

Knows counts; nothing of trees or costs.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_DEPTH = 8  # tokens of a path that are told apart
_HOPED_FOR = 0.6  # of one more token, that is thought to be accepted before anything was seen
_FLEET, _OWN = 0.98, 0.88  # of older trees, at each new one
_RARELY = 0.01
_HOPED = 2.0  # trees that what is hoped for counts for
_HOPED_BY_DEPTH = [sum(_HOPED_FOR**n for n in range(1, depth + 1)) for depth in range(MOST_DEPTH + 1)]
_PRIOR = 1.0  # trees of a session's own that all sessions' count for, however many it had


class Gains:
    """Mean accepted tokens of trees cut at each depth."""

    def __init__(self, prior: Gains | None = None) -> None:
        """Args: prior: what all sessions saw, from which a session's own begin; without one this is it."""
        self._prior = prior
        self._memory, self._weight = (_FLEET, _HOPED) if prior is None else (_OWN, 0.0)
        self._sums = [self._weight * hoped for hoped in _HOPED_BY_DEPTH]

    def observe(self, accepted: int, depth: int) -> None:
        """Take in a tree. Args: accepted: tokens of it that the text has; depth: of its paths, as was asked.

        One that was right to its end might have gone on: as far as it is thought to, so far.
        """
        asked = min(depth, MOST_DEPTH)
        to_the_end = max(self.expected(asked) - self.expected(asked - 1), _RARELY)  # how often it is
        beyond = [(self.expected(cap) - self.expected(asked)) / to_the_end for cap in range(MOST_DEPTH + 1)]
        self._weight = self._memory * self._weight + 1.0
        for cap in range(1, MOST_DEPTH + 1):
            more = min(beyond[cap], cap - asked) if cap > asked and accepted >= asked else 0.0
            self._sums[cap] = self._memory * self._sums[cap] + min(accepted, cap) + more

    def expected(self, depth: int) -> float:
        """Tokens accepted of a tree with paths of so many tokens."""
        cap = min(depth, MOST_DEPTH)
        if self._prior is None:
            return self._sums[cap] / self._weight
        return (self._sums[cap] + _PRIOR * self._prior.expected(cap)) / (self._weight + _PRIOR)


def accepted_of(path_tokens: Sequence[int], parents: Sequence[int], text: Sequence[int]) -> list[bool]:
    """Which nodes of a tree the text has; the root first, which it has by definition.

    Args: path_tokens, parents: of every node; text: what the target decided after the root.
    """
    depths = [0] * len(parents)
    found = [True] + [False] * (len(parents) - 1)
    for node in range(1, len(parents)):
        parent = parents[node]
        depths[node] = depth = depths[parent] + 1
        found[node] = found[parent] and depth <= len(text) and path_tokens[node] == text[depth - 1]
    return found
