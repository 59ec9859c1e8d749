"""The worker on a Redis Cluster of three masters: the same promises, and one master that dies."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from afterclick.serving.connection import connect
from afterclick.streams.local import Worker, readiness
from afterclick.streams.local_cluster import LocalCluster, local_redis_cluster
from afterclick.streams.settings import StreamsSettings
from tests.service.stage import Stage, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]

PARTITIONS = 8
"""So that each of the three masters has some, and more than a worker here has fold threads."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with local_redis_cluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
def stage(
    topics: StreamsSettings, cluster: LocalCluster, namespace: str, tmp_path: Path
) -> Iterator[Stage]:
    stage = Stage(topics, cluster.url, namespace, tmp_path, layout="cluster")
    yield stage
    stage.close()


@pytest.mark.parametrize("topics", [(PARTITIONS, 1)], indirect=True)
def test_a_killed_worker_on_a_cluster_loses_and_doubles_nothing(stage: Stage) -> None:
    """Head, records and lists of a partition stand in one slot: the fence is the same."""
    stage.publish("r1", seed=1)
    with stage.worker() as one, stage.worker():
        stage.send(some_clicks(300, users=100))
        stage.wait_folded()
        stage.send(some_clicks(300, users=100, start=300))
        one.kill()
        stage.send(some_clicks(300, users=100, start=600))
        stage.wait_folded()
    report = stage.verify()
    assert report.first_difference is None
    assert (report.records, report.lists, report.clicks) == (100, 100, 900)
    with stage.reader() as reader:
        tops = reader.get_many([f"u{n}" for n in range(100)])
    assert all(top.source == "model" and top.items for top in tops)


def ready_ones(worker: Worker) -> set[int]:
    """Partitions that /readyz calls ready."""
    page = json.loads(readiness(worker.port)[1])["partitions"]
    return {int(p) for p, held in page.items() if held["state"] == "ready"}


@pytest.mark.parametrize("topics", [(PARTITIONS, 1)], indirect=True)
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_master_away_stops_only_its_own_partitions(
    stage: Stage, cluster: LocalCluster, how: str
) -> None:
    """The others fold on; when it is back, what its append-only file lost is folded again."""
    stage.publish("r1", seed=1)
    homes = {p: cluster.master_of(stage.keys.head(p)) for p in range(PARTITIONS)}
    dead = max(cluster.masters, key=lambda m: sum(home is m for home in homes.values()))
    away = {p for p, home in homes.items() if home is dead}
    assert len(away) > 2
    with stage.worker() as worker:
        stage.send(some_clicks(200, users=100))
        stage.wait_folded()
        # Clicks keep coming, so that writes are in flight when it happens.
        done = threading.Event()
        sent = [200]

        def load() -> None:
            while not done.is_set():
                stage.send(some_clicks(20, users=100, start=sent[0]))
                sent[0] += 20
                done.wait(0.02)

        sender = threading.Thread(target=load)
        sender.start()
        try:
            reader = stage.head_reader()  # while all live: meta may stand on the one that dies
            getattr(dead, how)()
            ends = stage.ends()
            stage.wait(
                lambda: all(reader(p) >= ends[p] for p in homes.keys() - away),
                "the living masters' partitions fold on",
            )
            stage.wait(
                lambda: ready_ones(worker) == homes.keys() - away,
                "only the dead master's partitions wait",
            )
        finally:
            done.set()
            sender.join()
        if how == "kill":
            dead.start()
        else:
            dead.resume()
        cluster.wait_until_whole()
        stage.wait_folded()
        stage.wait(lambda: readiness(worker.port)[0], "ready again")
    report = stage.verify()
    assert report.first_difference is None
    assert report.clicks == sent[0]


@pytest.mark.parametrize("topics", [(PARTITIONS, 1)], indirect=True)
def test_a_failover_that_loses_writes_loses_no_click(
    topics: StreamsSettings, namespace: str, tmp_path: Path
) -> None:
    """A replica takes over without the newest writes: heads and records go back together, and the
    log is folded again from there.
    """
    with local_redis_cluster(tmp_path / "cluster", replicas=1) as cluster:
        stage = Stage(topics, cluster.url, namespace, tmp_path, layout="cluster")
        stage.publish("r1", seed=1)
        homes = {p: cluster.master_of(stage.keys.head(p)) for p in range(PARTITIONS)}
        dead = cluster.masters[0]
        away = {p for p, home in homes.items() if home is dead}
        assert away
        with stage.worker() as worker:
            stage.send(some_clicks(200, users=100))
            stage.wait_folded()
            replica = cluster.cut_off_replica(dead)
            stage.send(some_clicks(200, users=100, start=200))
            stage.wait_folded()
            with connect(dead.url) as client:
                written = {p: client.get(stage.keys.head(p)) for p in away}
            with connect(replica.url) as client:
                client.readonly()
                heard = {p: client.get(stage.keys.head(p)) for p in away}
            assert all(heard[p] != written[p] for p in away), "writes that nobody else has"
            dead.kill()
            stage.wait(
                lambda: cluster.master_of(stage.keys.head(min(away))) is replica, "the takeover"
            )
            stage.wait_folded()
            stage.send(some_clicks(100, users=100, start=400))
            stage.wait_folded()
            stage.wait(lambda: readiness(worker.port)[0], "ready again")
        report = stage.verify()
        stage.close()
    assert report.first_difference is None
    assert report.clicks == 500
