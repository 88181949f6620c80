"""Several generators read as one: order, errors, and what is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from deployments.merging import merged


class Sources:
    """Generators that give what they are told to, and whether they were closed."""

    def __init__(self) -> None:
        self.num_open = 0
        self.given = 0

    async def give(self, *turns: int | Exception | asyncio.Event) -> AsyncGenerator[int, None]:
        self.num_open += 1
        try:
            for turn in turns:
                if isinstance(turn, Exception):
                    raise turn
                if isinstance(turn, asyncio.Event):
                    await turn.wait()
                else:
                    self.given += 1
                    yield turn
        finally:
            self.num_open -= 1


async def read(sources: Sequence[AsyncGenerator[int, None]]) -> list[int]:
    async with aclosing(merged(sources)) as values:
        return [value async for value in values]


async def test_each_ones_values_come_in_their_order() -> None:
    sources = Sources()
    found = await read([sources.give(1, 2, 3), sources.give(10, 20), sources.give(), sources.give(100)])
    assert sorted(found) == [1, 2, 3, 10, 20, 100]
    assert [value for value in found if value < 10] == [1, 2, 3]
    assert [value for value in found if 10 <= value < 100] == [10, 20]
    assert not sources.num_open
    assert await read([sources.give(1, 2)]) == [1, 2]


async def test_one_that_waits_holds_up_no_other() -> None:
    sources, forever = Sources(), asyncio.Event()
    async with aclosing(merged([sources.give(forever), sources.give(1, 2, 3)])) as values:
        assert [await anext(values) for _ in range(3)] == [1, 2, 3]
    assert not sources.num_open


@pytest.mark.parametrize("others", [0, 2])
async def test_the_first_error_ends_all(others: int) -> None:
    sources = Sources()
    waiting = [sources.give(asyncio.Event()) for _ in range(others)]
    with pytest.raises(ValueError, match="as asked"):
        await read([sources.give(1, ValueError("as asked")), *waiting])
    assert not sources.num_open


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_closes_all(count: int) -> None:
    sources = Sources()
    async with aclosing(merged([sources.give(1, 2, 3) for _ in range(count)])) as values:
        await anext(values)
        assert sources.num_open == count
    assert not sources.num_open


@pytest.mark.parametrize("count", [1, 2])
async def test_a_source_goes_on_while_its_reader_works_but_is_hardly_ahead(count: int) -> None:
    sources = Sources()
    async with aclosing(merged([sources.give(*range(100)) for _ in range(count)])) as values:
        await anext(values)
        assert sources.given > 1  # before the reader gives up its turn
        for _ in range(20):
            await asyncio.sleep(0)
        assert sources.given <= 2 * count + 1


@pytest.mark.parametrize("count", [1, 2])
async def test_a_reader_that_is_cancelled_closes_all(count: int) -> None:
    sources = Sources()
    reading = read([sources.give(1, asyncio.Event()) for _ in range(count)])
    task = asyncio.create_task(reading)
    for _ in range(20):
        await asyncio.sleep(0)
    assert sources.num_open == count
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not sources.num_open
