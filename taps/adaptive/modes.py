"""Whether sessions of a router do what costs all of them something, such as drafting: by what they give with it
and without.

What costs are thought to be says whether it is worth a trial; what came of it says whether it stays. The mode
that is not in use is tried now and then, since workloads and machines change.

Knows tokens, sessions and seconds; nothing of what is done or what a pass costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

_WINDOW_S = 0.3  # in which tokens are counted
_SETTLES_S = 0.1  # after a change of mode, until tokens are the new one's
_NEWEST = 0.1  # weight of the newest window
_STICKY = 0.03  # of the tokens per second, that a change must gain
_TRIAL_S = 1.2  # that a trial lasts at most
_FIRST_PAUSE_S = {False: 5.0, True: 15.0}  # between trials: of doing without, of doing it
_LONGEST_PAUSE_S = 180.0
_WORTH_TRYING = 0.8  # of what doing without gives, that it must be thought to
_ENOUGH = 2  # windows, to judge a trial by
_THOUGHT_COUNTS, _MOST_COUNT = 4, 20  # windows, for what is thought and for what was measured
_LEAST = 0.01
_HOPELESS = 0.85  # of what doing without gives: a trial that gives less ends early


@dataclass
class _Rate:
    """Tokens a second, to those that so many sessions were thought to get at first."""

    value: float = 0.0
    windows: int = 0

    def observe(self, value: float) -> None:
        self.windows += 1
        self.value += max(1.0 / self.windows, _NEWEST) * (value - self.value)


@dataclass
class _Load:
    """What is known at one load, and what is tried there."""

    rates: dict[bool, _Rate] = field(default_factory=lambda: {False: _Rate(), True: _Rate()})
    lasted_s: float = 0.0  # all windows together: what trials are timed by, since there may be breaks
    tried: bool | None = None  # the mode that is tried now
    until: float = -math.inf
    before: int = 0  # windows that were known of it before that
    next_at: dict[bool, float] = field(default_factory=dict)
    pause_s: dict[bool, float] = field(default_factory=lambda: dict(_FIRST_PAUSE_S))


class Modes:
    """Of one router. A mode is whether it is done."""

    def __init__(self, capacity: Callable[[float], float], clock: Callable[[], float]) -> None:
        """Args: capacity: tokens per second that sessions are thought to get without drafts, about."""
        self._capacity, self._clock = capacity, clock
        self._loads: dict[int, _Load] = {}
        self._mode = False
        self._sessions = 0
        self._changed = self._began = -math.inf
        self._tokens, self._session_s = 0, 0.0
        self._decided: tuple[float, bool] | None = None  # what was thought, and decided, since anything was new

    def has(self, sessions: int) -> None:
        """So many are open from now on."""
        now = self._clock()
        self._session_s += self._sessions * max(now - max(self._changed, self._began), 0.0)
        self._sessions, self._changed, self._decided = sessions, now, None

    def count(self, tokens: int) -> None:
        """A session was told so many more."""
        now = self._clock()
        if now < self._began:
            return
        self._tokens += tokens
        if now - self._began < _WINDOW_S:
            return
        self.has(self._sessions)
        lasted_s = now - self._began
        sessions = self._session_s / lasted_s
        if sessions > 1 and lasted_s < 2 * _WINDOW_S:
            load = self._at(round(sessions))
            load.lasted_s += lasted_s
            load.rates[self._mode].observe(self._tokens / lasted_s / self._capacity(sessions))
        self._begin(now)

    def is_on(self, thought: float) -> bool:
        """Whether it should be done now. Args: thought: the tokens a second with it to those without, as far as
        costs and gains tell.
        """
        if self._decided is not None and self._decided[0] == thought:
            return self._decided[1]
        # One alone waits for its own steps only: their times say all.
        mode = self._decide(thought) if self._sessions > 1 else thought > 1.0 + _STICKY * (not self._mode)
        if mode != self._mode:
            self._mode = mode
            self._begin(self._clock() + _SETTLES_S)
        self._decided = thought, mode
        return mode

    def ratio(self, thought: float) -> float:
        """The tokens a second with it to those without: as measured where both were, and as thought where that
        was little. Windows differ by what else they saw, above all by prompts.
        """
        done, plain = self._at(self._sessions).rates[True], self._at(self._sessions).rates[False]
        windows = min(done.windows, plain.windows, _MOST_COUNT)
        if not windows:
            return thought
        measured = math.log(max(done.value, _LEAST) / max(plain.value, _LEAST))
        guessed = math.log(max(thought, _LEAST))
        return math.exp((_THOUGHT_COUNTS * guessed + windows * measured) / (_THOUGHT_COUNTS + windows))

    def _decide(self, thought: float) -> bool:
        load = self._at(self._sessions)
        now, ratio = load.lasted_s, self.ratio(thought)
        better = ratio > 1.0 + _STICKY * (1 if not self._mode else -1)
        if load.tried is not None:
            known = load.rates[load.tried].windows - load.before
            is_hopeless = load.tried and known >= _ENOUGH and ratio < _HOPELESS
            if now < load.until and not is_hopeless:
                return load.tried
            self._end(load, load.tried == better, load.tried, now)
        other = not better
        due = load.next_at.setdefault(other, now + load.pause_s[other] / 5)
        if now < due or (other and thought < _WORTH_TRYING):
            return better
        load.tried, load.until, load.before = other, now + _TRIAL_S, load.rates[other].windows
        return other

    def _end(self, load: _Load, is_better: bool, tried: bool, now: float) -> None:
        longer = min(2 * load.pause_s[tried], _LONGEST_PAUSE_S)
        load.pause_s[tried] = _FIRST_PAUSE_S[tried] if is_better else longer
        load.next_at[tried] = now + load.pause_s[tried]
        load.tried = None

    def _begin(self, at: float) -> None:
        self._began, self._tokens, self._session_s = at, 0, 0.0

    def _at(self, sessions: int) -> _Load:
        return self._loads.setdefault(round(math.log2(max(sessions, 1))), _Load())
