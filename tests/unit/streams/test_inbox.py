"""What waits for a partition's task, and how that wait ends."""

import asyncio

import pytest

from afterclick.streams.assignment import Inbox
from afterclick.streams.record import Chunk


@pytest.mark.parametrize("ticks", range(6))
def test_a_task_that_is_stopped_as_a_chunk_comes_stops(ticks: int) -> None:
    """Whatever turn of the loop the two fall into: a stop that is lost holds up the whole group, as
    the partition is given back only when its task has ended.
    """

    async def run() -> None:
        inbox = Inbox()
        waiting = asyncio.create_task(inbox.wait(60.0))
        for _ in range(4):
            await asyncio.sleep(0)
        inbox.put(Chunk(0, 1, []))
        for _ in range(ticks):
            await asyncio.sleep(0)
        if waiting.done():
            return
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


def test_a_wait_ends_with_a_chunk_or_its_time() -> None:
    """The task then looks at its head in Redis."""

    async def run() -> tuple[bool, bool]:
        inbox = Inbox()
        nothing = await inbox.wait(0.01)
        asyncio.get_running_loop().call_later(0.01, inbox.put, Chunk(0, 1, []))
        return nothing, await inbox.wait(60.0)

    assert asyncio.run(run()) == (False, True)
