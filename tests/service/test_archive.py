"""`afterclick archive` on a real broker: killed, repeated, and read with the topic as one log."""

import os
import signal
import subprocess
import sys

import msgspec
import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from afterclick.serving.errors import ContractError, UnavailableError
from afterclick.streams.admin import client_config, create_topics
from afterclick.streams.archive import Archive
from afterclick.streams.archiver import LOCK_NAME, archive_once
from afterclick.streams.events import Click, Item
from afterclick.streams.joined import JoinedLog
from afterclick.streams.log import LogReader
from afterclick.streams.record import Record
from afterclick.training.data import build_log
from afterclick.training.sources import read_topic
from tests.service.stage import Stage, some_clicks

pytestmark = pytest.mark.service

DIES = """
import os, pathlib, signal, sys
from afterclick.serving.cli import main
rename, left = pathlib.Path.replace, int(sys.argv[1])
def dies(self, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.replace = dies
sys.exit(main(["archive"]))
"""
"""`afterclick archive` that is killed between a write and its rename."""


@pytest.fixture
def archive(stage: Stage) -> Archive:
    """An archive that the stage's settings name."""
    root = str(stage.folder / "archive")
    stage.streams = msgspec.structs.replace(stage.streams, archive=root)
    return Archive(root)


def records_of(log: LogReader | JoinedLog | Archive, topic: str, ends: list[int]) -> list[Record]:
    return [
        record
        for partition, end in enumerate(ends)
        for batch in log.read(topic, partition, 0, end)
        for record in batch
    ]


def delete_before(stage: Stage, offsets: dict[int, int], topic: str = "") -> None:
    """Move the log's start, as retention does."""
    admin = KafkaAdminClient(**client_config(stage.streams))
    name = topic or stage.streams.clicks_topic
    admin.delete_records({TopicPartition(name, p): at for p, at in offsets.items()})
    admin.close()


def test_what_is_archived_is_what_the_topics_hold(stage: Stage, archive: Archive) -> None:
    """Raw, in order, with headers; a second round adds only what came since."""
    stage.send([*some_clicks(50), Item(item_id="a"), Item(item_id="b")])
    stage.send_raw(b"u1", b"no JSON")
    first = archive_once(stage.serving, stage.streams, archive)
    again = archive_once(stage.serving, stage.streams, archive)
    stage.send(some_clicks(30, start=50))
    second = archive_once(stage.serving, stage.streams, archive)

    assert (first.records, again.records, second.records) == (53, 0, 30)
    assert again.files == 0
    reader = LogReader(stage.streams)
    for topic in (stage.streams.clicks_topic, stage.streams.items_topic):
        ends = second.ends[topic]
        assert records_of(archive, topic, ends) == records_of(reader, topic, ends)
        assert sum(ends) in (81, 2)
    reader.close()


def test_an_archiver_killed_before_each_rename_loses_and_doubles_nothing(
    stage: Stage, archive: Archive
) -> None:
    """A file is whole or not there, and the names say where to go on."""
    stage.send([*some_clicks(60), Item(item_id="a")])
    stage.send([Click(user_id="u7", event="forget")])
    env = {**os.environ, **stage.env}
    codes = []
    for renames in range(12):
        argv = [sys.executable, "-c", DIES, str(renames % 3)]
        codes.append(subprocess.run(argv, env=env, cwd=stage.folder, check=False).returncode)
        if codes[-1] == 0:
            break

    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 2, codes
    reader = LogReader(stage.streams)
    topic, ends = stage.streams.clicks_topic, list(stage.ends().values())
    kept = [r for r in records_of(reader, topic, ends) if r.key != b"u7" or b"forget" in r.value]
    reader.close()
    assert records_of(archive, topic, ends) == kept
    halves = [path for path in (stage.folder / "archive").rglob(".*") if path.name != LOCK_NAME]
    assert halves == []


def test_one_archiver_works_in_a_folder_at_a_time(stage: Stage, archive: Archive) -> None:
    """Two would do no harm to the records, but one could bring back what the other redacted."""
    with (
        archive.place.lock(LOCK_NAME),
        pytest.raises(UnavailableError, match="another archiver"),
    ):
        archive_once(stage.serving, stage.streams, archive)


def test_the_archive_of_another_topic_of_the_same_name_is_refused(
    stage: Stage, archive: Archive
) -> None:
    """A topic created anew has the same offsets and other clicks."""
    stage.send(some_clicks(20))
    archive_once(stage.serving, stage.streams, archive)
    admin = KafkaAdminClient(**client_config(stage.streams))
    admin.delete_topics([stage.streams.clicks_topic])
    admin.close()
    stage.wait(lambda: _created(stage), "the topic is there again")

    with pytest.raises(ContractError, match="created anew"):
        archive_once(stage.serving, stage.streams, archive)


def _created(stage: Stage) -> bool:
    outcomes = create_topics(stage.streams, partitions=2, replication=1)
    return any(one.created for one in outcomes)


@pytest.fixture
def truncated(stage: Stage, archive: Archive) -> Stage:
    """A log whose first part is in the archive only, folded by a worker under two releases."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(200))
        stage.wait_folded()
        stage.publish("r2", seed=2)
        stage.send([Item(item_id="fresh", categories=["c1"])])
        stage.send(some_clicks(40, start=200))
        stage.send([Click(user_id="u3", event="forget")])
        stage.send(some_clicks(30, start=240))
        stage.wait_folded()
    archive_once(stage.serving, stage.streams, archive)
    return stage


@pytest.mark.kafka
def test_verify_and_training_read_archive_and_topic_as_one_log(truncated: Stage) -> None:
    """Kafka may drop what was archived: nothing that rests on the whole log may notice."""
    stage = truncated
    whole = read_topic(msgspec.structs.replace(stage.streams, archive=""))
    delete_before(stage, {p: end // 2 for p, end in stage.ends().items()})

    report = stage.verify()
    joined = read_topic(stage.streams)

    assert report.first_difference is None
    assert (report.behind, report.lists) == (0, 40)
    assert report.redacted > 0
    before, after = (build_log(s.columns, history=50) for s in (whole, joined))
    assert after.item_ids == before.item_ids
    assert (after.sequences.item_P == before.sequences.item_P).all()
    assert joined.snapshot.offsets == whole.snapshot.offsets
    bare = msgspec.structs.replace(stage.streams, archive="")
    with pytest.raises(ContractError, match="log now starts at"):
        Stage.verify(_with(stage, bare))


@pytest.mark.kafka
def test_a_hole_between_archive_and_topic_is_refused_by_everybody(
    truncated: Stage, archive: Archive
) -> None:
    """Records that nobody has cannot be folded, archived over or learnt."""
    stage = truncated
    stage.send(some_clicks(60, start=300))
    delete_before(stage, {p: end - 3 for p, end in stage.ends().items()})

    with pytest.raises(ContractError, match="dropped in between"):
        archive_once(stage.serving, stage.streams, archive)
    with pytest.raises(ContractError, match="the topic starts at"):
        read_topic(stage.streams)


@pytest.mark.kafka
def test_transactions_leave_gaps_and_markers_and_no_hole(stage: Stage, archive: Archive) -> None:
    """Markers take offsets, aborted records take some, and both may end the log."""
    topic = stage.streams.clicks_topic
    producer = KafkaProducer(**client_config(stage.streams), transactional_id=f"t-{topic}")
    producer.init_transactions()
    for round_number in range(6):
        producer.begin_transaction()
        for n in range(7):
            producer.send(topic, key=b"k", value=b"%d-%d" % (round_number, n), partition=0)
        producer.flush()
        if round_number % 2:
            producer.abort_transaction()
        else:
            producer.commit_transaction()
        archive_once(stage.serving, stage.streams, archive)
    producer.close()

    end = stage.ends()[0]
    joined = JoinedLog(msgspec.structs.replace(stage.streams, archive=""))
    values = [record.value for record in records_of(joined, topic, [end])]
    joined.close()
    assert values == [b"%d-%d" % (n, m) for n in (0, 2, 4) for m in range(7)]
    assert [record.value for record in records_of(archive, topic, [end])] == values
    assert archive.edges(topic, 0) == (0, 5 * 8 - 1)


def _with(stage: Stage, streams: object) -> Stage:
    stage.streams = streams  # type: ignore[assignment]
    return stage
