"""A topic and its archive read as one log: what Kafka dropped comes from the archive.

Has what `LogReader` has of reading, so that verify, rebuild and the trainer take either. Where both
hold
a record the topic's is taken: it is what the worker folded. A hole between them is refused by name.
"""

from collections.abc import Iterator

from afterclick.serving.errors import ContractError
from afterclick.streams.admin import check_topics
from afterclick.streams.archive import Archive
from afterclick.streams.bulk import BulkReader
from afterclick.streams.log import LogReader
from afterclick.streams.record import Record
from afterclick.streams.settings import StreamsSettings


class JoinedLog:
    """Archive, where one is set, and topic; closed by its owner."""

    def __init__(self, settings: StreamsSettings) -> None:
        self.archive = Archive(settings.archive) if settings.archive else None
        self._settings = settings
        self._log = LogReader(settings)
        self._bulk = BulkReader(settings)
        self._ids: dict[str, str] = {}

    def close(self) -> None:
        """Close the connections to Kafka."""
        self._log.close()
        self._bulk.close()

    def num_partitions(self, topic: str) -> int:
        """Partitions of a topic, 0 where it does not exist."""
        return self._log.num_partitions(topic)

    def edges(self, topic: str, partition: int) -> tuple[int, int]:
        """First offset that is still somewhere, and the offset after the topic's last record.

        Raises:
            ContractError: the archive lacks a file.
        """
        start, end = self._log.edges(topic, partition)
        held = self.archive.edges(topic, partition) if self.archive else None
        return (min(start, held[0]) if held else start), end

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[list[Record]]:
        """Records with start ≤ offset < stop, in batches as they come; gaps are passed over.

        Raises:
            ContractError: a part is in neither of the two, or Kafka drops it while it is read, or
                the archive is of another topic or broken.
            UnavailableError: nothing came in time.
        """
        if start >= stop:
            return
        first = self._log.start(topic, partition)
        if start < first and self.archive is not None:
            held = self.archive.edges(topic, partition) or (first, first)
            if held[0] > start or held[1] < min(stop, first):
                raise self._hole(topic, partition, start, first, f"it holds {held[0]} to {held[1]}")
            upto = min(stop, first)
            yield from self.archive.read(
                topic, partition, start, upto, topic_id=self._topic_id(topic)
            )
            start = upto
        elif start < first:
            raise self._hole(topic, partition, start, first, "there is no archive")
        yield from self._bulk.read(topic, partition, start, stop)

    def redacted(self, topic: str, partition: int, start: int) -> int:
        """Clicks of forgotten users from an offset on that nobody has any more, at most."""
        first = self._log.start(topic, partition)
        if self.archive is None or start >= first:
            return 0
        return self.archive.redacted(topic, partition, start, first)

    def at(self, topic: str, partition: int, offset: int) -> Record | None:
        """One record, None where it is gone."""
        return self._log.at(topic, partition, offset)

    def _topic_id(self, topic: str) -> str:
        if not self._ids:
            topics = check_topics(self._settings)
            self._ids = {
                self._settings.clicks_topic: topics.clicks_id,
                self._settings.items_topic: topics.items_id,
            }
        return self._ids.get(topic, "")

    def _hole(
        self, topic: str, partition: int, start: int, first: int, words: str
    ) -> ContractError:
        return ContractError(
            f"{topic}/{partition}: the records from offset {start} are needed, the topic starts at "
            f"{first}; archive {self._settings.archive or '(AFTERCLICK_STREAMS__ARCHIVE unset)'}: "
            f"{words}",
            reason="log-truncated",
        )
