"""Whether drafting pays, and how: expected tokens over measured seconds, for all sessions of a router together.

One session that drafts makes every other one's pass longer, and the first of them pays for a draft that the
others share: so it is decided for all of them, who are ranked by what drafting gives them.

Knows sessions by what they gain, and times; nothing of trees, tokens or who drafts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

from taps.adaptive.modes import Modes
from taps.engine.costs import StepCosts
from taps.verdict import PassCost

_REPLAN_S, _REPLAN_PASSES = 0.05, 4.0  # a plan is good for so long at least, and for so many passes
_STICKY = 0.03  # of the tokens per second, that a change must gain
_PROBED = 0.3  # weight of the newest
_SAME = 0.85  # of a gain
# Sessions that ask one drafter share its drafts, and the passes that follow; one that asks another comes in
# between and holds all up: where there are several it must be better by so much.
_TOGETHER = 1.1
_WILDEST, _WILDEST_S = 1.5, 0.0005  # that one step may add to what is usual beside passes
_NEWEST = 0.1  # weight of the newest time in what steps cost beside passes
_FIRST_COUNTS = 2.0  # measurements, that what is thought at first counts for
_TAKES_IN = 1.5  # levels of a draft, that taking in the news costs as much as
_USUAL_DEPTH = 5  # tokens of a path that drafts' times are kept for
_FIRST_DRAFT_S = 0.004
# Of the time, that may go into asking drafters who do not pay; less where several sessions share passes, all of
# which a probe holds up, and drafting has less to win.
_PROBES = 0.005
_FIRST_NODES = 6.0
_LOOKS_GIVE = 1.05  # of plain decoding's tokens a second, that it is thought to give with the verifier's drafts
_MOST_TOLD = 4  # passes of plain decoding that were told together, that are learned from
_FIRST_PROBE_S = 0.02


class Choice(NamedTuple):
    """What a session may do in a step."""

    drafters: tuple[str, ...]  # none: nobody is waited for
    depth: int  # tokens of a path
    gain: float  # tokens expected beyond one
    is_plain: bool = False  # the verifier goes on by itself, also where nodes are at hand


class _Best(NamedTuple):
    """What would give a session the most, and what it was found by."""

    choice: Choice
    # Gains' version, the free gain, when, and of which drafters.
    found_by: tuple[int, float, float, tuple[str, ...]] = (-1, 0.0, 0.0, ())


class Drafted(NamedTuple):
    """What came of a tree."""

    kept: int  # nodes that were checked
    share: float  # of what the whole tree was thought to gain, that these were


class ByLoad:
    """Something measured at every load: by the number of sessions, to powers of two."""

    def __init__(self, first: float) -> None:
        """Args: first: what it is thought to be where it was not measured."""
        self._first = first
        self._known: dict[int, tuple[float, int]] = {}  # value, measurements

    def observe(self, sessions: int, value: float) -> None:
        known, times = self._known.get(_bucket(sessions), (self._first, 0))
        weight = max(1.0 / (1.0 + _FIRST_COUNTS + times), _NEWEST)
        self._known[_bucket(sessions)] = known + weight * (value - known), times + 1

    def at(self, sessions: int) -> float:
        return self._known.get(_bucket(sessions), (self._first, 0))[0]


def _bucket(sessions: int) -> int:
    return max(sessions, 1).bit_length()


class Planner:
    """What is known of costs, and who drafts now. One for all sessions of a router."""

    def __init__(self, passes: StepCosts | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: passes: seconds of a pass by its rows, as far as known."""
        self._clock = clock
        self.passes = passes or StepCosts()
        # Seconds of a drafter's drafts by their depth and sessions asking.
        self._drafts: dict[str, dict[int, StepCosts]] = {}
        self._asking: dict[str, int] = {}  # sessions that wait for a drafter
        self._together: dict[str, int] = {}  # that a draft is for: as many as ever waited with those who do now
        self._draft_ended = -math.inf
        self._plain, self._drafted = ByLoad(0.0005), ByLoad(0.002)
        self._slowed = ByLoad(1.0)  # how much longer passes last beside drafts
        self._best: dict[Hashable, _Best] = {}  # of the sessions that are open
        self._cycles: dict[tuple[tuple[str, ...], int, int, int], float] = {}  # seconds
        self._drafting: set[Hashable] = set()
        self._nodes = ByLoad(_FIRST_NODES)  # that are kept of a session's tree
        # Of plain decoding, a pass: nodes that the verifier drafts itself, and tokens beyond one.
        self._looked_up, self._found = ByLoad(0.0), ByLoad(0.0)
        self._realised = ByLoad(1.0)  # of what whole trees would gain, since they are cut
        first = StepCosts(self.passes.table())
        # Whether sessions draft, and whether the verifier drafts where they do not.
        self.modes, self._looking = (
            Modes(lambda sessions: sessions / first.seconds(sessions), clock) for _ in range(2)
        )
        self._seen: PassCost | None = None  # the newest pass
        self._threshold = 0.0  # tokens that a session must gain to draft
        self._planned_at, self._good_for_s = -math.inf, _REPLAN_S
        self._next_probe = 0.0
        self._probe_s = _FIRST_PROBE_S

    def open(self, session: Hashable) -> None:
        self._best[session] = _Best(Choice((), 0, 0.0))
        self._changed()

    def close(self, session: Hashable) -> None:
        self._best.pop(session, None)
        self._drafting.discard(session)
        self._changed()

    def meet(self, drafter: str, seconds: Mapping[int, float]) -> None:
        """A drafter says what its usual drafts take by sessions; what was measured since counts for more."""
        if drafter not in self._drafts and len(seconds) > 1:
            self._drafts[drafter] = {_USUAL_DEPTH: StepCosts(seconds)}

    def _changed(self) -> None:
        self.modes.has(len(self._best))
        self._looking.has(len(self._best))
        self._planned_at = -math.inf

    @property
    def num_sessions(self) -> int:
        return max(len(self._best), 1)

    def asked(self, drafter: str) -> None:
        """A session asks a drafter, until it is `answered`."""
        self._asking[drafter] = self._asking.get(drafter, 0) + 1
        self._together[drafter] = max(self._asking[drafter], self._together.get(drafter, 0) - 1)

    def answered(
        self, drafter: str, depth: int, seconds: float | None, is_aside: bool = False, ago_s: float = 0.0
    ) -> None:
        """Args: depth: of the paths; seconds: None where nothing is learned of them; is_aside: whether it was
        asked after a while, and had much to take in; ago_s: since it answered.
        """
        together = self._together[drafter]
        self._asking[drafter] -= 1
        if not self._asking[drafter]:
            self._together[drafter] = 0
        self._draft_ended = max(self._draft_ended, self._clock() - ago_s)
        if seconds is not None and not is_aside:
            self._costs_of(drafter, depth).observe(together, seconds)
        elif seconds is not None:
            self._probe_s += _PROBED * (seconds - self._probe_s)

    def observe_pass(self, cost: PassCost | None) -> bool:
        """Returns whether that is news: every session of a pass tells of it."""
        if cost is None or cost == self._seen:
            return False
        self._seen, seconds = cost, cost.ms / 1e3
        if not any(self._asking.values()) and self._clock() - self._draft_ended >= seconds:
            self.passes.observe(cost.rows, seconds)
        elif self._drafting:
            self._slowed.observe(self.num_sessions, seconds / self.passes.seconds(cost.rows))
        return True

    def observe_step(
        self, cost: PassCost | None, waited_s: float, drafted: Drafted | None, tokens: int = 1
    ) -> None:
        """Args: waited_s: for one pass; drafted: what it was for, where it was for a tree."""
        is_news = self.observe_pass(cost)
        self.modes.count(tokens)
        if not self._drafting:
            self._looking.count(tokens)
        if cost is None or not (is_news or drafted):
            return
        sessions = self.num_sessions
        # Most steps: a few wait for prompts of others, in whichever mode.
        beside = self._plain if drafted is None else self._drafted
        most_s = _WILDEST * beside.at(sessions) + _WILDEST_S
        if drafted is not None or not self._drafting:
            beside.observe(sessions, min(max(waited_s - cost.ms / 1e3, 0.0), most_s))
        if drafted is not None:
            self._nodes.observe(sessions, drafted.kept)
            self._realised.observe(sessions, drafted.share)

    def observe_plain(self, passes: int, nodes: int, tokens: int) -> None:
        """Passes of plain decoding: the nodes that the verifier drafted itself, and what they decided."""
        for _ in range(min(passes, _MOST_TOLD)):
            self._looked_up.observe(self.num_sessions, nodes / passes)
            self._found.observe(self.num_sessions, tokens / passes - 1.0)

    def choose(
        self,
        session: Hashable,
        gains: Mapping[str, Callable[[int], float]],
        free_gain: float,
        version: int = 0,
    ) -> Choice:
        """What the session should do now.

        Args: gains: of each drafter that may be asked, the tokens it adds by the depth of its paths; free_gain:
        of the nodes that are there without asking; version: of the gains, another one where they changed.
        """
        known, found_by = self._best.get(session), (version, free_gain, self._planned_at, tuple(gains))
        wanted = known is not None and known.choice.gain > 0.0
        if known is None or known.found_by != found_by:
            before = () if known is None else known.choice.drafters
            self._best[session] = known = _Best(self._best_of(gains, free_gain, before), found_by)
        best, now = known.choice, self._clock()
        if (best.gain > 0.0) != wanted or now > self._planned_at + self._good_for_s:
            self._plan(now)
        # Who drafts goes on where its gain has changed a little: switching costs passes.
        needed = (_SAME if session in self._drafting else 1.0) * self._threshold
        drafts = best.gain > 0.0 and best.gain >= needed
        (self._drafting.add if drafts else self._drafting.discard)(session)
        return best if drafts else Choice((), 0, free_gain, True)

    def looks(self) -> bool:
        """Whether the verifier should draft for sessions that decode plainly. It checks what pays in its
        passes, but does not see what else these cost on a busy machine.
        """
        return self._looking.is_on(_LOOKS_GIVE)

    def explain(self, choice: Choice) -> dict[str, float]:
        """What is thought of the load: milliseconds from verdict to verdict, plain and where all draft."""
        sessions, drafting = self.num_sessions, len(self._drafting)
        drafters = choice.drafters or tuple(self._drafts)[:1]
        drafted = self._drafted_cycle(drafters, choice.depth or _USUAL_DEPTH, max(drafting, 1), sessions)
        return {
            "sessions": sessions,
            "drafting": drafting,
            "plain_ms": round(1e3 * self._plain_cycle(sessions), 2),
            "drafted_ms": round(1e3 * drafted, 2),
            "nodes": round(self._nodes.at(sessions), 2),
            "share": round(self._realised.at(sessions), 3),
            "must_gain": round(min(self._threshold, 99.0), 3),
        }

    def may_probe(self) -> bool:
        """Whether there is time to ask a drafter who does not pay. It is, where this says so."""
        now = self._clock()
        if now < self._next_probe:
            return False
        self._next_probe = now + self._probe_s * _bucket(self.num_sessions) / _PROBES
        return True

    def draft_s(self, drafters: tuple[str, ...], depth: int, sessions: int) -> float:
        """Seconds until these have answered so many sessions, on cores that they may share."""
        return sum(self._seconds_of(name, depth, sessions) for name in drafters)

    def _costs_of(self, drafter: str, depth: int) -> StepCosts:
        """Of drafts of that depth, which are thought to last what others say until there was one."""
        known = self._drafts.setdefault(drafter, {})
        if depth not in known:
            guess = {n: self._seconds_of(drafter, depth, n) for n in (1, 2, 4, 8, 16)}
            known[depth] = StepCosts(guess, is_guess=True)
        return known[depth]

    def _seconds_of(self, drafter: str, depth: int, sessions: int) -> float:
        known = self._drafts.get(drafter, {})
        if not known:
            return _FIRST_DRAFT_S * _scale(depth) * (0.8 + 0.2 * sessions)
        nearest = min(known, key=lambda other: (abs(other - depth), other))
        return known[nearest].seconds(sessions) * _scale(depth) / _scale(nearest)

    def _best_of(
        self, gains: Mapping[str, Callable[[int], float]], free_gain: float, before: tuple[str, ...]
    ) -> Choice:
        """The drafter and depth that give one session the most, were all sessions to draft as it does.

        Args: before: who was best until now.
        """
        sessions, realised = max(len(self._drafting), 1), self._realised.at(self.num_sessions)
        best = Choice((), 0, free_gain)
        reached = (1.0 + free_gain) / self._drafted_cycle((), 0, sessions, sessions) if free_gain else 0.0
        for name, gain_of in gains.items():
            for depth in range(2, _USUAL_DEPTH + 2):
                gain = max(realised * gain_of(depth), free_gain)
                rate = (1.0 + gain) / self._drafted_cycle((name,), depth, sessions, sessions)
                if (name,) == before and self.num_sessions > 1:
                    rate *= _TOGETHER
                if rate > reached:
                    best, reached = Choice((name,), depth, gain), rate
        return best

    def _plain_cycle(self, sessions: int) -> float:
        # A plain step does nothing that another one does not do too.
        beside = min(self._plain.at(sessions), self._drafted.at(sessions))
        return self.passes.seconds(sessions * (1.0 + self._looked_up.at(sessions))) + beside

    def _drafted_cycle(self, drafters: tuple[str, ...], depth: int, drafting: int, sessions: int) -> float:
        key = drafters, depth, drafting, sessions
        if key not in self._cycles:
            rows = sessions + self._nodes.at(sessions) * drafting
            passing = self.passes.seconds(rows) * self._slowed.at(sessions) + self._drafted.at(sessions)
            self._cycles[key] = self.draft_s(drafters, depth, drafting) + passing
        return self._cycles[key]

    def _plan(self, now: float) -> None:
        """How many sessions should draft: those that gain most, as many as give the most tokens a second."""
        self._planned_at = now
        self._cycles.clear()
        sessions = self.num_sessions
        plain_s = self._plain_cycle(sessions)
        plain = sessions * (1.0 + self._found.at(sessions)) / plain_s
        self._good_for_s = max(_REPLAN_S, _REPLAN_PASSES * plain_s) if self.passes.is_known else _REPLAN_S
        choices = (best.choice for best in self._best.values() if best.choice.gain > 0.0)
        ranked = sorted(choices, key=lambda choice: -choice.gain)
        tokens, depth, threshold, drafted, number = float(sessions), 0, math.inf, 0.0, 0
        drafters: tuple[str, ...] = ()
        for place, choice in enumerate(ranked, 1):
            others, tokens, depth = tokens, tokens + choice.gain, max(depth, choice.depth)
            drafters = choice.drafters or drafters
            cycle = self._drafted_cycle(drafters, depth, place, sessions)
            if tokens / cycle > drafted:
                # What the last of them must gain for that: less, and they would be better off without it.
                threshold = min(max(plain, drafted) * cycle - others, choice.gain)
                drafted, number = tokens / cycle, place
        if 0 < number < len(ranked):
            threshold = max(threshold, (ranked[number - 1].gain + ranked[number].gain) / 2)
        self._threshold = threshold if self.modes.is_on(drafted / plain) else math.inf


def _scale(depth: int) -> float:
    """How long a draft with paths of so many tokens takes, of one of the usual depth."""
    return (_TAKES_IN + depth) / (_TAKES_IN + _USUAL_DEPTH)
