"""What each kind of fault does, and when it is over.

A fault gets the deployment and a random generator, breaks something, mends it, and returns the
`Mark` from which recovery counts: the kill itself where a worker dies, else the moment when
everything is whole again. What a kind is called says where it strikes.
"""

import random
import time
from collections.abc import Callable

from tests.fault.deployment import Deployment, Slot
from tests.fault.proxy import TO_CLIENT, TO_SERVER
from tests.fault.redis_pair import wait_until
from tests.fault.watch import Mark

Fault = Callable[[Deployment, random.Random], Mark]

HELD_TIMEOUT_S = 3.0
"""A worker under load sends a script every few milliseconds, unless it holds no partition now."""

LAG_TIMEOUT_S = 20.0
"""Longest wait until the primary is ahead of its replica: a worker may be joining."""


def worker_killed(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGKILL; an orchestrator starts it again."""
    slot = _any(all_of, rng)
    slot.down = True
    slot.worker.process.kill()
    mark = all_of.watch.mark()
    slot.start()
    return mark


def all_workers_killed(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGKILL of every worker: nobody is left to take over."""
    for slot in all_of.slots:
        slot.down = True
        slot.worker.process.kill()
    mark = all_of.watch.mark()
    for slot in all_of.slots:
        slot.start()
    return mark


def worker_killed_answer_held(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGKILL after Redis ran its script and before the worker knew."""
    slot = _any(all_of, rng)
    slot.redis.hold(TO_CLIENT, new=False)
    all_of.scripts_held += wait_until(lambda: slot.redis.held(TO_CLIENT, b"OK"), HELD_TIMEOUT_S)
    slot.down = True
    slot.worker.process.kill()
    mark = all_of.watch.mark()
    slot.start()
    slot.redis.release()
    return mark


def worker_killed_script_late(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGKILL with a script on the wire; it arrives at Redis before or after others took over."""
    slot = _any(all_of, rng)
    slot.redis.hold(TO_SERVER, new=False)
    all_of.scripts_held += wait_until(
        lambda: slot.redis.held(TO_SERVER, b"EVALSHA"), HELD_TIMEOUT_S
    )
    slot.down = True
    slot.worker.process.kill()
    mark = all_of.watch.mark()
    slot.start()
    all_of.pass_time(rng.choice((0.5, 9.0, 13.0)))
    slot.redis.release()
    return mark


def worker_frozen(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGSTOP for longer than the session timeout, then SIGCONT: a zombie that notices late."""
    slot = _any(all_of, rng)
    slot.down = True
    slot.worker.pause()
    all_of.pass_time(all_of.stage.streams.session_timeout_s + rng.uniform(1.0, 5.0))
    slot.worker.resume()
    slot.down = False
    return all_of.watch.mark()


def worker_stopped(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGTERM, as in a rolling deploy."""
    slot = _any(all_of, rng)
    slot.down = True
    slot.worker.stop(timeout_s=20.0)
    mark = all_of.watch.mark()
    slot.start()
    return mark


def broker_killed(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGKILL of Kafka, restarted on its data."""
    all_of.broker.kill()
    all_of.pass_time(rng.uniform(0.0, 3.0))
    all_of.broker.start()
    return all_of.watch.mark()


def broker_frozen(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGSTOP of the broker for some seconds, shorter or longer than sessions last."""
    all_of.broker.pause()
    all_of.pass_time(rng.uniform(2.0, 9.0))
    all_of.broker.resume()
    return all_of.watch.mark()


def redis_killed(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGKILL of the primary, restarted on its append-only file."""
    all_of.pair.primary.kill()
    all_of.pass_time(rng.uniform(0.0, 3.0))
    all_of.pair.primary.start()
    return all_of.watch.mark()


def redis_without_power(all_of: Deployment, rng: random.Random) -> Mark:
    """The primary's machine dies: what `everysec` had not synced is gone after the restart."""
    written = all_of.pair.written()
    all_of.pass_time(rng.uniform(0.3, 1.0))
    before = all_of.heads(all_of.pair.primary)
    all_of.pair.lose_power(written)
    all_of.pass_time(rng.uniform(0.0, 2.0))
    all_of.pair.primary.start()
    all_of.went_back(before, all_of.heads(all_of.pair.primary))
    return all_of.watch.mark()


def redis_frozen(all_of: Deployment, rng: random.Random) -> Mark:
    """SIGSTOP of the primary, shorter or longer than the worker's timeout of 5 s."""
    all_of.pair.primary.pause()
    all_of.pass_time(rng.uniform(1.0, 9.0))
    all_of.pair.primary.resume()
    return all_of.watch.mark()


def redis_failed_over(all_of: Deployment, rng: random.Random) -> Mark:
    """The primary dies, a replica that was behind takes over: acknowledged writes are lost. It does
    so at once, and clients send again there what broke off at the old one; or after a while.
    """
    _let_lag(all_of)
    if rng.random() < 0.5:
        all_of.pair.primary.kill()
        all_of.pass_time(rng.uniform(0.0, 3.0))
    all_of.pair.promote()
    _lead_to_primary(all_of, all_of.slots)
    all_of.pair.replica.kill()
    mark = all_of.watch.mark()
    all_of.pair.rejoin()
    return mark


def redis_split(all_of: Deployment, rng: random.Random) -> Mark:
    """A replica takes over while the old primary lives; one worker goes on writing to the old one,
    which is then made a replica. Its connections stay: it must find out by itself.
    """
    behind = _any(all_of, rng)
    _let_lag(all_of)
    all_of.pair.promote()
    behind.redis.lead_to(all_of.pair.primary.port, reset=False)
    _lead_to_primary(all_of, [slot for slot in all_of.slots if slot is not behind])
    all_of.pass_time(rng.uniform(1.0, 4.0))
    all_of.pair.rejoin()
    return all_of.watch.mark()


def redis_cut(all_of: Deployment, rng: random.Random) -> Mark:
    """Connections to Redis are reset, and new ones too, for some seconds."""
    slots = _some(all_of, rng)
    for slot in slots:
        # Scripts that ran and whose answers are lost: the client sends them again.
        slot.redis.hold(TO_CLIENT)
    wait_until(lambda: any(slot.redis.held(TO_CLIENT, b"OK") for slot in slots), HELD_TIMEOUT_S)
    for slot in slots:
        slot.redis.cut()
    all_of.pass_time(rng.uniform(0.0, 6.0))
    for slot in slots:
        slot.redis.restore()
    return all_of.watch.mark()


def redis_stalled(all_of: Deployment, rng: random.Random) -> Mark:
    """Packets to and from Redis vanish for some seconds; then they come late, or never."""
    slots = _some(all_of, rng)
    for slot in slots:
        slot.redis.hold()
    all_of.pass_time(rng.uniform(1.0, 9.0))
    late = rng.random() < 0.5
    for slot in slots:
        if late:
            slot.redis.release()
        else:
            slot.redis.restore()
    return all_of.watch.mark()


def kafka_cut(all_of: Deployment, rng: random.Random) -> Mark:
    """Connections to Kafka are reset, and new ones too, for some seconds."""
    slots = _some(all_of, rng)
    for slot in slots:
        assert slot.broker is not None
        slot.broker.cut()
    all_of.pass_time(rng.uniform(0.5, 9.0))
    for slot in slots:
        assert slot.broker is not None
        slot.broker.restore()
    return all_of.watch.mark()


def kafka_stalled(all_of: Deployment, rng: random.Random) -> Mark:
    """Packets to and from Kafka vanish for some seconds; then they come late, or never."""
    slots = _some(all_of, rng)
    for slot in slots:
        assert slot.broker is not None
        slot.broker.hold()
    all_of.pass_time(rng.uniform(1.0, 12.0))
    late = rng.random() < 0.5
    for slot in slots:
        assert slot.broker is not None
        if late:
            slot.broker.release()
        else:
            slot.broker.restore()
    return all_of.watch.mark()


EVERYWHERE: tuple[Fault, ...] = (
    worker_killed,
    all_workers_killed,
    worker_killed_answer_held,
    worker_killed_script_late,
    worker_frozen,
    worker_stopped,
    broker_frozen,
    redis_killed,
    redis_without_power,
    redis_frozen,
    redis_failed_over,
    redis_split,
    redis_cut,
    redis_stalled,
)
"""What any broker bears, one that keeps its log in memory too."""

ON_KAFKA: tuple[Fault, ...] = (broker_killed, kafka_cut, kafka_stalled)
"""What needs a log on disk, or an address for each worker."""

LOSES_WRITES: tuple[Fault, ...] = (redis_without_power, redis_failed_over, redis_split)
"""After these, Redis has an older head than it had acknowledged."""


def _any(all_of: Deployment, rng: random.Random) -> Slot:
    return rng.choice(all_of.slots)


def _some(all_of: Deployment, rng: random.Random) -> list[Slot]:
    """One worker, or all."""
    return list(all_of.slots) if rng.random() < 0.4 else [_any(all_of, rng)]


def _let_lag(all_of: Deployment) -> None:
    """Keep the replica behind until the primary has acknowledged more."""
    pair = all_of.pair
    pair.keep_behind()
    after = all_of.heads(pair.replica)

    def ahead() -> bool:
        all_of.supervise()
        return sum(all_of.heads(pair.primary).values()) > sum(after.values())

    wait_until(ahead, LAG_TIMEOUT_S)
    time.sleep(0.1)  # a few writes more
    all_of.went_back(all_of.heads(pair.primary), after)


def _lead_to_primary(all_of: Deployment, slots: list[Slot]) -> None:
    for proxy in (all_of.front, *(slot.redis for slot in slots)):
        proxy.lead_to(all_of.pair.primary.port)
