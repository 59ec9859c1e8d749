"""How far a command has read a topic, kept as a consumer group's committed offsets.

No member ever joins the group, so nothing is rebalanced: two runs at a time would both read
everything. Knows nothing of what is read.
"""

from typing import Any

from kafka import OffsetAndMetadata, TopicPartition

from afterclick.streams.log import guarded, new_consumer
from afterclick.streams.settings import StreamsSettings


class Bookmark:
    """Offsets of one topic under one group.

    Args:
        settings: where the broker is.
        group: name of the consumer group.
        topic: whose offsets.
    """

    def __init__(self, settings: StreamsSettings, group: str, topic: str) -> None:
        self._settings = settings
        self._topic = topic
        self._consumer: Any = guarded(settings, lambda: new_consumer(settings, group=group))

    def at(self, partition: int) -> int:
        """Where to go on; 0 where nothing was read yet.

        Raises:
            UnavailableError: the broker does not answer.
        """
        tp = TopicPartition(self._topic, partition)
        found = guarded(self._settings, lambda: self._consumer.committed(tp))
        return int(found or 0)

    def move(self, partition: int, offset: int) -> None:
        """Everything below `offset` is done.

        Raises:
            UnavailableError: the broker does not answer.
        """
        tp = TopicPartition(self._topic, partition)
        place = {tp: OffsetAndMetadata(offset, "", -1)}
        guarded(self._settings, lambda: self._consumer.commit(place))

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()
