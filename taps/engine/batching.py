"""Continuous batching: jobs of many sessions, one worker thread, each step takes whatever waits.

Knows futures and threads; nothing of what a job is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from enum import Enum
from typing import Generic, TypeVar

from taps.engine.lingering import Lingering

Job = TypeVar("Job")
Result = TypeVar("Result")
T = TypeVar("T")

_MOST_FAILURES = 3
# A step is overdue after so many seconds, or so many times what the longest before it took.
_OVERDUE_S, _OVERDUE_TIMES = 60.0, 20.0
_NEWEST = 0.2  # weight of the newest step in what one usually lasts


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
        prepare: Callable[[], None] = lambda: None, session_of: Callable[[Job], object] | None = None,
    ) -> None:  # fmt: skip
        """Args: prepare: called in the worker thread before anything else; session_of: whose a job is, which
        `holding` gave: steps wait for sessions on their way back as far as that pays.
        """
        self._step = step
        self._waiting: list[tuple[Job, asyncio.Future[Result]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=prepare)
        self._runner: asyncio.Task[None] | None = None
        self._news = asyncio.Event()  # of what may let blocked jobs go on
        self._session_of = session_of
        self._lingering = Lingering()
        self._step_s = 0.0  # that a step usually lasts
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
        if self._session_of is not None:
            self._lingering.arrive(id(self._session_of(job)), time.monotonic())
        if self._runner is None or self._runner.done():
            self._news = asyncio.Event()  # of this loop
            self._runner = asyncio.create_task(self._run())
        self._news.set()
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
            self._lingering.forget(id(held))
            await asyncio.shield(self.between_steps(lambda: release(held)))

    def _release_late(self, done: asyncio.Future[T], release: Callable[[T], None]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._thread.submit(release, done.result())

    async def _run(self) -> None:
        while await self._linger() and (jobs := self._take()):
            self._news.clear()
            results = await self._run_step([job for job, _ in jobs])
            now = time.monotonic()
            for (job, done), result in zip(jobs, results, strict=True):
                if done.done() or result is None or result is BLOCKED:
                    continue
                if self._session_of is not None:
                    self._lingering.leave(id(self._session_of(job)), now)
                if isinstance(result, Exception):
                    done.set_exception(result)
                else:
                    done.set_result(result)
            if all(result is BLOCKED for result in results):
                await self._news.wait()
            await asyncio.sleep(0)  # callers with their next job at hand join the very next step

    async def _linger(self) -> bool:
        """Wait for others as far as that pays; False where nobody waits any more."""
        while jobs := self._take():
            wait_s = self._lingering.wait_s(len(jobs), self._step_s, time.monotonic())
            if wait_s <= 0:
                return True
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
        return False

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
            lasted = time.monotonic() - began
            self._longest_step_s = max(self._longest_step_s, lasted)
            self._step_s += _NEWEST * (lasted - self._step_s)
        except StopIteration as error:  # which a future does not take
            raise RuntimeError("a step raised StopIteration") from error
        finally:
            self._step_began = None
        return results

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
