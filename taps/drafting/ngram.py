"""Prompt lookup: proposes what followed the last time the newest tokens appeared. Needs no model.

(Prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from taps.context import ContextDelta
from taps.drafting.drafter import Ask, DraftJob, InvalidAsk
from taps.peers import PeerGone
from taps.tree import ProposalTree

_OTHERS = 100  # tokens that what is left of the probability is thought to be spread over


def _entropy(sure: float) -> float:
    """Nats, of a distribution that gives one token the probability `sure`."""
    rest = 1.0 - sure
    return -sure * math.log(sure) - rest * math.log(rest / _OTHERS)


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


class NgramDrafter:
    """Looks the longest known suffix up in the session's own tokens."""

    in_kernel = False

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        self._sizes = max_ngram, min_ngram

    def open(self) -> NgramIndex:
        return NgramIndex(*self._sizes)

    def close(self, session: NgramIndex) -> None:
        session.clear()

    def profile(self) -> dict[int, float]:
        return {}

    def step(self, jobs: Sequence[DraftJob]) -> list[ProposalTree | Exception | None]:
        return [draft(job.session, job.delta, job.ask) for job in jobs]


def draft(index: NgramIndex, delta: ContextDelta, ask: Ask) -> ProposalTree | InvalidAsk:
    """A chain of what followed; the root alone where nothing did. There may be no news."""
    if 0 <= delta.start < len(index.tokens):  # it begins anew
        known = index.tokens[: delta.start]
        index.clear()
        index.extend(known)
    if delta.start != len(index.tokens) or delta.end < 1:
        return InvalidAsk(f"news from position {delta.start} do not join the {len(index.tokens)} tokens known")
    index.extend(delta.tokens)
    start, matched = index.lookup()
    if not matched:
        return ProposalTree.root_only(index.tokens[-1])
    drafted = index.tokens[start : start + min(ask.depth + 1, ask.num_nodes - 1)]
    # A longer match is a surer one; the score is a guess that orders these nodes among others'.
    sure = matched / (matched + 1)
    n = len(drafted) + 1
    scores = tuple(math.log(sure) * i for i in range(n))
    return ProposalTree(
        (index.tokens[-1], *drafted), tuple(range(-1, n - 1)), scores, (0,) * n, (_entropy(sure),) * n
    )


class NgramSession:
    """Implements `taps.decoding.sessions.DrafterSession` where the loop runs: no lease, no hop, no thread."""

    is_at_hand = True

    def __init__(self, name: str, index: int, known: NgramIndex | None = None) -> None:
        """Args: index: the bit that marks its nodes; known: an empty one."""
        self.name, self.index = name, index
        self._known = known or NgramIndex()

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        tree = draft(self._known, delta, ask)
        if isinstance(tree, InvalidAsk):
            raise PeerGone(str(tree))
        return tree
