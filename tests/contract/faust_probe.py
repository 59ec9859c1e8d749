"""A plain Faust app that shows what Faust does by itself: `python -m tests.contract.faust_probe`
BROKER GROUP TAKEN DECODED, its last line one JSON object. A process of its own, because Faust takes
loops, signals and warnings for its own.
"""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import faust

COMMIT_WAIT_S = 30.0
BATCH = 5


async def probe(broker: str, group: str, taken: str, decoded: str) -> None:
    """Print what was seen in which order, and what was committed; then end, without Faust's own
    end, which may wait for ever.
    """
    app = faust.App(
        group,
        broker=f"kafka://{broker}",
        store="memory://",
        datadir=str(Path(tempfile.gettempdir()) / "afterclick-faust"),
        autodiscover=False,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        broker_session_timeout=6.0,
        broker_heartbeat_interval=1.0,
        broker_rebalance_timeout=6.0,
        broker_commit_interval=0.2,
        consumer_auto_offset_reset="earliest",
    )
    order: list[str] = []
    processed: list[str] = []

    @app.agent(app.topic(taken, key_type=bytes, value_type=bytes))
    async def take_and_fail(stream: Any) -> None:
        async for batch in stream.take(BATCH, within=1):
            order.append(f"took {len(batch)}")
            raise RuntimeError("a bug in an agent")

    @app.agent(app.topic(decoded, key_type=bytes, value_type=int, value_serializer="json"))
    async def decode(stream: Any) -> None:
        async for value in stream:
            processed.append(repr(value))

    async def assigned(_app: Any, *_args: Any, **_: Any) -> None:
        order.append("on_partitions_assigned")

    app.on_partitions_assigned.connect(assigned, weak=False)
    consumer: Any = app.consumer
    seek_to_committed = consumer.seek_to_committed

    async def seek() -> Any:
        order.append("seek_to_committed")
        return await seek_to_committed()

    committed: dict[str, int] = {}
    commit = consumer._commit

    async def told(offsets: Any) -> Any:
        if done := await commit(offsets):
            committed.update((tp.topic, offset) for tp, offset in offsets.items())
        return done

    consumer.seek_to_committed, consumer._commit = seek, told
    await app.start()
    async with asyncio.timeout(COMMIT_WAIT_S):
        while committed.keys() != {taken, decoded}:  # noqa: ASYNC110 - Faust tells nobody
            await asyncio.sleep(0.1)
    ends = {"taken": committed[taken], "decoded": committed[decoded]}
    sys.stdout.write(json.dumps({"order": order, "processed": processed, "committed": ends}) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(probe(*sys.argv[1:5]))
