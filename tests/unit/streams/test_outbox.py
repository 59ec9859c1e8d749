"""From Redis to the topic: in order, at least once, within limits."""

import asyncio
from typing import Any

import pytest

from afterclick.serving.errors import UnavailableError
from afterclick.serving.memory import Move
from afterclick.serving.records import Head
from afterclick.serving.store import SignalsWrite
from afterclick.streams.metrics import Metrics
from afterclick.streams.outbox import (
    MESSAGE_BYTES_MAX,
    PARCELS_MAX,
    Message,
    Publisher,
    TooLargeError,
    keep_publishing,
)
from afterclick.streams.replica import Replica
from afterclick.streams.signals import Origin, decode_parcel, decode_signal, encode_parcel

ORIGIN = Origin(0, "t", 3)


class Topic:
    """A broker that takes what it is told to."""

    def __init__(self, bytes_max: int = 1 << 20) -> None:
        self.values: list[bytes] = []
        self.away = False
        self.bytes_max = bytes_max

    def send(self, message: Message) -> None:
        if self.away:
            raise UnavailableError("nobody answers")
        if len(message.value) > self.bytes_max:
            raise TooLargeError("too large")
        assert message.partition == 3
        self.values.append(message.value)

    def offsets(self) -> list[int]:
        signals = [decode_signal(value) for value in self.values]
        parcels = [decode_parcel(bytes(raw)) for signal in signals for raw in signal.parcels]
        return [offset for parcel in parcels for offset, _ in parcel.moves]


def filled(num: int, *, item_bytes: int = 5) -> Replica:
    """A store with so many chunks of one click in partition 3's outbox."""
    store, stands = Replica(), b""
    for at in range(num):
        parcel = encode_parcel(at, at + 1, [(at, Move("i" * item_bytes, 2, at, ()))])
        head = Head(next=at + 1, batch=str(at))
        assert store.commit(3, stands, head, None, [], [], SignalsWrite(at, parcel)) is None
        stands = store.heads[3]
    return store


def test_everything_goes_in_order_in_messages_of_bounded_size() -> None:
    """After an outage thousands of chunks wait; a broker takes a megabyte at once."""
    for store in (filled(PARCELS_MAX + 7), filled(40, item_bytes=30_000)):
        num, topic = store.num_waiting_signals(3), Topic()
        publisher = Publisher(store, "n", topic.send, 10)
        while publisher.publish([ORIGIN]).left:
            pass
        assert topic.offsets() == list(range(num))
        assert store.waiting_signals(3, 1) == []
        assert len(topic.values) > 1
        assert max(map(len, topic.values)) < MESSAGE_BYTES_MAX + 40_000


def test_nothing_is_struck_off_that_the_broker_does_not_have() -> None:
    """It would be lost."""
    store, topic = filled(5), Topic()
    topic.away = True
    publisher = Publisher(store, "n", topic.send, 10)
    with pytest.raises(UnavailableError):
        publisher.publish([ORIGIN])
    assert store.num_waiting_signals(3) == 5
    topic.away = False
    assert publisher.publish([ORIGIN]).parcels == 5
    assert topic.offsets() == [0, 1, 2, 3, 4]


def test_beyond_the_limit_the_oldest_are_given_up() -> None:
    """Redis must not fill with what no topic takes; the newest tell most."""
    store = filled(12)
    publisher = Publisher(store, "n", Topic().send, 10)
    assert publisher.trim(3) == (2, 10)
    assert [one.last for one in store.waiting_signals(3, 20)] == list(range(2, 12))
    assert publisher.trim(3) == (0, 10)


def test_a_chunk_that_no_broker_takes_does_not_stand_in_the_way() -> None:
    """Ids of 512 characters, a thousand in a chunk, on a broker with a small limit."""
    store, stands = Replica(), b""
    for at, size in enumerate((5, 2000, 5)):
        parcel = encode_parcel(at, at + 1, [(at, Move("i" * size, 2, at, ()))])
        head = Head(next=at + 1, batch=str(at))
        store.commit(3, stands, head, None, [], [], SignalsWrite(at, parcel))
        stands = store.heads[3]
    topic = Topic(bytes_max=1000)
    publisher = Publisher(store, "n", topic.send, 10)
    refused = 0
    while store.num_waiting_signals(3):
        refused += publisher.publish([ORIGIN]).refused
    assert (refused, topic.offsets()) == (1, [0, 2])


class Fold:
    """What the publisher sees of a partition's fold."""

    partition = 3
    topic_id = "t"
    has_signals = True


def test_what_could_not_be_published_is_tried_again_and_counted() -> None:
    """The broker comes back some time; until then the gauge and the limit hold."""
    store, topic, metrics, fold = filled(12), Topic(), Metrics(), Fold()
    topic.away = True

    async def scenario() -> None:
        async def until(done: Any) -> None:
            while not done():  # noqa: ASYNC110 - a metric wakes nobody
                await asyncio.sleep(0.001)

        publisher = Publisher(store, "n", topic.send, 10)
        folds: Any = lambda: [fold]  # noqa: E731
        task = asyncio.create_task(
            keep_publishing(publisher, folds, epoch=0, every_s=0.001, metrics=metrics)
        )
        waiting = metrics.signals_waiting.labels(partition="3")
        await asyncio.wait_for(until(lambda: waiting._value.get() == 10), 10)
        topic.away = False
        await asyncio.wait_for(until(lambda: topic.values), 10)
        await asyncio.wait_for(until(lambda: waiting._value.get() == 0), 10)
        task.cancel()

    asyncio.run(scenario())
    assert topic.offsets() == list(range(2, 12))
    assert metrics.signals_dropped._value.get() == 2
    assert metrics.signals_published._value.get() == 10
    assert not fold.has_signals
