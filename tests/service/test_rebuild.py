"""`afterclick rebuild`: Redis filled from the log equals what the stream left there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import redis

from afterclick.serving.cli import main
from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.keys import partition_of
from afterclick.serving.records import Head, without_stamp
from afterclick.streams.archive import Archive
from afterclick.streams.archiver import archive_once
from afterclick.streams.events import Click, Item
from afterclick.streams.local import readiness
from afterclick.streams.processes import free_port
from afterclick.streams.rebuild import rebuild
from afterclick.streams.refold import Refold
from tests.service.stage import Stage, some_clicks
from tests.service.test_archive import delete_before

pytestmark = [pytest.mark.service, pytest.mark.anybroker]

AS_IT_COMES = {
    "AFTERCLICK_STREAMS__LATENCY_BUDGET_MS": "0",
    "AFTERCLICK_STREAMS__RENEW_USERS_MAX": "0",
}
"""No list put off or renewed: then it is made under the inputs of its click, as a rebuild makes it.
"""

DIES = """
import os, signal, sys
from afterclick.serving.cli import main
from afterclick.serving.store import Store
commit, left = Store.commit, int(sys.argv[1])
def dies(self, *args):
    global left
    left -= 1
    answer = commit(self, *args)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
Store.commit = dies
sys.exit(main(["rebuild", "--jobs", "1"]))
"""
"""`afterclick rebuild` that is killed right after one of its writes."""


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def streamed(stage: Stage, client: redis.Redis) -> Stage:
    """Popularity first, then two releases, the second with states of 16 bits; items, visits,
    repeats, forgets and bad records.
    """
    stage.streams = msgspec.structs.replace(stage.streams, archive=str(stage.folder / "archive"))
    with stage.worker(**AS_IT_COMES) as worker:

        def publish(name: str, number: int) -> None:
            stage.publish(name, seed=number, state_dtype="fp16" if number == 2 else "fp32")
            stage.wait(
                lambda: f'"publication":{number}' in readiness(worker.port)[1].replace(" ", ""),
                "the release is in force",
            )

        stage.send(some_clicks(120))
        stage.wait_folded()
        publish("r1", 1)
        stage.send([Item(item_id=f"fresh{n}", categories=["c1"]) for n in range(5)])
        stage.send([Item(item_id="i00003", available=False)])
        gone = stage.keys.unavailable
        stage.wait(lambda: client.smembers(gone) == {b"i00003"}, "the items are in force")
        stage.send(some_clicks(150, users=30, start=100))
        stage.send_raw(b"u1", b"no JSON")
        stage.send([click("u5", "", "forget"), click("visitor", "", "visit")])
        stage.send([click("u6", f"fresh{n}") for n in range(5)])
        stage.wait_folded()
        publish("r2", 2)
        stage.send(some_clicks(60, users=20, start=300))
        stage.send([click("u9", "", "forget"), click("u9", "i00001")])
        stage.wait_folded()
    return stage


def click(user: str, item: str, event: str = "click") -> Click:
    """At the end of the others' hour."""
    return Click(user_id=user, item_id=item, event=event, timestamp_ms=1_700_000_390_000)


def standing(stage: Stage, client: redis.Redis) -> dict[str, object]:
    """All that rests on the log; without the moment of writing and the batch id."""
    found: dict[str, object] = {}
    for key in client.scan_iter(match=f"*{stage.serving.namespace}*", count=1000):
        name = key.decode()
        if name == stage.keys.fallback or name.endswith(("pop:summary", ":signals")):
            continue  # hints, made by the clock; and what is on its way to others
        kind = client.type(key)
        if kind == b"list":
            found[name] = client.lrange(key, 0, -1)
        elif kind == b"hash":
            found[name] = client.hgetall(key)
        elif kind == b"set":
            found[name] = client.smembers(key)
        else:
            data = client.get(key)
            assert data is not None
            found[name] = without_stamp(data) if ":top:" in name else data
            if name.endswith(":head"):
                head = msgspec.json.decode(data, type=Head)
                found[name] = msgspec.structs.replace(head, batch="")
    return found


def empty(stage: Stage, client: redis.Redis) -> None:
    for key in client.scan_iter(match=f"*{stage.serving.namespace}*", count=1000):
        client.delete(key)


def test_a_rebuild_from_the_archive_s_inputs_equals_the_stream(
    streamed: Stage, client: redis.Redis
) -> None:
    """Byte for byte: records, lists, popularity, inputs, heads; and a worker goes on from there."""
    archive_once(streamed.serving, streamed.streams, Archive(streamed.streams.archive))
    before = standing(streamed, client)
    empty(streamed, client)

    done = rebuild(streamed.serving, streamed.streams)

    after = standing(streamed, client)
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}
    assert after.keys() == before.keys()
    assert (done.partitions, done.new_start, done.skipped) == (2, {}, 0)
    assert client.ttl(streamed.keys.top(0, "visitor")) > 1000
    with streamed.worker():
        streamed.send(some_clicks(40, start=900))
        streamed.wait_folded()
    report = streamed.verify()
    assert report.first_difference is None
    assert report.lists == 41


def test_one_partition_s_lost_head_is_made_good_from_redis_own_inputs(
    streamed: Stage, client: redis.Redis
) -> None:
    """Other partitions stay as they are; what stood under a lost head is not trusted."""
    before = standing(streamed, client)
    head = client.getdel(streamed.keys.head(1))
    assert head is not None
    client.set(streamed.keys.user(1, "stranger"), b"of nobody")
    (stranger,) = (u for u in ("x1", "x2", "x3", "x4") if _partition(streamed, u) == 1)
    client.set(streamed.keys.top(1, stranger), b"{}")
    client.hincrby(streamed.keys.popularity(1, 7), "i1", 5)

    with pytest.raises(ConfigError, match="partitions 0 has a head"):
        rebuild(streamed.serving, streamed.streams, partitions=[0])
    done = rebuild(streamed.serving, streamed.streams)

    assert (done.partitions, done.skipped, done.new_start) == (1, 1, {})
    assert standing(streamed, client) == before


def _partition(stage: Stage, user: str) -> int:
    return partition_of(user, 2)


def run_dying(stage: Stage, writes: int) -> int:
    """`afterclick rebuild`, killed after so many writes; its exit code."""
    argv = [sys.executable, "-c", DIES, str(writes)]
    env = {**os.environ, **stage.env}
    return subprocess.run(argv, env=env, cwd=stage.folder, check=False).returncode


def test_workers_wait_while_a_rebuild_is_half_done_and_go_on_by_themselves(
    streamed: Stage, client: redis.Redis
) -> None:
    """A killed rebuild leaves nothing that anybody would fold on; the next one takes it over."""
    archive_once(streamed.serving, streamed.streams, Archive(streamed.streams.archive))
    before = standing(streamed, client)
    empty(streamed, client)

    codes = [run_dying(streamed, writes) for writes in (1, 3, 8)]
    assert codes == [-signal.SIGKILL] * 3
    with pytest.raises(UnavailableError, match="held: rebuild"):
        streamed.verify()
    streamed.send(some_clicks(40, start=900))
    port = free_port()
    seen = []

    def rebuild_once_it_waits() -> None:
        words = "held: rebuild, its inputs list written anew"
        streamed.wait(lambda: words in readiness(port)[1], "the worker names who holds")
        seen.append(readiness(port)[0])
        rebuild(streamed.serving, streamed.streams)

    with ThreadPoolExecutor(1) as threads:
        rebuilding = threads.submit(rebuild_once_it_waits)
        with streamed.worker(AFTERCLICK_STREAMS__PORT=str(port)):
            streamed.wait_folded()
        rebuilding.result()
    assert seen == [False]
    report = streamed.verify()
    assert report.first_difference is None
    assert (report.behind, report.lists) == (0, 41)
    inputs = streamed.keys.inputs(0)
    assert standing(streamed, client)[inputs][: len(before[inputs])] == before[inputs]


def test_a_rebuild_that_was_overtaken_writes_nothing_more(
    streamed: Stage, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped for a while, another one did the work: the late one must not write over workers."""
    before = standing(streamed, client)
    fold = Refold.run_to
    first = [True]

    def overtaken(self: Refold, *args: object) -> None:
        fold(self, *args)  # type: ignore[arg-type]
        if first.pop() if first else False:
            rebuild(streamed.serving, streamed.streams)
            with streamed.worker(**AS_IT_COMES):
                streamed.send(some_clicks(40, start=900))
                streamed.wait_folded()

    for partition in (0, 1):
        client.delete(streamed.keys.head(partition))
    with monkeypatch.context() as patched:
        patched.setattr(Refold, "run_to", overtaken)
        with pytest.raises(UnavailableError, match="another rebuild took over"):
            rebuild(streamed.serving, streamed.streams)

    assert standing(streamed, client).keys() >= before.keys()
    report = streamed.verify()
    assert (report.first_difference, report.behind) == (None, 0)


def test_replace_takes_partitions_from_workers_and_gives_back_what_it_cannot_rebuild(
    streamed: Stage, client: redis.Redis
) -> None:
    """A damaged record is made good under running workers; without its releases nothing moves."""
    before = standing(streamed, client)
    client.set(streamed.keys.user(0, "u30"), b"damaged")
    with streamed.worker(**AS_IT_COMES):
        folder = streamed.folder / "releases" / "r1"
        folder.rename(folder.with_name("hidden"))
        with pytest.raises(ContractError, match="no release 'r1'"):
            rebuild(streamed.serving, streamed.streams, replace=True)
        assert all(not held for held in _holds(streamed, client))
        folder.with_name("hidden").rename(folder)
        done = rebuild(streamed.serving, streamed.streams, replace=True)
        streamed.send(some_clicks(10, start=900))
        streamed.wait_folded()
    assert (done.partitions, done.new_start) == (2, {})
    assert standing(streamed, client).keys() == before.keys()
    assert streamed.verify().first_difference is None


def _holds(stage: Stage, client: redis.Redis) -> list[str]:
    heads = [client.get(stage.keys.head(partition)) for partition in (0, 1)]
    return [msgspec.json.decode(head or b"{}", type=Head).hold for head in heads]


def test_without_an_inputs_list_it_is_a_new_start_and_says_so(
    streamed: Stage,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nobody knows what the past was folded with: the newest release is what is left."""
    for name, value in streamed.env.items():
        monkeypatch.setenv(name, value)
    empty(streamed, client)

    assert main(["rebuild", "--json"]) == 0

    out, err = capfd.readouterr()
    done = json.loads(out.splitlines()[-1])
    assert done["new_start"].keys() == {"0", "1"}
    assert "this is a new start" in err
    report = streamed.verify()
    assert report.first_difference is None
    assert (report.behind, report.lists) == (0, 41)
    assert main(["rebuild"]) == 2
    assert main(["rebuild", "--partition", "2"]) == 2


def test_a_namespace_whose_users_were_moved_is_refused_even_if_only_the_archive_knows(
    stage: Stage,
) -> None:
    """One user's clicks stand in two partitions then: folded apart, the older list could win."""
    stage.streams = msgspec.structs.replace(stage.streams, archive=str(stage.folder / "archive"))
    stage.send(some_clicks(10))
    archive = Archive(stage.streams.archive)
    archive.place.replace(f"inputs/{stage.serving.namespace}/e1/p00000.jsonl", b"")

    with pytest.raises(ConfigError, match="in an epoch after the first"):
        rebuild(stage.serving, stage.streams)
    assert stage.heads() == {0: 0, 1: 0}


@pytest.mark.kafka
def test_what_kafka_dropped_comes_from_the_archive_and_a_forgotten_user_stays_forgotten(
    streamed: Stage, client: redis.Redis
) -> None:
    """The archive outlives the log, and a rebuild from it must not bring anybody back."""
    archive = Archive(streamed.streams.archive)
    done = archive_once(streamed.serving, streamed.streams, archive)
    assert done.redacted > 0
    before = standing(streamed, client)
    delete_before(streamed, streamed.ends())
    empty(streamed, client)

    rebuilt = rebuild(streamed.serving, streamed.streams)

    after = standing(streamed, client)
    u5 = {name for name in after if name.endswith(":u5")}
    assert u5 == {name for name in before if name.endswith(":u5")}
    assert rebuilt.new_start == {}
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    # Popularity has lost the redacted clicks, and with them the lists made from it and the counts.
    assert all(":pop:" in n or n.endswith(":head") or _popular(before[n]) for n in changed)
    with streamed.worker():
        streamed.send(some_clicks(40, start=900))
        streamed.wait_folded()
    report = streamed.verify()
    assert report.first_difference is None
    assert report.redacted > 0


def _popular(body: object) -> bool:
    return isinstance(body, bytes) and b'"source":"popularity"' in body
