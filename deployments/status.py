"""How a router fares: what it has answered since it started and lately, and what it refused.

Kept in memory, for people who look; what is to be kept longer is in the metrics. Knows counts and times;
nothing of Ray or HTTP.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

_LATELY_S = 10.0  # that speed is told of
_REFUSALS = 20  # the newest, that are kept


class Recent:
    """One router's."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._began = clock()
        self._tokens: deque[tuple[float, int]] = deque()  # when, how many, not longer ago than lately
        self._num_tokens = 0
        self._outcomes: Counter[str] = Counter()
        self._refusals: deque[tuple[float, str]] = deque(maxlen=_REFUSALS)
        self._drafted: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._answering = 0

    def begin(self) -> None:
        """A request is being answered."""
        self._answering += 1

    def deliver(self, tokens: int) -> None:
        now = self._clock()
        self._num_tokens += tokens
        self._tokens.append((now, tokens))
        self._forget(now)

    def end(self, outcome: str, drafted: Counter[str], accepted: Counter[str]) -> None:
        """Args: drafted, accepted: tokens by the drafter's name."""
        self._answering -= 1
        self._outcomes[outcome] += 1
        self._drafted += drafted
        self._accepted += accepted

    def refuse(self, reason: str) -> None:
        """A request was refused before it began."""
        self._outcomes["refused"] += 1
        self._refusals.append((self._clock(), reason))

    def told(self) -> dict[str, Any]:
        """As JSON has it; times are seconds since 1970."""
        now = self._clock()
        self._forget(now)
        lately = min(now - self._began, _LATELY_S)
        tokens = sum(count for _, count in self._tokens)
        return {
            "since": round(self._began, 3),
            "answering": self._answering,
            "requests": dict(self._outcomes),
            "tokens": self._num_tokens,
            "tokens_per_second": round(tokens / lately, 2) if lately > 0 else 0.0,
            "drafters": {
                name: {"drafted": self._drafted[name], "accepted": self._accepted[name]}
                for name in sorted(self._drafted | self._accepted)
            },
            "refusals": [{"at": round(at, 3), "reason": reason} for at, reason in reversed(self._refusals)],
        }

    def _forget(self, now: float) -> None:
        while self._tokens and now - self._tokens[0][0] > _LATELY_S:
            self._tokens.popleft()
