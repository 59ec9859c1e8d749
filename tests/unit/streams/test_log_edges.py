"""A head and a log that do not fit together: refused by name, or counted, never folded on."""

import itertools
from typing import Any

import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.events import Click
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges, Record, record_crc
from afterclick.streams.replica import Replica
from tests.doubles import log_of

SERVING = Serving(0, "", "", None, Catalog.empty())


def fold_on(store: Replica, *, start: int = 0, accept_loss: bool = False) -> PartitionFold:
    """A fold whose log starts at `start` from its second request on."""
    return PartitionFold(
        0,
        store,
        ListRules.of(ServingSettings(k=3, margin=0)),
        Limits(users_max=256, records_max=1024, bytes_max=1 << 20),
        serving=lambda: SERVING,
        dead_letters=lambda letters: None,
        log_start=lambda: start,
        batch_ids=(f"b{n}-{id(store)}" for n in itertools.count()),
        accept_loss=accept_loss,
    )


def clicks(num: int, *, start: int = 0) -> list[Record]:
    return log_of([Click(user_id="u", item_id=f"i{start + n}") for n in range(num)], start=start)


@pytest.fixture
def store() -> Replica:
    """Ten clicks of topic t, folded."""
    store = Replica()
    fold = fold_on(store)
    fold.open(LogEdges("t", 0, 10), lambda offset: None)
    fold.process(Chunk(0, 10, clicks(10)))
    return store


LAST_CRC = record_crc(clicks(10)[-1].key, clicks(10)[-1].value)


@pytest.mark.parametrize(
    ("edges", "crc", "reason"),
    [
        (LogEdges("t2", 0, 10), LAST_CRC, "topic-recreated"),
        (LogEdges("t", 0, 9), LAST_CRC, "head-past-end"),
        (LogEdges("t", 13, 20), None, "head-before-start"),
        (LogEdges("t", 0, 20), LAST_CRC ^ 1, "log-changed"),
    ],
)
def test_a_head_that_does_not_belong_to_the_log_is_refused_by_name(
    store: Replica, edges: LogEdges, crc: int | None, reason: str
) -> None:
    """Each would give records that no replay of this log gives; nothing is written."""
    before = store.heads[0]

    with pytest.raises(ContractError, match="partition 0") as caught:
        fold_on(store).open(edges, lambda offset: crc)

    assert caught.value.reason == reason
    assert store.heads[0] == before


@pytest.mark.parametrize(
    ("edges", "crc"),
    [
        (LogEdges("t", 0, 10), LAST_CRC),
        (LogEdges("t", 10, 10), None),
        (LogEdges("t", 4, 11), LAST_CRC),
        (LogEdges("", 0, 10), LAST_CRC),
        (LogEdges("t", 0, 10), None),
    ],
    ids=["the same", "retention took all", "retention took some", "no topic ids", "record gone"],
)
def test_a_log_that_still_fits_is_folded_on(
    store: Replica, edges: LogEdges, crc: int | None
) -> None:
    """Retention up to the head, and brokers without topic ids, are everyday."""
    assert fold_on(store).open(edges, lambda offset: crc) == 10


def test_lost_records_are_gone_past_and_counted_only_where_that_was_asked_for(
    store: Replica,
) -> None:
    """The operator's word `ACCEPT_LOSS`, not ours; how many is known from then on."""
    fold = fold_on(store, start=13, accept_loss=True)

    assert fold.open(LogEdges("t", 13, 20), lambda offset: None) == 13
    fold.process(Chunk(13, 14, clicks(1, start=13)))

    assert (fold.lost_records, fold.position) == (3, 14)


def gappy(*pieces: tuple[int, int]) -> Chunk:
    """A chunk from 10 on, of records [start, stop) each."""
    records = [r for start, stop in pieces for r in clicks(stop - start, start=start)]
    return Chunk(10, records[-1].offset + 1, records)


@pytest.mark.parametrize("pieces", [[(15, 20)], [(10, 12), (15, 20)], [(10, 11), (12, 13)]])
def test_gaps_of_markers_and_compaction_are_gone_past(store: Replica, pieces: Any) -> None:
    """The log still starts below them: nothing was dropped."""
    fold = fold_on(store, start=10)
    fold.open(LogEdges("t", 0, 20), lambda offset: None)

    chunk = gappy(*pieces)
    fold.process(chunk)

    assert (fold.lost_records, fold.position) == (0, chunk.end)


@pytest.mark.parametrize(
    ("pieces", "lost"), [([(15, 20)], 5), ([(10, 12), (15, 20)], 3)], ids=["front", "middle"]
)
def test_a_gap_that_retention_made_is_refused_or_counted(
    store: Replica, pieces: Any, lost: int
) -> None:
    """Also between two fetches that were put together: the second one began after records that
    nobody folded.
    """
    refusing = fold_on(store, start=15)
    refusing.open(LogEdges("t", 0, 20), lambda offset: None)
    with pytest.raises(ContractError, match=f": {lost} records were dropped") as caught:
        refusing.process(gappy(*pieces))
    assert caught.value.reason == "head-before-start"
    assert refusing.position == 10

    counting = fold_on(store, start=15, accept_loss=True)
    counting.open(LogEdges("t", 0, 20), lambda offset: None)
    counting.process(gappy(*pieces))
    assert (counting.lost_records, counting.position) == (lost, 20)
