"""What every contestant of one run stands on: broker, Redis, one release, one topic full of clicks.

Knows no contestant. Everything is made from the seed, so two runs feed the same bytes.
"""

import contextlib
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import redis
from kafka import KafkaProducer

from afterclick.serving.keys import Keys
from afterclick.serving.manifest import Publication
from afterclick.serving.records import Head
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.streams.admin import client_config, create_topics
from afterclick.streams.events import Click, encode
from afterclick.streams.local import HOST, local_broker, local_kafka, local_redis
from afterclick.streams.processes import Process
from afterclick.streams.settings import StreamsSettings
from tests.tiny_release import write_tiny_release

ROOT = Path(__file__).parents[1]
ZIPF_EXPONENT = 0.9
"""Of item popularity; users are uniform, so that next to no two clicks of a chunk share a scan."""
NAMESPACE = "bench"
KNOWN_CLICKS, KNOWN_SEQUENCE = 15, 8
"""What a blend knows: so many clicks an item, in sequences of so many."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What one run is made of."""

    items: int = 20_000
    units: int = 128
    k: int = 50
    users: int = 20_000
    clicks: int = 60_000
    warm_up: int = 10_000
    """Clicks of the backlog that pass before the clock starts."""
    partitions: int = 4
    seconds: float = 20.0
    """Length of each latency measurement."""
    latency_warm_up_s: float = 3.0
    """Load of the same rate before it, sent and not counted."""
    rival_seconds: float = 15.0
    """Longest drain that is timed; the naive app does not reach the end of the backlog."""
    ceiling_seconds: float = 4.0
    seed: int = 7
    processes: int = 1
    """Of the worker, and of the rivals that can have several."""
    broker: str = "kafka"
    worker_env: dict[str, str] = {}
    quick: bool = False


class Ground(NamedTuple):
    """Servers, settings and the release of one run."""

    options: Options
    folder: Path
    serving: ServingSettings
    streams: StreamsSettings
    publication: Publication
    release_folder: Path
    redis: "redis.Redis"
    keys: Keys
    servers: dict[str, Process]
    """`broker` and `redis`."""

    def apart(self, name: str) -> "Ground":
        """The same clicks for another worker, in a namespace of its own."""
        streams = msgspec.structs.replace(
            self.streams, group=f"afterclick-{name}", signals_topic=f"signals-{name}"
        )
        create_topics(streams, partitions=self.options.partitions, replication=1)
        serving = msgspec.structs.replace(self.serving, namespace=f"{NAMESPACE}-{name}")
        return self._replace(serving=serving, streams=streams, keys=Keys(serving.namespace))

    def blended(self) -> "Ground":
        """The same, and its release has a blend."""
        stage = self.apart("blend")
        releases = str(self.folder / "releases-blend")
        serving = msgspec.structs.replace(stage.serving, releases=releases)
        publication, folder = _release(serving, self.options, blend=True)
        return stage._replace(serving=serving, publication=publication, release_folder=folder)

    def in_one_process(self) -> "Ground":
        """The same clicks for a worker of one process."""
        options = msgspec.structs.replace(self.options, processes=1)
        return self.apart("one")._replace(options=options)

    def load(self, *, threads: int) -> LoadedRelease:
        """The release, for this process."""
        settings = msgspec.structs.replace(self.serving, threads=threads)
        return LoadedRelease(self.publication, self.release_folder, settings)

    @property
    def worker_env(self) -> dict[str, str]:
        """Settings of the worker under test: defaults, but for where things are and K."""
        return {
            "AFTERCLICK_STREAMS__BROKER": self.streams.broker,
            "AFTERCLICK_STREAMS__GROUP": self.streams.group,
            "AFTERCLICK_STREAMS__PROCESSES": str(self.options.processes),
            "AFTERCLICK_STREAMS__SIGNALS_TOPIC": self.streams.signals_topic,
            "AFTERCLICK_SERVING__REDIS": self.serving.redis,
            "AFTERCLICK_SERVING__RELEASES": self.serving.releases,
            "AFTERCLICK_SERVING__NAMESPACE": self.serving.namespace,
            "AFTERCLICK_SERVING__K": str(self.serving.k),
            "AFTERCLICK_SERVING__PROVIDER": "cpu",
            # A drain's backlog is a minute old: with a budget its lists would be put off, and what
            # is compared with the rivals is a list at every click.
            "AFTERCLICK_STREAMS__LATENCY_BUDGET_MS": "0",
            **self.options.worker_env,
        }

    def applied(self) -> int:
        """Records folded so far."""
        return sum(head.next for head in self.heads())

    def heads(self) -> list[Head]:
        """How far each partition is folded."""
        found = self.redis.mget([self.keys.head(p) for p in range(self.options.partitions)])
        return [msgspec.json.decode(head, type=Head) if head else Head() for head in found]


@contextlib.contextmanager
def ground(options: Options, folder: Path) -> Iterator[Ground]:
    """Start the servers, make topics and the release."""
    with contextlib.ExitStack() as stack:
        if options.broker == "kafka":
            cache = ROOT / ".cache" / "kafka"
            broker = stack.enter_context(local_kafka(folder / "broker", cache=cache))
        else:
            broker = stack.enter_context(local_broker(folder / "broker"))
        server = stack.enter_context(local_redis(folder / "redis"))
        streams = StreamsSettings(broker=broker.address)
        create_topics(streams, partitions=options.partitions, replication=1)
        serving = ServingSettings(
            redis=server.url,
            namespace=NAMESPACE,
            releases=str(folder / "releases"),
            k=options.k,
            provider="cpu",
        )
        publication, release_folder = _release(serving, options, blend=False)
        client = redis.Redis.from_url(server.url)
        stack.callback(client.close)
        yield Ground(
            options,
            folder,
            serving,
            streams,
            publication,
            release_folder,
            client,
            Keys(NAMESPACE),
            {"broker": broker.process, "redis": server.process},
        )


def _release(
    serving: ServingSettings, options: Options, *, blend: bool
) -> tuple[Publication, Path]:
    """Random weights; a blend knows clicks of the same world in sequences of eight."""
    store = ReleaseStore(serving.releases)
    staged, log = store.staging("random"), None
    if blend:
        rng = np.random.default_rng([options.seed, 1])
        num = KNOWN_CLICKS * options.items // KNOWN_SEQUENCE * KNOWN_SEQUENCE
        start_S1 = np.arange(0, num + 1, KNOWN_SEQUENCE)
        log = start_S1, _items(options, rng, num), np.arange(num) * 1000 + 1
    write_tiny_release(
        staged,
        num_items=options.items,
        units=options.units,
        seed=options.seed,
        blend=blend,
        blend_log=log,
    )
    store.add(staged)
    return store.publish("random"), store.fetch("random")


def metrics_of(port: int) -> dict[str, float]:
    """What a process on this machine tells on /metrics, but for series with labels."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as page:
        found = re.findall(r"^(\w+) (\S+)$", page.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has taken, all of its threads and its children that run.

    Raises:
        FileNotFoundError: there is no such process.
    """
    taken = [_fields_of(Path(f"/proc/{pid}/stat"))]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = _fields_of(stat)
            if int(fields[1]) == pid:
                taken.append(fields)
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in taken)
    return ticks / os.sysconf("SC_CLK_TCK")


def _fields_of(stat: Path) -> list[str]:
    """What follows a process's name: its state, its parent, …"""
    return stat.read_text().rpartition(")")[2].split()


def item_ids(options: Options, rng: np.random.Generator, num: int) -> list[str]:
    """Items as clicks draw them: Zipf."""
    return [f"i{row:05d}" for row in _items(options, rng, num)]


def _items(options: Options, rng: np.random.Generator, num: int) -> np.ndarray:
    weights = np.arange(1, options.items + 1) ** -ZIPF_EXPONENT
    return rng.choice(options.items, size=num, p=weights / weights.sum())


def backlog(options: Options, *, end_ms: int) -> list[Click]:
    """The clicks that every contestant drains, one a millisecond up to `end_ms`."""
    rng = np.random.default_rng(options.seed)
    users = rng.integers(0, options.users, options.clicks)
    items = item_ids(options, rng, options.clicks)
    return [
        Click(
            user_id=f"u{user}",
            item_id=item,
            timestamp_ms=end_ms - options.clicks + at,
            event_id=f"b{at}",
        )
        for at, (user, item) in enumerate(zip(users.tolist(), items, strict=True))
    ]


def fill(stage: Ground, clicks: list[Click]) -> float:
    """Produce clicks and wait until the broker has them; clicks a second."""
    producer = KafkaProducer(**client_config(stage.streams), acks=1, linger_ms=5)
    begun_s = time.perf_counter()
    futures = []
    for click in clicks:
        key, value = encode(click)
        futures.append(producer.send(stage.streams.clicks_topic, key=key, value=value))
    producer.flush(timeout=120)
    for future in futures:
        future.get(timeout=30)
    took_s = time.perf_counter() - begun_s
    producer.close()
    return len(clicks) / took_s
