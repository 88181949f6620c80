"""Batches formed on purpose: how long a step waits for sessions that are on their way back.

Sessions that miss a step wait for its end, and from then on two groups wait for each other's steps, each paying
what a step costs at least. A step that waits `d` for `j` more sessions costs the `w` that are there `d` each,
and saves the others the rest of a step of `t`: it pays while d * w <= (t - d) * j.

Knows sessions by name, times and nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable

_NEW = 0.3  # weight of the newest time
_OVERDUE = 1.5  # times what a session usually takes: it may never come
_LEAST_S = 1e-4  # that is worth waiting
_AT_LEAST = 0.2  # of what it usually takes, that one past its time is thought to take yet


class Lingering:
    """When each session is expected back. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._usual: dict[Hashable, float] = {}  # from an answer to the next job
        self._answered: dict[Hashable, float] = {}  # when, of those that are away

    def leave(self, session: Hashable, now: float) -> None:
        """A session has its answer, and will come with another job."""
        self._answered[session] = now

    def arrive(self, session: Hashable, now: float) -> None:
        """A session has come with a job."""
        answered = self._answered.pop(session, None)
        if answered is not None:
            usual = self._usual.get(session, now - answered)
            self._usual[session] = usual + _NEW * (now - answered - usual)

    def forget(self, session: Hashable) -> None:
        """A session is closed, or its job was given up."""
        self._usual.pop(session, None)
        self._answered.pop(session, None)

    def wait_s(self, num_waiting: int, step_s: float, now: float) -> float:
        """How long a step should wait for others, 0 where it should not. Args: step_s: what one lasts."""
        away = []
        for session, answered in self._answered.items():
            usual, gone = self._usual.get(session), now - answered
            if usual is not None and gone < _OVERDUE * usual:
                away.append(max(usual - gone, _AT_LEAST * usual))
        away.sort()
        longest = 0.0
        for number, due in enumerate(away, 1):
            if due * num_waiting <= (step_s - due) * number:
                longest = due
        return longest if longest >= _LEAST_S else 0.0
