"""Everything that is broken on purpose: broker, two Redis servers, workers, and the network between
them.

Each worker reaches Redis and Kafka through proxies of its own, so that its network alone can be
cut; the test itself looks at Redis through another one, and at Kafka directly. A worker that ends
by itself is started again, as an orchestrator would, and counted.
"""

import contextlib
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from afterclick.serving.store import Store
from afterclick.streams.admin import check_topics, create_topics
from afterclick.streams.local import Redis, Server, Worker, local_broker, local_kafka, readiness
from afterclick.streams.namespace import open_store
from afterclick.streams.processes import free_port
from afterclick.streams.settings import StreamsSettings
from tests.fault.load import Load
from tests.fault.proxy import Proxy
from tests.fault.redis_pair import RedisPair, redis_pair
from tests.fault.watch import Watch, read_heads
from tests.service.stage import Stage

ROOT = Path(__file__).parents[2]

NUM_PARTITIONS = 4

LIVENESS_EVERY_S = 2.0
"""How often an orchestrator asks /livez."""


class Slot:
    """One worker and the ways it takes to the world."""

    def __init__(self, number: int, redis: Proxy, broker: Proxy | None) -> None:
        self.number, self.redis, self.broker = number, redis, broker
        self.worker: Worker
        self.down = False
        """A fault has it: whatever its state, nobody starts it again."""

    def start(self) -> None:
        """Start it again, without waiting: the others must go on meanwhile."""
        self.down = False
        if not self.worker.process.running:
            self.worker.process.start()


class Deployment:
    """What faults act on."""

    def __init__(
        self,
        stage: Stage,
        broker: Server,
        pair: RedisPair,
        front: Proxy,
        slots: list[Slot],
        stores: dict[int, Store],
        load: Load,
        watch: Watch,
    ) -> None:
        self.stage, self.broker, self.pair, self.front = stage, broker, pair, front
        self.slots, self.load, self.watch = slots, load, watch
        self.exits: list[str] = []
        """Workers that ended by themselves, or failed liveness: not what any fault asks for."""
        self.lost_by_redis: list[int] = []
        """Records that each failover or power cut took back."""
        self.scripts_held = 0
        """Scripts that were on their way when their worker died."""
        self._stores = stores
        self._asked_s = time.monotonic()

    def heads(self, server: Redis) -> dict[int, int]:
        """How far each partition is folded, as one of the two servers has it."""
        return read_heads(self._stores[server.port], NUM_PARTITIONS)

    def went_back(self, before: dict[int, int], after: dict[int, int]) -> None:
        """Note how many records Redis had acknowledged and has no longer."""
        self.lost_by_redis.append(sum(max(0, head - after[p]) for p, head in before.items()))

    def supervise(self) -> None:
        """Start what ended by itself, kill and start what says that it is stuck."""
        look = time.monotonic() - self._asked_s > LIVENESS_EVERY_S
        self._asked_s = time.monotonic() if look else self._asked_s
        for slot in self.slots:
            process = slot.worker.process
            if slot.down:
                continue
            if not process.running:
                self.exits.append(f"exit code {process.exit_code}: {process.tail()[-600:]}")
            elif look and (said := not_live(slot.worker.port)):
                self.exits.append(f"not live: {said}")
                process.kill()
            else:
                continue
            slot.start()

    def pass_time(self, seconds: float) -> None:
        """Wait, and supervise."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self.supervise()
            time.sleep(min(0.1, left_s))

    def unready(self) -> list[str]:
        """What /readyz says of each worker that is not ready."""
        answers = [readiness(slot.worker.port) for slot in self.slots]
        return [said for ready, said in answers if not ready]


def not_live(port: int) -> str:
    """What /livez says where it fails; empty where it does not, or where nobody answers."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=1.0).close()
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")
    except OSError:
        pass
    return ""


def behind_proxies(proxies: list[Proxy]) -> dict[str, str]:
    """Kafka's listeners that send their clients back through the proxy they came by."""
    names = {f"WORKER{number}": proxy for number, proxy in enumerate(proxies)}
    return {
        "listeners": ",".join(f"{n}://127.0.0.1:{proxy.target}" for n, proxy in names.items()),
        "advertised.listeners": ",".join(f"{n}://{proxy.address}" for n, proxy in names.items()),
        "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in names),
    }


@contextlib.contextmanager
def deployment(
    folder: Path, *, kafka: bool, num_workers: int, session_timeout_s: float
) -> Iterator[Deployment]:
    """All of it, running, under load, on release r1, which has a blend."""
    with contextlib.ExitStack() as stack:
        ways: list[Proxy | None] = [None] * num_workers
        if kafka:
            proxies = [stack.enter_context(Proxy(free_port())) for _ in range(num_workers)]
            ways = list(proxies)
            broker = stack.enter_context(
                local_kafka(
                    folder / "broker",
                    cache=ROOT / ".cache" / "kafka",
                    properties=behind_proxies(proxies),
                )
            )
        else:
            broker = stack.enter_context(local_broker(folder / "broker"))
        pair = stack.enter_context(redis_pair(folder))
        front = stack.enter_context(Proxy(pair.primary.port))
        name = uuid.uuid4().hex[:8]
        streams = StreamsSettings(
            broker=broker.address,
            clicks_topic=f"clicks-{name}",
            items_topic=f"items-{name}",
            signals_topic=f"signals-{name}",
            group=f"group-{name}",
        )
        create_topics(streams, partitions=NUM_PARTITIONS, replication=1)
        stage = Stage(streams, f"redis://{front.address}/0", f"chaos-{name}", folder)
        stack.callback(stage.close)
        stage.streams = msgspec.structs.replace(
            stage.streams,
            session_timeout_s=session_timeout_s,
            # tansu waits for so long at each join; for Kafka it is a bound, here the default.
            rebalance_timeout_s=20.0 if kafka else 6.0,
        )
        stage.publish("r1", seed=1, blend=True)
        topics = check_topics(streams)
        stores = {
            server.port: open_store(
                msgspec.structs.replace(stage.serving, redis=server.url), topics
            )
            for server in (pair.primary, pair.replica)
        }
        for store in stores.values():
            stack.callback(store.close)
        slots = []
        for number, way in enumerate(ways):
            slot = Slot(number, stack.enter_context(Proxy(pair.primary.port)), way)
            settings = {"AFTERCLICK_SERVING__REDIS": f"redis://{slot.redis.address}/0"}
            if way is not None:
                settings["AFTERCLICK_STREAMS__BROKER"] = way.address
            slot.worker = stack.enter_context(stage.worker(**settings))
            slots.append(slot)
        load = stack.enter_context(Load(streams, NUM_PARTITIONS))
        watch = stack.enter_context(Watch(stage.store(), load, NUM_PARTITIONS))
        yield Deployment(stage, broker, pair, front, slots, stores, load, watch)
