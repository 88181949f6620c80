"""Plain decoding that does not wait for whoever reads it: token after token, within a window.

Knows verdicts and tasks; nothing of what decides them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import torch

from taps.verdict import Verdict


class RunsAhead:
    """One session's run. What was decided stays here until it is fetched."""

    def __init__(self, decide: Callable[[], Awaitable[Verdict]], is_over: Callable[[], bool]) -> None:
        """Args: decide: one pass, which decides one token; is_over: whether the text needs no more of them."""
        self._decide = decide
        self._is_over = is_over
        self._window = 0
        self._decided: list[Verdict] = []
        self._news = asyncio.Event()  # something is decided, or the task has ended
        self._task: asyncio.Task[None] | None = None

    async def fetch(self, window: int) -> Verdict:
        """What was decided since the last call, one token at least; goes on for up to `window` tokens beyond.

        With a window of 0 it stops and gives what is left, perhaps nothing. Raises what `decide` raises, once
        all that was decided before is fetched.
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
        return joined(fetched)

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
            while len(self._decided) < self._window and not (self._decided and self._is_over()):
                verdict = await self._decide()  # what was decided may be fetched meanwhile
                self._decided.append(verdict)
                self._news.set()
        finally:
            self._news.set()

    def _failure(self) -> BaseException | None:
        ended = self._task is not None and self._task.done() and not self._task.cancelled()
        return self._task.exception() if self._task is not None and ended else None

    def _raise_failure(self) -> None:
        """Once: another call tries again."""
        if (failure := self._failure()) is not None:
            self._task = None
            raise failure


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Several passes without drafts as one verdict, without features."""
    return Verdict(
        tuple(token for verdict in verdicts for token in verdict.tokens),
        (),
        torch.empty(0, 0),
        0,
        0,
        verdicts[-1].batch_size if verdicts else 1,
        cost=verdicts[-1].cost if verdicts else None,
        num_passes=len(verdicts),
    )
