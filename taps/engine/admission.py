"""Who has pages of the cache: sessions are let in while there is room for all that they may become.

Where their limits are promised in part only, the pages may run out: then the session that came last is paused.
It gives its pages back, keeps its tokens, and is let in again, before any new one, when there is room.

Knows pages and sessions; nothing of steps.
"""

from __future__ import annotations

from taps.engine.jobs import TargetSession
from taps.models.cache import PAGE, PagedCache


class Admission:
    """The sessions that have pages, in the order in which they were let in."""

    def __init__(self, cache: PagedCache, scratch: int, overcommit: float = 1.0) -> None:
        """Args: scratch: rows of a step behind the committed ones; overcommit: 2 promises half of what sessions
        may still generate.
        """
        self._cache = cache
        self._scratch = scratch
        self._overcommit = overcommit
        self._promised: dict[TargetSession, int] = {}  # pages of each session that is in
        self.num_pauses = 0

    def let_in(self, session: TargetSession) -> bool:
        """Whether the session is in: with the pages there are of its prefix, and room for the others."""
        if session in self._promised:
            return True
        self._cache.reuse(session.sequence, session.tokens, session.asked.cache_salt)
        promised = self._pages_of(session)
        others = sum(max(n - len(s.sequence.pages), 0) for s, n in self._promised.items())
        own = max(promised - len(session.sequence.pages), 0)
        if self._promised and others + own > self._cache.num_available:
            self._cache.forget(session.sequence)
            return False
        self._promised[session] = promised
        session.num_reused = session.sequence.length
        return True

    def make_room(self, session: TargetSession, num_rows: int) -> bool:
        """Reserve a step's rows for a session that is in; whoever came last is paused where pages run out.

        False where that is the session itself.
        """
        while self._cache.missing(session.sequence, num_rows) > self._cache.num_available:
            *_, youngest = self._promised
            self.let_out(youngest)
            self.num_pauses += 1
            if youngest is session:
                return False
        self._cache.reserve(session.sequence, num_rows)
        return True

    def let_out(self, session: TargetSession) -> None:
        """Take the session's pages; it may be let in again."""
        self._promised.pop(session, None)
        self._cache.forget(session.sequence)

    def is_in(self, session: TargetSession) -> bool:
        return session in self._promised

    def _pages_of(self, session: TargetSession) -> int:
        to_come = min(session.num_left, self._cache.max_len) / self._overcommit
        positions = min(len(session.tokens) + int(to_come) + self._scratch, self._cache.max_len)
        return -(-positions // PAGE)
