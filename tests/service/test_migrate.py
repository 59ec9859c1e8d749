"""Users move to other partitions: more of them, another topic, one created anew."""

import contextlib
import itertools
import json
import signal
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from kafka.admin import KafkaAdminClient

from afterclick.serving import epochs
from afterclick.serving.epochs import Carried, EpochStore
from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Keys, Layout, partition_of
from afterclick.serving.records import Head, TopList, without_stamp
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.store import Due, Store, UserWrite
from afterclick.streams.admin import check_topics, client_config, create_topics, topic_id
from afterclick.streams.events import Click
from afterclick.streams.local import afterclick_argv, readiness
from afterclick.streams.migrate import drop_old, migrate
from afterclick.streams.namespace import new_store
from afterclick.streams.partition import Serving
from afterclick.streams.processes import free_port
from afterclick.streams.rebuild import rebuild
from afterclick.streams.record import LogEdges
from afterclick.streams.replica import Replica
from afterclick.streams.settings import StreamsSettings
from tests.doubles import cut, damaged, log_of
from tests.service.stage import Stage, fold_by_hand, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]

USERS = 40


@pytest.fixture
def stage(
    topics: StreamsSettings, place: str, layout: Layout, namespace: str, tmp_path: Path
) -> Iterator[Stage]:
    stage = Stage(topics, place, namespace, tmp_path, layout=layout)
    yield stage
    stage.close()


on_both = pytest.mark.parametrize("layout", ["single", "cluster"], indirect=True)


def add_partitions(stage: Stage, num: int) -> None:
    """As `kafka-topics.sh --alter --partitions` does."""
    admin = KafkaAdminClient(**client_config(stage.streams))
    admin.create_partitions({stage.streams.clicks_topic: num})
    admin.close()
    stage.wait(lambda: check_topics(stage.streams).clicks_partitions == num, "new partitions")
    stage.reconnect()


def folded_alone(stage: Stage, clicks: Iterable[Click]) -> dict[str, bytes]:
    """Every user's record by one plain fold of the clicks in their order, partitions left out."""
    publication = stage.releases.current()
    assert publication is not None
    loaded = LoadedRelease(publication, stage.releases.fetch(publication.release), stage.serving)
    serving = Serving(
        publication.number, publication.release, publication.sha256, loaded, loaded.catalog
    )
    replica = Replica()
    fold = fold_by_hand(stage, 0, replica, serving, LogEdges("", 0, 1 << 40))
    for chunk in cut(log_of(list(clicks)), [64]):
        fold.process(chunk)
    return {user: record for (_, user), record in replica.records.items()}


def records(stage: Stage) -> dict[str, bytes]:
    """Every user's record in Redis, each where the user's next click would look for it."""
    store = stage.store()
    found = {}
    for partition in range(store.keys.partitions):
        for user in store.users(partition):
            assert partition_of(user, store.keys.partitions) == partition
            found[user] = store.read(partition, [user]).records[0] or b""
    store.close()
    return found


def old_store(stage: Stage, partitions: int, epoch: int = 0) -> Store:
    keys = Keys(
        stage.serving.namespace, layout=stage.serving.layout, partitions=partitions, epoch=epoch
    )
    return new_store(stage.serving, keys, Store)


def on_topic(stage: Stage, partitions: int) -> Stage:
    """The same namespace and items, and another clicks topic."""
    topic = f"clicks-{uuid.uuid4().hex[:8]}"
    streams = msgspec.structs.replace(stage.streams, clicks_topic=topic)
    create_topics(streams, partitions=partitions, replication=1)
    serving = stage.serving
    return Stage(streams, serving.redis, serving.namespace, stage.folder, layout=serving.layout)


@pytest.fixture
def moved(stage: Stage) -> Iterator[Stage]:
    """Four partitions instead of two; not migrated yet."""
    moved = on_topic(stage, 4)
    yield moved
    moved.close()


def go_on(stage: Stage, clicks_before: list[Click]) -> None:
    """Clicks in the new epoch, of old users and new ones: every state as if nothing had moved."""
    more = some_clicks(200, users=USERS + 10, start=200)
    with stage.worker(), stage.reader() as reader:
        stage.send(more)
        stage.wait_folded()
        tops = reader.get_many([f"u{n}" for n in range(USERS + 10)])
        assert all(top.source == "model" and top.items for top in tops)
    assert records(stage) == folded_alone(stage, [*clicks_before, *more])
    verified = stage.verify()
    assert verified.first_difference is None
    assert verified.clicks == 200
    assert verified.behind == 0


@pytest.mark.kafka
@on_both
def test_more_partitions_go_on_with_every_users_state(stage: Stage) -> None:
    """The user's next click comes from another partition; the state is there already."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(clicks)
        stage.wait_folded()
    with stage.reader() as reader:
        before = {f"u{n}": reader.get(f"u{n}").items for n in range(USERS)}
        add_partitions(stage, 4)
        report = migrate(stage.serving, stage.streams)
        assert {f"u{n}": reader.get(f"u{n}").items for n in range(USERS)} == before
    assert (report.kind, report.done, report.epoch) == ("partitions", True, 1)
    assert (report.users, report.partitions_before, report.partitions) == (USERS, 2, 4)
    assert migrate(stage.serving, stage.streams).kind == "nothing"
    go_on(stage, clicks)


@pytest.mark.kafka
def test_new_partitions_wait_for_the_migration_and_old_ones_are_folded_on(stage: Stage) -> None:
    """A worker that began to fold them would give their users a second, empty past."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(100, users=USERS))
        stage.wait_folded()
    stage.send(some_clicks(20, users=USERS, start=100))  # nobody folds these before the change
    old_ends = stage.ends()
    add_partitions(stage, 4)
    with pytest.raises(UnavailableError, match="not folded yet"):
        migrate(stage.serving, stage.streams)
    with unready_worker(stage) as port:
        stage.wait(lambda: held_states(port) == ["ready", "ready", "refused", "refused"], "states")
        assert "afterclick migrate" in readiness(port)[1]
        stage.wait(lambda: {p: stage.heads()[p] for p in old_ends} == old_ends, "old ones fold on")
    report = migrate(stage.serving, stage.streams)
    assert report.done
    assert records(stage) == folded_alone(stage, some_clicks(120, users=USERS))


@on_both
def test_another_topic_goes_on_with_every_users_state(stage: Stage, moved: Stage) -> None:
    """Also with another number of partitions; the old topic must be folded to its end."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(clicks[:150])
        stage.wait_folded()
    stage.send(clicks[150:])
    with pytest.raises(UnavailableError, match="records of the old log are not folded yet"):
        migrate(moved.serving, moved.streams)
    with stage.worker():
        stage.wait_folded()
    planned = migrate(moved.serving, moved.streams, dry_run=True)
    assert (planned.kind, planned.done, planned.unfolded) == ("topic", False, {})
    assert records(stage) == folded_alone(stage, clicks), "a dry run changes nothing"
    report = migrate(moved.serving, moved.streams)
    assert (report.kind, report.done, report.users) == ("topic", True, USERS)
    assert records(moved) == folded_alone(moved, clicks)
    go_on(moved, clicks)


def test_fewer_partitions_and_a_second_migration(stage: Stage, moved: Stage) -> None:
    """An epoch begins with whatever the one before came to."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(clicks)
        stage.wait_folded()
    assert migrate(moved.serving, moved.streams).epoch == 1
    third = on_topic(stage, 1)
    assert migrate(third.serving, third.streams).epoch == 2
    go_on(third, clicks)
    third.close()


def test_a_topic_created_anew_goes_on_with_every_users_state(
    stage: Stage, place: str, tmp_path: Path
) -> None:
    """Offsets begin at 0 again; what was folded stays."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(clicks)
        stage.wait_folded()
    admin = KafkaAdminClient(**client_config(stage.streams))
    admin.delete_topics([stage.streams.clicks_topic])
    admin.close()
    stage.wait(lambda: topic_id(stage.streams, stage.streams.clicks_topic) is None, "deletion")
    create_topics(stage.streams, partitions=2, replication=1)
    code, said = ended_worker(stage)
    assert code == 2
    assert "afterclick migrate" in said
    assert "created anew" in said
    report = migrate(stage.serving, stage.streams)
    assert (report.kind, report.starts) == ("recreated", {0: 0, 1: 0})
    go_on(stage, clicks)


STEPS = ("the old epoch is held", "users are carried over", "the new epoch has its heads")


class _Killed(BaseException):
    """Nothing handles it, as nothing handles kill -9."""


@on_both
@pytest.mark.parametrize("point", [*STEPS, "in the middle of the users"])
def test_an_interrupted_migration_changes_nothing_and_may_be_repeated(
    stage: Stage, moved: Stage, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the last step readers see the old epoch; a second run ends as one alone would."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(clicks)
        stage.wait_folded()

    def kill(step: str) -> None:
        if step == point:
            raise _Killed

    with monkeypatch.context() as patch:
        if point not in STEPS:
            patch.setattr(epochs, "BATCH_USERS", 3)
            whole, calls = EpochStore.carry, itertools.count()

            def some(store: EpochStore, partition: int, users: list[Carried]) -> bool:
                if next(calls) == 6:
                    raise _Killed
                return whole(store, partition, users)

            patch.setattr(EpochStore, "carry", some)
        with pytest.raises(_Killed):
            migrate(moved.serving, moved.streams, on_step=kill)
    assert records(stage) == folded_alone(stage, clicks)
    with stage.reader() as reader:
        assert all(reader.get(f"u{n}").source == "model" for n in range(USERS))
    assert migrate(moved.serving, moved.streams).done
    go_on(moved, clicks)


def test_a_migration_killed_by_the_system_may_be_repeated(stage: Stage, moved: Stage) -> None:
    """The same with a real process and a real SIGKILL, at whatever point that was."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(clicks)
        stage.wait_folded()
    process = subprocess.Popen(
        afterclick_argv("migrate"),
        env={**moved.env, "PATH": "/usr/bin:/bin"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stderr is not None
    assert STEPS[0].encode() in process.stderr.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    migrate(moved.serving, moved.streams)
    go_on(moved, clicks)


@on_both
def test_a_zombie_of_the_old_epoch_cannot_write(stage: Stage, moved: Stage) -> None:
    """It sleeps through the migration, wakes up with clicks in hand, and is told to go."""
    clicks = some_clicks(200, users=USERS)
    stage.publish("r1", seed=1)
    with stage.worker() as zombie:
        stage.send(clicks)
        stage.wait_folded()
        zombie.process.pause()
        assert migrate(moved.serving, moved.streams).done
        stage.send(some_clicks(50, users=USERS, start=1000))  # somebody still sends to the old one
        zombie.process.resume()
        stage.wait(lambda: "moved to epoch 1" in readiness(zombie.port)[1], "the zombie says why")
        go_on(moved, clicks)
    held = "moved to epoch 1: restart the workers"
    assert old_heads(stage, 2) == {0: held, 1: held}


@on_both
def test_a_reader_sees_the_new_epoch_where_it_must(stage: Stage, moved: Stage) -> None:
    """Who waits for a click's list asks by the new partition's head, at once."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(200, users=USERS))
        stage.wait_folded()
    with stage.reader() as reader:
        assert sum(reader.folded_to(p) for p in range(2)) == 200
        migrate(moved.serving, moved.streams)
        assert [reader.folded_to(p) for p in range(4)] == [0] * 4
        assert reader.place("u1").partition == partition_of("u1", 4)
        assert ":e1:" in reader.place("u1").record_key


def test_lists_that_are_due_are_due_after_the_move_too(stage: Stage, moved: Stage) -> None:
    """Under load a state goes on without its list; the mark moves with the user."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(100, users=USERS))
        stage.wait_folded()
    store = stage.store()
    partition = partition_of("u3", 2)
    stored, (found,) = store.read_standing(partition, ["u3"])
    head = msgspec.json.decode(stored, type=Head)
    assert found.list_data is not None
    top = msgspec.json.decode(found.list_data, type=TopList)
    late = UserWrite("u3", found.record or b"", b"", Due(top.offset, top.event_ms, 1))
    assert (
        store.commit(
            partition, stored, msgspec.structs.replace(head, batch="late"), None, [late], []
        )
        is None
    )
    store.close()
    migrate(moved.serving, moved.streams)
    store = moved.store()
    partition = partition_of("u3", 4)
    _, (found,) = store.read_standing(partition, ["u3"])
    assert found.due == Due(-1, top.event_ms, 1)
    with moved.worker():
        moved.wait(lambda: not store.due_users(partition, 1), "the list is made")
    store.close()
    assert moved.verify().first_difference is None


def test_the_old_epoch_is_dropped_on_request_and_stays_held(stage: Stage, moved: Stage) -> None:
    """A forgotten user's record must not stay longer than anybody needs it; the fence must."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(200, users=USERS))
        stage.wait_folded()
    with pytest.raises(ConfigError, match="nothing to drop"):
        drop_old(stage.serving)
    migrate(moved.serving, moved.streams)
    store = old_store(stage, 2)
    assert {u for p in range(2) for u in store.users(p)} == {f"u{n}" for n in range(USERS)}
    assert drop_old(stage.serving) > USERS
    assert not any(store.users(p) for p in range(2))
    assert all(store.read(p, []).head for p in range(2))
    store.close()
    assert set(records(moved)) == {f"u{n}" for n in range(USERS)}


def old_heads(stage: Stage, partitions: int) -> dict[int, str]:
    """Why nobody may fold the old partitions."""
    store = old_store(stage, partitions)
    heads = {p: msgspec.json.decode(store.read(p, []).head, type=Head) for p in range(partitions)}
    store.close()
    return {p: head.hold for p, head in heads.items()}


def held_states(port: int) -> list[str]:
    """What /readyz says of each partition, in order."""
    try:
        page = json.loads(readiness(port)[1])["partitions"]
    except ValueError:
        return []
    return [held["state"] for _, held in sorted(page.items())]


def ended_worker(stage: Stage) -> tuple[int, str]:
    """Exit code and words of a worker that must end by itself."""
    done = subprocess.run(
        afterclick_argv("worker"),
        env={"AFTERCLICK_STREAMS__PORT": "0", "PATH": "/usr/bin:/bin", **stage.env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def unready_worker(stage: Stage) -> Iterator[int]:
    """A worker that need not become ready; its port."""
    port = free_port()
    process = subprocess.Popen(
        afterclick_argv("worker"),
        env={**stage.env, "PATH": "/usr/bin:/bin", "AFTERCLICK_STREAMS__PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def test_a_migrated_namespace_is_not_rebuilt_from_its_new_log_alone(
    stage: Stage, moved: Stage
) -> None:
    """The records of the epoch before are not in this log: a rebuild would lose them silently."""
    stage.publish("r1", seed=1)
    with stage.worker():
        stage.send(some_clicks(40, users=USERS))
        stage.wait_folded()
    migrate(moved.serving, moved.streams)
    before = records(moved)
    with pytest.raises(ConfigError, match="is in an epoch after the first"):
        rebuild(moved.serving, moved.streams, replace=True)
    assert records(moved) == before


def test_verify_sees_damage_to_what_was_carried(stage: Stage, moved: Stage) -> None:
    """Users whom nobody touched since are compared with the epoch before, not with themselves."""
    stage.publish("r1", seed=1)
    with stage.worker():
        # Of now: a user of years ago may be missing, because Redis lets such users go.
        clicks = some_clicks(200, users=USERS)
        stage.send(msgspec.structs.replace(click, timestamp_ms=None) for click in clicks)
        stage.wait_folded()
    migrate(moved.serving, moved.streams)
    with moved.worker():
        moved.send(some_clicks(20, users=4, start=200))  # the others stay as they were carried
        moved.wait_folded()
    assert moved.verify().first_difference is None
    store = moved.store()
    partition = partition_of("u30", 4)
    stored, (found,) = store.read_standing(partition, ["u30"])
    head = msgspec.json.decode(stored, type=Head)
    assert found.record is not None
    assert found.list_data is not None
    for record, body, words in (
        (damaged(found.record), found.list_data, "record"),
        (found.record, found.list_data.replace(b'"items":["', b'"items":["x'), "list"),
        (b"", b"", "has none"),
    ):
        write = UserWrite("u30", record, without_stamp(body))
        changed = msgspec.structs.replace(head, batch=words)
        assert store.commit(partition, stored, changed, None, [write], []) is None
        stored = msgspec.json.encode(changed)
        report = moved.verify()
        assert "'u30'" in (report.first_difference or "")
        assert words in (report.first_difference or "")
    store.close()
