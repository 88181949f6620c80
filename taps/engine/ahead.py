"""Plain decoding that does not wait for whoever reads it: pass after pass, within a window of tokens.

Knows verdicts and tasks; nothing of what decides them, nor how what costs no round trip to draft is found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Protocol

import torch

from taps.lookup import Lookup
from taps.tree import ProposalTree
from taps.verdict import Verdict


class Guesses(Protocol):
    """Of one session: what its own text says comes next."""

    def tree(self, tokens: Sequence[int], lookup: Lookup) -> ProposalTree:
        """Args: tokens: all that are decided, those of the last call first."""
        ...


class Guesser(Protocol):
    """Of a verifier: whatever gives sessions their guesses."""

    def open(self, is_greedy: bool) -> Guesses: ...


_NO_FEATURES = torch.empty(0, 0)
_PATIENCE, _REST = 4, 4  # looks without use, and passes between two looks from then on


class Looks:
    """When a session looks for guesses: always, but now and then only while no pass has use for them."""

    def __init__(self) -> None:
        self._useless = 0  # looks in a row, ...
        self._passes = 0  # ... and passes since the last of them

    def now(self) -> bool:
        """Whether to look before this pass."""
        self._passes += 1
        return self._useless < _PATIENCE or self._passes >= _REST

    def took(self, has_use: bool) -> None:
        """A pass was given guesses, and checked some or none of them."""
        self._useless = 0 if has_use else self._useless + 1
        self._passes = 0


class RunsAhead:
    """One session's run. What was decided stays here until it is fetched."""

    def __init__(self, decide: Callable[[], Awaitable[Verdict]], is_over: Callable[[], bool]) -> None:
        """Args: decide: one pass; is_over: whether the text needs no more of them."""
        self._decide = decide
        self._is_over = is_over
        self._window = 0
        self._decided: list[Verdict] = []
        self._news = asyncio.Event()  # something is decided, or the task has ended
        self._task: asyncio.Task[None] | None = None

    async def fetch(self, window: int) -> list[Verdict]:
        """What was decided since the last call, one token at least; goes on for up to `window` tokens beyond.

        Passes without drafts are joined. With a window of 0 it stops and gives what is left, perhaps nothing.
        Raises what `decide` raises, once all that was decided before is fetched.
        """
        self._window = window
        if not self._decided:
            self._raise_failure()
            if window:
                self._go_on()
                await self._news.wait()
        if not window and self._task is not None:
            await asyncio.wait({self._task})  # the pass under way
        if not self._decided:
            self._raise_failure()
        fetched, self._decided = self._decided, []
        self._news.clear()
        if window and not self._is_over():
            self._go_on()
        return _joined(fetched)

    async def close(self) -> None:
        """Stop at once; what was not fetched is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _go_on(self) -> None:
        if self._task is None or (self._task.done() and not self._failure()):
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._num_decided < self._window and not (self._decided and self._is_over()):
                verdict = await self._decide()  # what was decided may be fetched meanwhile
                self._decided.append(verdict)
                self._news.set()
        finally:
            self._news.set()

    @property
    def _num_decided(self) -> int:
        return sum(len(verdict.tokens) for verdict in self._decided)

    def _failure(self) -> BaseException | None:
        ended = self._task is not None and self._task.done() and not self._task.cancelled()
        return self._task.exception() if self._task is not None and ended else None

    def _raise_failure(self) -> None:
        """Once: another call tries again."""
        if (failure := self._failure()) is not None:
            self._task = None
            raise failure


def _joined(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Without features; passes without drafts as one verdict, where they follow one another."""
    found: list[Verdict] = []
    for has_drafts, run in groupby(verdicts, lambda verdict: verdict.num_nodes > 0):
        passes = [replace(verdict, features=_NO_FEATURES) for verdict in run]
        if has_drafts:
            found += passes
        else:
            tokens = tuple(token for verdict in passes for token in verdict.tokens)
            logprobs = tuple(one for verdict in passes for one in verdict.logprobs)
            found.append(replace(passes[-1], tokens=tokens, num_passes=len(passes), logprobs=logprobs))
    return found
