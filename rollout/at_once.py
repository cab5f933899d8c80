"""Work on many items at once, but not on all: results as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def at_once(
    items: Iterable[Item], most: int, work: Callable[[Item], Awaitable[Result]]
) -> AsyncIterator[Result]:
    """Yield the results of `work` in the order in which they come.

    Args:
        items: taken one by one, as places become free.
        most: items in work at once.
        work: its first error ends everything and is raised.
    """
    running: set[asyncio.Future] = set()
    try:
        for item in items:
            running.add(asyncio.ensure_future(work(item)))
            if len(running) == most:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
