"""Prompt lookup: proposes what followed the last time the newest tokens appeared. Needs no model.

(Prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence

from taps.context import ContextDelta
from taps.drafting.drafter import Ask, DraftJob, InvalidAsk
from taps.lookup import Lookup, NgramIndex, guess
from taps.peers import PeerGone
from taps.tree import ProposalTree


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
    return guess(index, min(ask.depth + 1, ask.num_nodes - 1))


class NgramSession:
    """Implements `taps.decoding.sessions.DrafterSession` where the loop runs: no lease, no hop, no thread."""

    is_at_hand = True

    def __init__(self, name: str, index: int, max_ngram: int = 4, min_ngram: int = 2) -> None:
        """Args: index: the bit that marks its nodes."""
        self.name, self.index = name, index
        self._known = NgramIndex(max_ngram, min_ngram)
        self.lookup = Lookup(index, max_ngram, min_ngram)

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        tree = draft(self._known, delta, ask)
        if isinstance(tree, InvalidAsk):
            raise PeerGone(str(tree))
        return tree
