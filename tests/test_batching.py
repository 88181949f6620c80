"""Continuous batching: every caller gets its own job's result, whatever befalls the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from taps.engine.batching import Batcher
from tests.fakes import turns

Outcome = str | Exception | None


@contextmanager
def batching(step: Callable[[Sequence[int]], Sequence[Outcome]]) -> Iterator[Batcher[int, str]]:
    batcher: Batcher[int, str] = Batcher(step, "test")
    try:
        yield batcher
    finally:
        batcher.close()


class GatedStep:
    """A step that the test holds in the worker thread until it is let go."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self._started: asyncio.Queue[None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._go = threading.Semaphore(0)

    def __call__(self, jobs: Sequence[int]) -> list[Outcome]:
        self.seen.append(list(jobs))
        self._loop.call_soon_threadsafe(self._started.put_nowait, None)
        assert self._go.acquire(timeout=10)
        return [str(job) for job in jobs]

    async def started(self) -> None:
        await self._started.get()

    def let_go(self) -> None:
        self._go.release()


async def test_every_caller_gets_its_own_result() -> None:
    with batching(lambda jobs: [str(job) for job in jobs]) as batcher:
        assert await asyncio.gather(*map(batcher.submit, range(20))) == [str(job) for job in range(20)]


async def test_callers_that_submit_again_at_once_share_every_step() -> None:
    """Two groups that come at different times must not take turns for ever, each at half the batch."""
    step = GatedStep()

    async def caller(name: int) -> None:
        for _ in range(3):
            await batcher.submit(name)

    with batching(step) as batcher:
        early = asyncio.create_task(caller(1))
        await step.started()
        late = asyncio.create_task(caller(2))
        await turns(1)
        for _ in range(4):
            step.let_go()
        await asyncio.gather(early, late)
    assert step.seen == [[1], [2, 1], [2, 1], [2]]


async def test_jobs_that_come_during_a_step_share_the_next_one() -> None:
    step = GatedStep()
    with batching(step) as batcher:
        first = asyncio.create_task(batcher.submit(1))
        await step.started()
        others = [asyncio.create_task(batcher.submit(job)) for job in (2, 3)]
        await turns(1)
        step.let_go()
        step.let_go()
        assert await asyncio.gather(first, *others) == ["1", "2", "3"]
    assert step.seen == [[1], [2, 3]]


async def test_none_keeps_a_job_waiting_while_others_come_and_go() -> None:
    needed = {1: 3, 2: 1}

    def step(jobs: Sequence[int]) -> list[Outcome]:
        for job in jobs:
            needed[job] -= 1
        return [None if needed[job] else f"{job} done" for job in jobs]

    with batching(step) as batcher:
        assert await asyncio.gather(*map(batcher.submit, (1, 2))) == ["1 done", "2 done"]
    assert needed == {1: 0, 2: 0}, "a job that is done is not stepped again"


async def test_an_exception_fails_its_own_job_alone() -> None:
    def step(jobs: Sequence[int]) -> list[Outcome]:
        return [ValueError("too long") if job == 2 else str(job) for job in jobs]

    with batching(step) as batcher:
        results = await asyncio.gather(*map(batcher.submit, (1, 2, 3)), return_exceptions=True)
    assert results[::2] == ["1", "3"]
    assert isinstance(results[1], ValueError)


def unlucky(jobs: Sequence[int]) -> list[Outcome]:
    """A step that a job 13 breaks."""
    if 13 in jobs:
        raise RuntimeError("the model broke")
    return [str(job) for job in jobs]


async def test_a_step_that_raises_fails_its_jobs_but_not_those_after() -> None:
    with batching(unlucky) as batcher:
        results = await asyncio.gather(*map(batcher.submit, (12, 13)), return_exceptions=True)
        assert [str(result) for result in results] == ["the model broke"] * 2
        assert await batcher.submit(14) == "14"


async def test_a_batcher_whose_steps_all_raise_says_so() -> None:
    with batching(unlucky) as batcher:
        for job in (13, 13, 14, 13, 13):
            await asyncio.gather(batcher.submit(job), return_exceptions=True)
            batcher.check()
        await asyncio.gather(batcher.submit(13), return_exceptions=True)
        with pytest.raises(RuntimeError, match="the last 3 steps failed"):
            batcher.check()


@pytest.mark.parametrize("given", [[], ["1"], ["1", "2", "3"]])
async def test_a_step_with_too_few_or_too_many_results_fails_its_jobs_instead_of_hanging(
    given: list[Outcome],
) -> None:
    with batching(lambda jobs: given if len(jobs) == 2 else ["alone"]) as batcher:
        async with asyncio.timeout(10):
            results = await asyncio.gather(*map(batcher.submit, (1, 2)), return_exceptions=True)
        assert [str(result) for result in results] == [f"a step of 2 jobs gave {len(given)} results"] * 2
        assert await batcher.submit(3) == "alone"


async def test_a_step_that_raises_stop_iteration_fails_its_jobs_instead_of_hanging() -> None:
    with batching(lambda jobs: next(iter(()))) as batcher:
        async with asyncio.timeout(10):
            with pytest.raises(RuntimeError, match="StopIteration"):
                await batcher.submit(1)


async def test_a_step_that_runs_far_longer_than_any_before_is_not_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    monkeypatch.setattr("taps.engine.batching.time.monotonic", lambda: clock)
    step = GatedStep()
    with batching(step) as batcher:
        job = asyncio.create_task(batcher.submit(1))
        await step.started()
        clock = 5.0
        step.let_go()
        await job
        batcher.check()
        job = asyncio.create_task(batcher.submit(2))
        await step.started()
        clock += 99.0
        batcher.check()
        clock += 2.0
        with pytest.raises(RuntimeError, match=r"runs for 101 s, the longest before took 5\.00 s"):
            batcher.check()
        step.let_go()
        await job
        batcher.check()


async def test_a_first_step_may_take_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("taps.engine.batching.time.monotonic", lambda: clock)
    step = GatedStep()
    with batching(step) as batcher:
        job = asyncio.create_task(batcher.submit(1))
        await step.started()
        clock = 59.0
        batcher.check()
        clock = 61.0
        with pytest.raises(RuntimeError, match="a step runs for 61 s"):
            batcher.check()
        step.let_go()
        await job


async def test_a_cancelled_job_is_never_stepped() -> None:
    step = GatedStep()
    with batching(step) as batcher:
        first = asyncio.create_task(batcher.submit(1))
        await step.started()
        cancelled, kept = (asyncio.create_task(batcher.submit(job)) for job in (2, 3))
        await turns(1)
        cancelled.cancel()
        step.let_go()
        step.let_go()
        assert [await first, await kept] == ["1", "3"]
        assert cancelled.cancelled()
    assert step.seen == [[1], [3]]


async def test_cancelling_a_job_during_its_step_does_not_disturb_the_others() -> None:
    step = GatedStep()
    with batching(step) as batcher:
        both = [asyncio.create_task(batcher.submit(job)) for job in (1, 2)]
        await step.started()
        both[0].cancel()
        step.let_go()
        assert await both[1] == "2"
    assert step.seen == [[1, 2]]


async def test_actions_run_in_the_worker_thread_between_steps() -> None:
    order: list[str] = []
    step = GatedStep()
    with batching(step) as batcher:
        job = asyncio.create_task(batcher.submit(1))
        await step.started()
        action = asyncio.create_task(
            batcher.between_steps(lambda: order.append(threading.current_thread().name))
        )
        await turns(2)
        assert order == [], "the step still holds the thread"
        step.let_go()
        await asyncio.gather(job, action)
    assert order[0].startswith("test")


async def test_jobs_of_a_closed_batcher_fail_instead_of_hanging() -> None:
    with batching(lambda jobs: [str(job) for job in jobs]) as batcher:
        pass
    with pytest.raises(RuntimeError):
        await batcher.submit(1)


class WaitForTwo:
    """Says to wait as long as one session is there alone, and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Hashable]] = []

    def arrive(self, session: Hashable, now: float) -> None:
        self.told.append(("arrive", session))

    def leave(self, session: Hashable, now: float) -> None:
        self.told.append(("leave", session))

    def forget(self, session: Hashable) -> None:
        self.told.append(("forget", session))

    def wait_s(self, num_waiting: int, step_s: float, now: float) -> float:
        return 3600.0 if num_waiting < 2 else 0.0


async def test_a_step_waits_as_long_as_it_is_told_to_and_no_longer_than_for_who_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, lingering = GatedStep(), WaitForTwo()
    batcher: Batcher[int, str] = Batcher(step, "test", session_of=lambda job: job)
    monkeypatch.setattr(batcher, "_lingering", lingering)
    async with asyncio.timeout(10):
        first = asyncio.create_task(batcher.submit(1))
        await turns(20)
        assert not step.seen
        second = asyncio.create_task(batcher.submit(2))
        await step.started()
        step.let_go()
        assert (await first, await second) == ("1", "2")
        async with batcher.holding(lambda: 3, lambda _: None):
            pass
    assert step.seen == [[1, 2]]
    assert lingering.told[:4] == [(what, id(n)) for what in ("arrive", "leave") for n in (1, 2)]
    assert lingering.told[4:] == [("forget", id(3))]
    batcher.close()
