"""Continuous batching: jobs of many sessions, one worker thread, each step takes whatever waits.

Knows futures and threads; nothing of what a job is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from enum import Enum
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
T = TypeVar("T")

_MOST_FAILURES = 3
# A step is overdue after so many seconds, or so many times what the longest before it took.
_OVERDUE_S, _OVERDUE_TIMES = 60.0, 20.0


class Blocked(Enum):
    """A job that no further step helps before another one comes or a session ends."""

    BLOCKED = 0


BLOCKED = Blocked.BLOCKED


class Batcher(Generic[Job, Result]):
    """Runs `step` on all waiting jobs, over and over, in a thread of its own.

    `step` returns one entry per job: its result, None to keep it waiting for a further step (a prompt
    prefilled in chunks), `BLOCKED` to keep it waiting for others, or an exception, which fails that job alone.
    The queue is bounded by the callers:
    a session waits for its job before it submits the next.
    """

    def __init__(
        self, step: Callable[[Sequence[Job]], Sequence[Result | Exception | Blocked | None]], name: str,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Args: prepare: called in the worker thread before anything else."""
        self._step = step
        self._waiting: list[tuple[Job, asyncio.Future[Result]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=prepare)
        self._runner: asyncio.Task[None] | None = None
        self._news = asyncio.Event()  # of what may let blocked jobs go on
        self._failed_in_a_row = 0
        self._step_began: float | None = None  # while one runs
        self._longest_step_s = 0.0

    def check(self) -> None:
        """Raise RuntimeError once several steps in a row have raised, or while one is overdue.

        A lost device does not come back; a step that takes far longer than any before will not end.
        """
        if self._failed_in_a_row >= _MOST_FAILURES:
            raise RuntimeError(f"the last {self._failed_in_a_row} steps failed")
        began = self._step_began
        runs_for_s = 0.0 if began is None else time.monotonic() - began
        if runs_for_s > max(_OVERDUE_S, _OVERDUE_TIMES * self._longest_step_s):
            raise RuntimeError(
                f"a step runs for {runs_for_s:.0f} s, the longest before took {self._longest_step_s:.2f} s"
            )

    async def submit(self, job: Job) -> Result:
        """The job's result. Cancelling the caller takes the job out before the next step."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, done))
        self._news.set()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await done

    async def between_steps(self, action: Callable[[], T]) -> T:
        """Run `action` in the worker thread, never during a step: for opening and freeing sessions."""
        try:
            return await self._in_thread(action)
        finally:
            self._news.set()

    async def _in_thread(self, action: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)

    @asynccontextmanager
    async def holding(self, acquire: Callable[[], T], release: Callable[[T], None]) -> AsyncIterator[T]:
        """What `acquire` gives, released when the block ends, also when the caller is cancelled meanwhile."""
        opening = asyncio.ensure_future(self.between_steps(acquire))
        try:
            held = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(lambda done: self._release_late(done, release))
            raise
        try:
            yield held
        finally:
            await asyncio.shield(self.between_steps(lambda: release(held)))

    def _release_late(self, done: asyncio.Future[T], release: Callable[[T], None]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._thread.submit(release, done.result())

    async def _run(self) -> None:
        while jobs := self._take():
            self._news.clear()
            results = await self._run_step([job for job, _ in jobs])
            for (_, done), result in zip(jobs, results, strict=True):
                if done.done() or result is None or result is BLOCKED:
                    continue
                if isinstance(result, Exception):
                    done.set_exception(result)
                else:
                    done.set_result(result)
            if all(result is BLOCKED for result in results):
                await self._news.wait()
            await asyncio.sleep(0)  # callers with their next job at hand join the very next step

    def _take(self) -> list[tuple[Job, asyncio.Future[Result]]]:
        self._waiting = [(job, done) for job, done in self._waiting if not done.done()]
        return list(self._waiting)

    async def _run_step(self, jobs: list[Job]) -> Sequence[Result | Exception | Blocked | None]:
        """A step that raises fails its jobs, not the batcher: the callers decide what to do."""
        try:
            results = await self._in_thread(lambda: self._timed(jobs))
            if len(results) != len(jobs):
                raise RuntimeError(f"a step of {len(jobs)} jobs gave {len(results)} results")
        except Exception as error:  # whatever a model raises must reach the waiting sessions
            self._failed_in_a_row += 1
            return [error] * len(jobs)
        self._failed_in_a_row = 0
        return results

    def _timed(self, jobs: Sequence[Job]) -> Sequence[Result | Exception | Blocked | None]:
        """A step in the worker thread; what it takes is what later ones are judged by."""
        self._step_began = began = time.monotonic()
        try:
            results = self._step(jobs)
            self._longest_step_s = max(self._longest_step_s, time.monotonic() - began)
        except StopIteration as error:  # which a future does not take
            raise RuntimeError("a step raised StopIteration") from error
        finally:
            self._step_began = None
        return results

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
