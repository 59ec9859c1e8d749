"""Apps that others would write, each in a process of its own, fed by the same topic.

`python -m benchmarks.rivals do-nothing|naive` reads its task as JSON from the environment variable
RIVAL. Both are stock Faust: its own consumer, agent, acks and commits. Each tells Redis every 20 ms
how far it is in each partition.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import faust
import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import redis
from onnx import TensorProto, helper, numpy_helper

from afterclick.serving.manifest import SCAN_VECTORS_NAME, STEP_NAME, STEP_VECTORS_NAME

TELL_S = 0.02


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a rival is told."""

    broker: str
    topic: str
    redis: str
    folder: str
    release: str
    k: int

    def done_key(self, rival: str) -> str:
        """Where it says how far it is."""
        return f"rival:{rival}:done"


def naive_key(user: str) -> str:
    """Where the naive app keeps a user's list."""
    return f"rival:naive:top:{user}"


def build(rival: str, task: Task) -> faust.App:
    """The rival's app."""
    app = faust.App(
        f"rival-{rival}",
        broker=f"kafka://{task.broker}",
        store="memory://",
        autodiscover=False,
        web_enabled=False,
        datadir=str(Path(task.folder) / rival),
        topic_disable_leader=True,
        topic_allow_declare=False,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        worker_redirect_stdouts=False,
        # Defaults make it wait half a minute to join after the rival before it; no rate changes.
        broker_session_timeout=10,
        broker_heartbeat_interval=2,
        broker_rebalance_timeout=6,
    )
    client = redis.Redis.from_url(task.redis)
    next_offset: dict[int, int] = {}
    if rival == "do-nothing":
        raw = app.topic(
            task.topic, key_type=bytes, value_type=bytes, key_serializer="raw",
            value_serializer="raw",
        )  # fmt: skip

        async def nothing(stream: Any) -> None:
            async for event in stream.events():
                next_offset[event.message.partition] = event.message.offset + 1

        app.agent(raw, name="nothing")(nothing)
    else:
        model = NaiveModel(Path(task.release), task.k)
        clicks = app.topic(
            task.topic, key_type=bytes, key_serializer="raw", value_serializer="json"
        )

        async def recommend(stream: Any) -> None:
            async for event in stream.events():
                click = event.value
                items = model.click(click["user_id"], click["item_id"], click["timestamp_ms"])
                # The synchronous client: 60 µs a SET; awaiting the other costs more than twice.
                client.set(naive_key(click["user_id"]), json.dumps(items))
                next_offset[event.message.partition] = event.message.offset + 1

        app.agent(clicks, name="recommend")(recommend)

    async def tell() -> None:
        told: dict[int, int] = {}
        while True:
            # Only what moved: a partition may be another process's by now.
            moved = {at: offset for at, offset in next_offset.items() if told.get(at) != offset}
            if moved:
                client.hset(task.done_key(rival), mapping=moved)
                told |= moved
            await asyncio.sleep(TELL_S)

    app.task(tell)
    return app


class NaiveModel:
    """State in a dict, one `session.run` (step and scan of one user) a click."""

    def __init__(self, release: Path, k: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            naive_graph(release, k), options, providers=["CPUExecutionProvider"]
        )
        self._vectors = np.load(release / STEP_VECTORS_NAME, allow_pickle=False)
        self._ids = [f"i{row:05d}" for row in range(len(self._vectors))]
        self._row = {item: row for row, item in enumerate(self._ids)}
        units = self._vectors.shape[1]
        self._zero = np.zeros((1, 1, units), np.float32)
        self._states: dict[str, tuple[Any, Any, int]] = {}
        self._lens = np.ones(1, np.int32)

    def click(self, user: str, item: str, ms: int) -> list[str]:
        """The user's list after a click."""
        h, c, last_ms = self._states.get(user, (self._zero, self._zero, ms))
        gap = min(31, (max(0, ms - last_ms) // 1000).bit_length())
        feed = {
            "x": self._vectors[self._row[item]].reshape(1, 1, -1),
            "gap": np.array([[gap]], np.int64),
            "lens": self._lens,
            "h": h,
            "c": c,
        }
        h, c, rows = self._session.run(["h_next", "c_next", "top_rows"], feed)
        self._states[user] = (h, c, max(last_ms, ms))
        return [self._ids[row] for row in rows[0]]


def naive_graph(release: Path, k: int) -> bytes:
    """The release's step, then one product with the whole catalogue and a TopK, as one graph."""
    model = onnx.load(release / STEP_NAME)
    scan_ND = np.load(release / SCAN_VECTORS_NAME, allow_pickle=False)
    vectors_DN = np.ascontiguousarray(scan_ND[:, :-1].T)
    graph = model.graph
    graph.initializer.extend(
        [
            numpy_helper.from_array(vectors_DN, "scan"),
            numpy_helper.from_array(np.ascontiguousarray(scan_ND[:, -1]), "scan_bias"),
            numpy_helper.from_array(np.array([k], np.int64), "k"),
            numpy_helper.from_array(np.array([0], np.int64), "first"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Squeeze", ["h_next", "first"], ["query"]),
            helper.make_node("Gemm", ["query", "scan", "scan_bias"], ["scores"]),
            helper.make_node("TopK", ["scores", "k"], ["top_scores", "top_rows"]),
        ]
    )
    graph.output.append(helper.make_tensor_value_info("top_rows", TensorProto.INT64, ["B", k]))
    return bytes(model.SerializeToString())


def main(rival: str) -> None:
    """Run one rival until it is stopped."""
    task = msgspec.json.decode(os.environ["RIVAL"], type=Task)
    app = build(rival, task)
    faust.Worker(app, loglevel="warning").execute_from_commandline()


if __name__ == "__main__":
    main(sys.argv[1])
