"""Chunks share it, a change of what they are folded with takes it alone.

Knows nothing of chunks or releases: a reader-writer lock for one event loop, where a waiting writer
holds new
readers back, so that it waits for the chunks in hand and no longer.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Reader-writer lock; not re-entrant."""

    def __init__(self) -> None:
        self._condition = asyncio.Condition()
        self._inside = 0
        self._closed = False

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Fold a chunk with what is in force now."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            async with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Change what is in force, while no chunk is being folded."""
        async with self._condition:
            await self._condition.wait_for(lambda: not self._closed)
            self._closed = True
            try:
                await self._condition.wait_for(lambda: self._inside == 0)
            except BaseException:
                self._closed = False
                self._condition.notify_all()
                raise
        try:
            yield
        finally:
            async with self._condition:
                self._closed = False
                self._condition.notify_all()
