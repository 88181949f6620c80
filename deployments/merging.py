"""Several asynchronous generators read as one. Knows generators; nothing of what they give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Item(Generic[T]):
    value: T


@dataclass
class _End:
    error: Exception | None = None


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What all of them give, as it comes; each one's in its order.

    A source goes on while the reader works with what it gave, but is hardly ahead. The first error ends all and
    is raised; closing closes all.
    """
    waiting: asyncio.Queue[_Item[T] | _End] = asyncio.Queue(1)
    tasks = [asyncio.create_task(_pump(source, waiting)) for source in sources]
    left = len(sources)
    try:
        while left:
            item = await waiting.get()
            if isinstance(item, _Item):
                yield item.value
            elif item.error is not None:
                raise item.error
            else:
                left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[T, None], waiting: asyncio.Queue[_Item[T] | _End]) -> None:
    end = _End()
    try:
        async with aclosing(source):
            async for value in source:
                await waiting.put(_Item(value))
    except Exception as error:  # the reader's to handle, whatever it is
        end = _End(error)
    await waiting.put(end)
