"""Topics, a namespace and a releases folder on the run's servers, and what tests do with them."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
from kafka import KafkaProducer

from afterclick.serving.keys import Keys, Layout
from afterclick.serving.manifest import Publication
from afterclick.serving.reader import TopK
from afterclick.serving.records import Head
from afterclick.serving.releases import ReleaseStore
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.serving.store import Store
from afterclick.streams.admin import check_topics, client_config
from afterclick.streams.events import Click, Item, encode
from afterclick.streams.local import Worker, local_worker
from afterclick.streams.log import LogReader
from afterclick.streams.namespace import open_store
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import LogEdges
from afterclick.streams.replica import Replica
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.verify import Report, verify
from tests.tiny_release import write_tiny_release

WAIT_S = 60.0
"""Longest wait for something that takes a second or two: two cores may be busy."""


class Stage:
    """Everything one service test needs; closed by its fixture."""

    def __init__(
        self,
        streams: StreamsSettings,
        redis_url: str,
        namespace: str,
        folder: Path,
        layout: Layout = "single",
    ) -> None:
        self.streams = msgspec.structs.replace(
            streams, session_timeout_s=6.0, rebalance_timeout_s=6.0
        )
        self.serving = ServingSettings(
            redis=redis_url,
            layout=layout,
            namespace=namespace,
            releases=str(folder / "releases"),
            provider="cpu",
            threads=1,
            fallback_every_s=0.5,
            release_poll_s=0.3,
        )
        self.folder = folder
        self.keys = Keys(namespace, layout=layout)
        self.releases = ReleaseStore(self.serving.releases)
        self._producer = KafkaProducer(**client_config(streams), acks="all")
        self._reader = LogReader(self.streams)
        self._stores: list[Store] = []

    @property
    def env(self) -> dict[str, str]:
        """The settings as a worker's environment."""
        return environment("SERVING", self.serving) | environment("STREAMS", self.streams)

    @contextlib.contextmanager
    def worker(self, **settings: str) -> Iterator[Worker]:
        """A running `afterclick worker`."""
        with local_worker({**self.env, **settings}, self.folder) as worker:
            yield worker

    def store(self) -> Store:
        """A connection to what the workers write."""
        return open_store(self.serving, check_topics(self.streams))

    def publish(
        self,
        release: str,
        *,
        seed: int,
        num_items: int = 300,
        encoder: bool = False,
        blend: bool = False,
        state_dtype: Literal["fp32", "fp16"] = "fp32",
    ) -> Publication:
        """A tiny release, put in force."""
        folder = self.releases.staging(release)
        write_tiny_release(
            folder,
            num_items=num_items,
            seed=seed,
            encoder=encoder,
            blend=blend,
            state_dtype=state_dtype,
        )
        self.releases.add(folder)
        return self.releases.publish(release)

    def reconnect(self) -> None:
        """Learn of new partitions now; clients ask again after `metadata.max.age.ms` only."""
        self._producer.close()
        self._reader.close()
        self._producer = KafkaProducer(**client_config(self.streams), acks="all")
        self._reader = LogReader(self.streams)

    def send(self, events: Iterable[Click | Item]) -> None:
        """Produce events and wait until the broker has them."""
        for event in events:
            key, value = encode(event)
            topic = self.streams.clicks_topic
            if isinstance(event, Item):
                topic = self.streams.items_topic
            self._producer.send(topic, key=key, value=value)
        self._producer.flush(timeout=30)

    def send_raw(self, key: bytes | None, value: bytes | None, partition: int = 0) -> None:
        """Produce any bytes to the clicks topic."""
        producer = KafkaProducer(
            **client_config(self.streams), acks="all", max_request_size=32 << 20
        )
        producer.send(self.streams.clicks_topic, key=key, value=value, partition=partition).get(
            timeout=30
        )
        producer.close()

    def ends(self) -> dict[int, int]:
        """End of the log of each partition."""
        topic = self.streams.clicks_topic
        num = self._reader.num_partitions(topic)
        return {partition: self._reader.edges(topic, partition)[1] for partition in range(num)}

    def heads(self) -> dict[int, int]:
        """How far each partition is folded."""
        store = self.store()
        found = {p: store.read(p, []).head for p in self.ends()}
        store.close()
        return {p: msgspec.json.decode(h, type=Head).next if h else 0 for p, h in found.items()}

    def head_reader(self) -> Callable[[int], int]:
        """How far one partition is folded, asked over one connection; it ends with the stage."""
        store = self.store()
        self._stores.append(store)

        def head(partition: int) -> int:
            data = store.read(partition, []).head
            return msgspec.json.decode(data, type=Head).next if data else 0

        return head

    def wait_folded(self) -> None:
        """Return once every partition's head stands at the end of its log."""
        self.wait(lambda: self.heads() == self.ends(), "the heads reach the ends of the log")

    def wait(self, done: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        """Poll until something is so."""
        until_s = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < until_s, f"waited {timeout_s:.0f} s for: {what}"
            time.sleep(0.02)

    def verify(self) -> Report:
        """Redis against an offline replay."""
        return verify(self.serving, self.streams)

    def top(self, user: str) -> list[str]:
        """A user's list."""
        with self.reader() as top_k:
            return list(top_k.get(user).items)

    def reader(self) -> TopK:
        """What an application would read with."""
        serving = self.serving
        return TopK(serving.redis, namespace=serving.namespace, layout=serving.layout)

    def dead_letters(self) -> list[dict[str, bytes]]:
        """Headers of every dead letter, with key and value."""
        topic = f"{self.streams.clicks_topic}.dlq"
        start, end = self._reader.edges(topic, 0)
        return [
            {**dict(record.headers), "key": record.key or b"", "value": record.value or b""}
            for records in self._reader.read(topic, 0, start, end)
            for record in records
        ]

    def close(self) -> None:
        """Close the connections."""
        for store in self._stores:
            store.close()
        self._producer.close()
        self._reader.close()


def environment(package: str, settings: msgspec.Struct) -> dict[str, str]:
    """Settings as the environment that leads to them."""
    fresh = type(settings)()
    return {
        f"AFTERCLICK_{package}__{name.upper()}": str(getattr(settings, name))
        for name in settings.__struct_fields__
        if getattr(settings, name) != getattr(fresh, name)
    }


def fold_by_hand(
    stage: Stage, partition: int, store: Store | Replica, serving: Serving, edges: LogEdges
) -> PartitionFold:
    """A partition's fold as a worker opens it, for a test to give chunks to."""
    fold = PartitionFold(
        partition,
        store,
        ListRules.of(stage.serving),
        Limits(256, 1024, 1 << 20),
        serving=lambda: serving,
        dead_letters=lambda letters: None,
        log_start=lambda: 0,
        batch_ids=(f"by-hand-{n}" for n in itertools.count()),
    )
    fold.open(edges, lambda offset: None)
    return fold


def some_clicks(num: int, *, users: int = 40, items: int = 300, start: int = 0) -> list[Click]:
    """A plain, repeatable log."""
    return [
        Click(
            user_id=f"u{(7 * n) % users}",
            item_id=f"i{(n * n + 3 * n) % items:05d}",
            timestamp_ms=1_700_000_000_000 + 1000 * n,
            event_id=f"e{n}",
        )
        for n in range(start, start + num)
    ]
