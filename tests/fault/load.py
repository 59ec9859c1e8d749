"""Clicks that never stop: what was sent, and where it stands in the log.

Every click is sent until the broker acknowledges it, through whatever happens to the broker, so
that at the end `clicks` is what must be folded. Items change and bad records come in between.
"""

import threading
from collections import Counter
from typing import Any, Self

import msgspec
from kafka import KafkaProducer

from afterclick.serving.keys import partition_of
from afterclick.streams.admin import client_config
from afterclick.streams.events import Item, encode
from afterclick.streams.settings import StreamsSettings
from tests.service.stage import some_clicks

CLICKS_PER_BURST = 25
BURST_EVERY_S = 0.05
"""500 clicks a second: the worker folds all the time, and two cores still run broker and Redis."""

USERS = 200
ITEMS = 300

CLICKS_PER_GUEST = 10
"""Every tenth click is its user's only one. What a fault took from the others their next click
would write again, from the worker's cache; from these nobody ever would.
"""

BURSTS_PER_ITEM = 40
"""An item changes every 2 s: the catalogue is part of what is folded with."""

BURSTS_PER_BAD_RECORD = 60
"""A record that breaks the contract every 3 s: its letter must come through the faults too."""

DELIVERY_TIMEOUT_MS = 600_000
"""No click may be given up: nobody would know whether it is in the log."""


class Load:
    """Sends from `with` to `stop`."""

    def __init__(self, settings: StreamsSettings, num_partitions: int) -> None:
        self.clicks = 0
        self.bad = 0
        self.sent: Counter[int] = Counter()
        """Records given to the producer, per partition."""
        self.taken: Counter[int] = Counter()
        """Records that the broker acknowledged, per partition, in order."""
        self.ends: dict[int, int] = {}
        """Offset after the last of these."""
        self._num_partitions = num_partitions
        self._settings = settings
        self._failed: list[BaseException] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        self._producer = KafkaProducer(
            **client_config(settings),
            acks="all",
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            request_timeout_ms=5000,
            max_block_ms=DELIVERY_TIMEOUT_MS,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._producer.close(timeout=10)

    def stop(self) -> None:
        """Send no more, and return once everything is acknowledged."""
        self._done.set()
        self._thread.join()
        self._producer.flush(timeout=DELIVERY_TIMEOUT_MS / 1000)
        assert not self._failed, f"the log did not take everything: {self._failed[0]!r}"

    def _run(self) -> None:
        burst = 0
        while not self._done.is_set():
            for click in some_clicks(CLICKS_PER_BURST, users=USERS, items=ITEMS, start=self.clicks):
                if self.clicks % CLICKS_PER_GUEST == 0:
                    click = msgspec.structs.replace(click, user_id=f"guest{self.clicks}")
                self._send_click(*encode(click))
                self.clicks += 1
            burst += 1
            if burst % BURSTS_PER_ITEM == 0:
                number = burst // BURSTS_PER_ITEM
                item = Item(item_id=f"i{number % ITEMS:05d}", available=number % 3 > 0)
                key, value = encode(item)
                sending = self._producer.send(self._settings.items_topic, key=key, value=value)
                sending.add_errback(self._failed.append)
            if burst % BURSTS_PER_BAD_RECORD == 0:
                self._send_click(b"u0", b"not a click")
                self.bad += 1
            self._done.wait(BURST_EVERY_S)

    def _send_click(self, key: bytes, value: bytes) -> None:
        partition = partition_of(key.decode(), self._num_partitions)
        topic = self._settings.clicks_topic
        sending = self._producer.send(topic, key=key, value=value, partition=partition)
        sending.add_errback(self._failed.append)
        sending.add_callback(self._took)
        self.sent[partition] += 1

    def _took(self, placed: Any) -> None:
        self.ends[placed.partition] = placed.offset + 1
        self.taken[placed.partition] += 1
