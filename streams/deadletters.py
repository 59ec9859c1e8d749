"""Where records go that broke the contract: `<topic>.dlq`, raw bytes unchanged, the reason in
headers.

A dead letter is acknowledged by the broker before the offset moves past its record, so none is
lost; a crash
between the two writes it again, so one record can have two letters (same topic, partition and
offset).
"""

import hashlib
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError

from afterclick.serving.errors import UnavailableError
from afterclick.streams.admin import client_config, dead_letters_topic
from afterclick.streams.record import DeadLetter
from afterclick.streams.settings import StreamsSettings

ACK_TIMEOUT_S = 30.0
OURS = "afterclick."
"""What our headers begin with."""

REPLAYS = OURS + "replays"
"""How often `afterclick dlq replay` sent a record; it stays with the record."""

VALUE_BYTES_MAX = 64 << 20
"""Largest value that is sent on; the broker's own limit is usually far below."""
KEY_BYTES_MAX = 4096
"""A longer key is left out of a letter that was too large: 512 characters are at most 2 KiB."""


class DeadLetters:
    """Producer of dead letters; connects at the first one."""

    def __init__(self, settings: StreamsSettings) -> None:
        self._settings = settings
        self._producer: Any = None

    def send(
        self, topic: str, partition: int, letters: list[DeadLetter], *, beside: str = ""
    ) -> None:
        """Write letters and wait until the broker has them.

        Args:
            topic: the source topic.
            partition: the source partition.
            letters: in log order.
            beside: the topic whose dead letters they join; the source unless given.

        Raises:
            UnavailableError: the broker did not take them; nothing may be committed past them.
        """
        try:
            to = dead_letters_topic(beside or topic)
            pending = [self._post(to, topic, partition, letter) for letter in letters]
            for letter, future in zip(letters, pending, strict=True):
                try:
                    future.get(timeout=ACK_TIMEOUT_S)
                except MessageSizeTooLargeError:
                    self._post(to, topic, partition, letter, whole=False).get(timeout=ACK_TIMEOUT_S)
        except KafkaError as error:
            raise UnavailableError(
                f"Kafka at {self._settings.broker}: dead letters of {topic}/{partition}: {error!r}"
            ) from error

    def close(self) -> None:
        """Close the connection."""
        if self._producer is not None:
            self._producer.close(timeout=5)

    def _post(
        self, to: str, topic: str, partition: int, letter: DeadLetter, *, whole: bool = True
    ) -> Any:
        """Send a letter; one that is not `whole` fits any broker, and names what it leaves out."""
        if self._producer is None:
            self._producer = KafkaProducer(
                **client_config(self._settings),
                acks="all",
                # One letter that the broker refuses would fail every later one of this producer;
                # a letter written twice is allowed for.
                enable_idempotence=False,
                max_request_size=VALUE_BYTES_MAX,
                compression_type=None,
            )
        key, value = letter.record.key, letter.record.value
        headers = [
            ("afterclick.reason", letter.reason.encode()),
            ("afterclick.message", letter.message.encode()),
            ("afterclick.topic", topic.encode()),
            ("afterclick.partition", str(partition).encode()),
            ("afterclick.offset", str(letter.record.offset).encode()),
            ("afterclick.timestamp_ms", str(letter.record.timestamp_ms).encode()),
            ("afterclick.stage", b"decode"),
        ]
        if whole:
            headers = [*letter.record.headers, *headers]
        else:
            digest = hashlib.sha256(value or b"").hexdigest()
            headers.append(("afterclick.omitted_bytes", str(len(value or b"")).encode()))
            headers.append(("afterclick.omitted_sha256", digest.encode()))
            value = None
            key = key if key is None or len(key) <= KEY_BYTES_MAX else None
        if key is None and value is None:
            value = b""  # kafka-python sends no record without both
        try:
            return self._producer.send(to, key=key, value=value, headers=headers)
        except MessageSizeTooLargeError:
            if not whole:
                raise
            return self._post(to, topic, partition, letter, whole=False)
