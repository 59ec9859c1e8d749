"""What workers tell each other by topic `signals`, on the run's broker and Redis."""

import itertools
from collections.abc import Sequence

import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.memory import Move
from afterclick.serving.settings import ListRules
from afterclick.streams.log import LogReader
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges
from afterclick.streams.replica import Replica
from afterclick.streams.signals import Absorber, decode_parcel
from tests.service.stage import Stage, some_clicks

pytestmark = pytest.mark.service


class Kept:
    """A memory that keeps everything."""

    def __init__(self) -> None:
        self.moves: list[Move] = []

    def absorb(self, moves: Sequence[Move]) -> None:
        self.moves += moves


def absorbed(stage: Stage) -> list[Move]:
    """What the topic tells by now."""
    reader, kept = LogReader(stage.streams), Kept()
    absorber = Absorber(kept, namespace=stage.serving.namespace, known={}, offset=0)
    start, end = reader.edges(stage.streams.signals_topic, 0)
    for records in reader.read(stage.streams.signals_topic, 0, start, end):
        absorber.take(absorber.sift(records))
    reader.close()
    return kept.moves


def counted(stage: Stage) -> list[Move]:
    """What an offline fold of the log counts."""
    reader, moves = LogReader(stage.streams), list[Move]()
    topic, serving = stage.streams.clicks_topic, Serving(0, "", "", None, Catalog.empty())
    for partition, end in stage.ends().items():
        replica = Replica()
        fold = PartitionFold(
            partition,
            replica,
            ListRules.of(stage.serving),
            Limits(1000, 1000, 1 << 20),
            serving=lambda: serving,
            dead_letters=lambda _: None,
            log_start=lambda: 0,
            batch_ids=(str(n) for n in itertools.count()),
        )
        fold.open(LogEdges("", 0, end), lambda _: None)
        for records in reader.read(topic, partition, 0, end):
            fold.process(Chunk(fold.position, records[-1].offset + 1, records))
        for written in replica.signals.get(partition, []):
            moves += [move for _, move in decode_parcel(written.packed).moves]
    reader.close()
    return moves


def num_waiting(stage: Stage) -> int:
    store = stage.store()
    num = sum(store.num_waiting_signals(partition) for partition in stage.ends())
    store.close()
    return num


def test_a_worker_killed_between_commit_and_publication_loses_and_doubles_nothing(
    stage: Stage,
) -> None:
    """The moves stand in Redis from the moment when the clicks count, whoever publishes them."""
    stage.send(some_clicks(300))
    with stage.worker(AFTERCLICK_STREAMS__SIGNALS_EVERY_MS="60000") as worker:
        stage.wait_folded()
        worker.process.kill()
    assert num_waiting(stage) > 0
    assert absorbed(stage) == []
    stage.send(some_clicks(100, start=300))
    with stage.worker(AFTERCLICK_STREAMS__SIGNALS_EVERY_MS="10"):
        stage.wait_folded()
        stage.wait(lambda: num_waiting(stage) == 0, "all moves are published")
    assert sorted(absorbed(stage)) == sorted(counted(stage))
    assert len(counted(stage)) == 400
