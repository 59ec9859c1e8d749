"""Small steps through a topic are the log's own, and few of them ask it."""

from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afterclick.streams import feed
from afterclick.streams.feed import ReadAhead
from afterclick.streams.record import Record


class Log:
    """Records with gaps between their offsets, every second one of each partition; says how often
    it is read.
    """

    def __init__(self, offsets: list[int], end: int) -> None:
        self.records = [Record(offset, 0, b"k", b"v") for offset in offsets]
        self.end = end
        self.reads = 0

    def edges(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, self.end

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[list[Record]]:
        self.reads += 1
        found = [
            record
            for record in self.records
            if start <= record.offset < stop and (record.offset + partition) % 2 == 0
        ]
        for at in range(0, len(found), 3):
            yield found[at : at + 3]


def offsets_of(log: Log | ReadAhead, partition: int, start: int, stop: int) -> list[int]:
    return [r.offset for records in log.read("items", partition, start, stop) for r in records]


@example({2}, [(0, 1, 1), (0, 3, 0), (0, 2, 1)], 2)
@given(
    st.sets(st.integers(0, 60)),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), st.integers(0, 20)), max_size=12),
    st.integers(1, 30),
)
def test_every_range_is_read_as_from_the_log(
    offsets: set[int], steps: list[tuple[int, int, int]], ahead: int
) -> None:
    """Forward, with holes between the steps, and back again, of two partitions; whatever is fetched
    at once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "AHEAD_RECORDS", ahead)
        log = Log(sorted(offsets), 61)
        reader = ReadAhead(log)
        for partition, start, size in steps:
            stop = min(start + size, 61)
            expected = offsets_of(log, partition, start, stop)
            assert offsets_of(reader, partition, start, stop) == expected


def test_steps_forward_share_a_fetch() -> None:
    """A thousand lists of a live stream, and changes of its items, are a thousand steps."""
    log = Log(list(range(1000)), 1000)
    reader = ReadAhead(log)
    for at in range(1000):
        assert offsets_of(reader, at % 2, at, at + 1) == [at]
    assert log.reads == 2


def test_a_topic_that_grew_is_asked_again() -> None:
    """What was its end is none any more."""
    log = Log([0, 1], 2)
    reader = ReadAhead(log)
    assert offsets_of(reader, 0, 0, 2) == [0]
    log.records.append(Record(2, 0, b"k", b"v"))
    log.end = 3
    assert offsets_of(reader, 0, 2, 3) == [2]
