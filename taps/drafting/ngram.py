"""Prompt lookup: proposes what followed the last time the newest tokens appeared. Needs no model.

(Prompt lookup decoding, Saxena 2023.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from taps.drafting.drafter import DraftJob, InvalidAsk
from taps.tree import ProposalTree

_OTHERS = 100  # tokens that what is left of the probability is thought to be spread over


def _entropy(sure: float) -> float:
    """Nats, of a distribution that gives one token the probability `sure`."""
    rest = 1.0 - sure
    return -sure * math.log(sure) - rest * math.log(rest / _OTHERS)


class NgramDrafter:
    """Looks the longest known suffix up in the session's own tokens."""

    in_kernel = False

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        self._max_ngram = max_ngram
        self._min_ngram = min_ngram

    def open(self) -> list[int]:
        return []

    def close(self, session: list[int]) -> None:
        session.clear()

    def step(self, jobs: Sequence[DraftJob]) -> list[ProposalTree | Exception | None]:
        return [self._draft(job) for job in jobs]

    def _draft(self, job: DraftJob) -> ProposalTree | InvalidAsk:
        tokens: list[int] = job.session
        if not job.delta.tokens or not 0 <= job.delta.start <= len(tokens):
            return InvalidAsk(
                f"news from position {job.delta.start} do not join the {len(tokens)} tokens known"
            )
        del tokens[job.delta.start :]
        tokens += job.delta.tokens
        length = min(job.ask.depth + 1, job.ask.num_nodes - 1)
        start, matched = self._lookup(tokens)
        if not matched:
            return ProposalTree.root_only(tokens[-1])
        drafted = tokens[start : start + length]
        # A longer match is a surer one; the score is a guess that orders these nodes among others'.
        sure = matched / (matched + 1)
        n = len(drafted) + 1
        scores = tuple(math.log(sure) * i for i in range(n))
        parents = tuple(range(-1, n - 1))
        return ProposalTree((tokens[-1], *drafted), parents, scores, (0,) * n, (_entropy(sure),) * n)

    def _lookup(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Where the latest earlier occurrence of the longest suffix ends, and that suffix's length."""
        for n in range(min(self._max_ngram, len(tokens) - 1), self._min_ngram - 1, -1):
            suffix = tokens[-n:]
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == suffix:
                    return start + n, n
        return 0, 0
