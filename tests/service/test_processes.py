"""`afterclick worker --processes`: several workers under one command."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from kafka.admin import KafkaAdminClient

from afterclick.streams.admin import client_config
from afterclick.streams.local import Worker, afterclick_argv, readiness
from afterclick.streams.processes import Process
from tests.service.stage import Stage, some_clicks

pytestmark = pytest.mark.service

NUM = 2


def children_of(pid: int) -> list[int]:
    """Running processes that it started and that are workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == pid and state != "Z" and b"afterclick" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def places_of(stage: Stage) -> dict[str, str]:
    """What each static member of the group holds, as Kafka says."""
    with contextlib.closing(KafkaAdminClient(**client_config(stage.streams))) as admin:
        (group,) = admin.describe_groups([stage.streams.group]).values()
    return {
        member["group_instance_id"]: str(member["member_assignment"]) for member in group["members"]
    }


@contextlib.contextmanager
def several(stage: Stage, num: int = NUM) -> Iterator[Worker]:
    with stage.worker(AFTERCLICK_STREAMS__PROCESSES=str(num)) as worker:
        yield worker


@pytest.mark.kafka
def test_they_share_the_clicks_and_one_that_dies_comes_back(stage: Stage) -> None:
    """Each is ready on its own port; after kill -9 of one nothing is lost and it runs again. On
    tansu, under load, the group now and then stood for more than a minute afterwards.
    """
    stage.publish("first", seed=1)
    with several(stage) as worker:
        assert len(worker.ports) == NUM
        assert worker.ports[0] == worker.port
        before = children_of(worker.process.pid)
        assert len(before) == NUM
        clicks = some_clicks(40)
        stage.send(clicks[:20])
        stage.wait_folded()

        os.kill(before[1], signal.SIGKILL)
        stage.send(clicks[20:])
        stage.wait(lambda: len(children_of(worker.process.pid)) == NUM, "two that run")
        stage.wait(lambda: all(readiness(port)[0] for port in worker.ports), "both ready")
        stage.wait_folded()
        after = children_of(worker.process.pid)
        assert before[0] in after, "the other one was left alone"
        assert before[1] not in after
        assert "ended by itself with -9; started again in 1 s" in worker.process.tail()

        assert worker.process.terminate(30) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in after)
    assert stage.verify().differences == 0


@pytest.mark.kafka
def test_a_place_in_the_group_waits_for_a_killed_process_and_for_none_that_was_stopped(
    stage: Stage,
) -> None:
    """Else every other partition stands until the dead one's session is over, or all of them after
    each deployment; tansu does not let go of static members.
    """
    with several(stage) as worker:
        before = set(places_of(stage))
        assert len(before) == NUM
        os.kill(children_of(worker.process.pid)[1], signal.SIGKILL)
        stage.wait(lambda: len(children_of(worker.process.pid)) == NUM, "two that run")
        stage.wait(lambda: all(readiness(port)[0] for port in worker.ports), "both ready")
        assert set(places_of(stage)) == before
        assert worker.process.terminate(30) == 0
        assert not places_of(stage)


@pytest.mark.kafka
def test_named_by_hand_they_keep_their_places_over_a_restart(stage: Stage) -> None:
    """`INSTANCE`: who comes back within the session goes on where it was, and nobody else of the
    group notices.
    """
    stage.publish("first", seed=1)
    clicks = some_clicks(40)
    stage.streams = msgspec.structs.replace(stage.streams, instance="shop", session_timeout_s=30.0)
    with several(stage) as worker:
        stage.send(clicks[:20])
        stage.wait_folded()
        before = places_of(stage)
        assert sorted(before) == ["shop-0", "shop-1"]
        assert worker.process.terminate(30) == 0
    assert places_of(stage) == before
    stage.send(clicks[20:])
    with several(stage):
        stage.wait_folded()
        assert places_of(stage) == before
    assert stage.verify().differences == 0


def test_none_outlives_a_command_that_is_killed(stage: Stage) -> None:
    """They would hold partitions and ports beside those of the command's next start."""
    with several(stage) as worker:
        members = children_of(worker.process.pid)
        assert len(members) == NUM
        os.kill(worker.process.pid, signal.SIGKILL)
        stage.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in members), "all ended")


@pytest.mark.parametrize(
    ("arguments", "topic", "words"),
    [
        (["--processes", "2", "--port", "0"], "no-such-topic", "afterclick topics create"),
        # The last process takes the port of the first and the number before it.
        (["--processes", "3", "--port", "65534"], "clicks", "--port: expected 0 to 65533"),
    ],
)
def test_what_an_operator_must_change_ends_all(
    stage: Stage, arguments: list[str], topic: str, words: str
) -> None:
    """Started again, they would say the same for ever."""
    process = Process(
        "worker",
        afterclick_argv("worker", *arguments),
        log=stage.folder / "worker.log",
        env={**os.environ, **stage.env, "AFTERCLICK_STREAMS__CLICKS_TOPIC": topic},
    ).start()
    try:
        assert process.wait(60) == 2
        assert words in process.tail()
    finally:
        process.kill()


@pytest.mark.kafka
def test_who_gets_no_partition_says_so_and_stands_by(stage: Stage) -> None:
    """A process more than there are partitions idles for ever: somebody must hear of it. On tansu,
    which forgets static members' ids at every rebalance, three of them never settle.
    """
    stage.publish("first", seed=1)
    with several(stage, 3) as worker:
        stage.send(some_clicks(40))
        stage.wait_folded()
        held = [len(json.loads(readiness(port)[1])["partitions"]) for port in worker.ports]
        assert sorted(held) == [0, 1, 1]
        said = worker.process.log.read_text()
        topic, group = stage.streams.clicks_topic, stage.streams.group
        assert (
            f"no partition of {topic} is left for this worker: it has 2, and as many others of "
            f"group {group} hold them" in said
        )
    assert stage.verify().differences == 0
