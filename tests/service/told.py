"""Moves of topic `signals`, as a worker hears them and as the log has them."""

from collections.abc import Sequence

from afterclick.serving.catalog import Catalog
from afterclick.serving.memory import Move
from afterclick.streams.log import LogReader
from afterclick.streams.partition import Serving
from afterclick.streams.record import Chunk, LogEdges
from afterclick.streams.replica import Replica
from afterclick.streams.signals import Absorber, decode_parcel
from tests.service.stage import Stage, fold_by_hand


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
        fold = fold_by_hand(stage, partition, replica, serving, LogEdges("", 0, end))
        for records in reader.read(topic, partition, 0, end):
            fold.process(Chunk(fold.position, records[-1].offset + 1, records))
        for written in replica.signals.get(partition, []):
            moves += [move for _, move in decode_parcel(written.packed).moves]
    reader.close()
    return moves


def num_waiting(stage: Stage) -> int:
    """Chunks whose moves are folded and not told yet."""
    store = stage.store()
    num = sum(store.num_waiting_signals(partition) for partition in stage.ends())
    store.close()
    return num
