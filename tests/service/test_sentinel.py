"""The worker and readers behind Redis Sentinel: one URL, whichever server is the primary."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Keys
from afterclick.serving.reader import AsyncTopK, TopK
from afterclick.streams.local import readiness
from afterclick.streams.local_cluster import cut_off_replicas
from afterclick.streams.settings import StreamsSettings
from tests.fault.redis_pair import client, wait_until_level
from tests.lists import a_list
from tests.sentinels import Watched, redis_with_sentinels
from tests.service.stage import Stage, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with redis_with_sentinels(tmp_path / "redis") as watched:
        yield watched


@pytest.fixture
def stage(
    topics: StreamsSettings, watched: Watched, namespace: str, tmp_path: Path
) -> Iterator[Stage]:
    stage = Stage(topics, watched.url, namespace, tmp_path)
    yield stage
    stage.close()


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_failover_that_loses_writes_loses_no_click(
    stage: Stage, watched: Watched, how: str
) -> None:
    """The replica that Sentinel promotes lacks the newest writes. A paused primary wakes up as one
    still, with connections of before, until it is told.
    """
    stage.publish("r1", seed=1)
    primary, replica = watched.servers
    heads = [stage.keys.head(p) for p in stage.ends()]
    with stage.worker() as worker, stage.reader() as reader:
        stage.send(some_clicks(200, users=100))
        stage.wait_folded()
        wait_until_level(replica)
        cut_off_replicas(primary)
        stage.send(some_clicks(200, users=100, start=200))
        stage.wait_folded()
        with client(primary) as one, client(replica) as other:
            assert one.mget(heads) != other.mget(heads), "writes that nobody else has"
        getattr(primary, how)()
        watched.wait_for_primary(replica)
        stage.wait_folded()
        if how == "kill":
            primary.start()
        else:
            primary.resume()
        stage.send(some_clicks(100, users=100, start=400))
        stage.wait_folded()
        stage.wait(lambda: readiness(worker.port)[0], "ready again")
        wait_until_level(primary)  # by now it follows, and took over what it had missed
        tops = reader.get_many([f"u{n}" for n in range(100)])
    report = stage.verify()
    assert report.first_difference is None
    assert (report.lists, report.clicks) == (100, 500)
    assert all(top.source == "model" and top.items for top in tops)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_readers_follow_the_primary(watched: Watched, how: str) -> None:
    """One that was opened before a failover reads on after it, though the Sentinel that it asked
    first is away or hangs.
    """
    key = Keys("afterclick").top(0, "u")
    primary, replica = watched.servers

    async def read_on(aside: AsyncTopK) -> list[str]:
        while True:
            try:
                return (await aside.get("u")).items
            except UnavailableError:
                await asyncio.sleep(0.1)

    async def both() -> None:
        aside = AsyncTopK(watched.url)
        with TopK(watched.url) as top, client(primary) as write:
            write.set(key, a_list("a"))
            assert top.get("u").items == (await aside.get("u")).items == ["a"]
            await asyncio.to_thread(wait_until_level, replica)
            getattr(watched.sentinels[0], how)()
            primary.kill()
            with pytest.raises(UnavailableError, match=r"redis\+sentinel://127.0.0.1:"):
                top.get("u")
            await asyncio.to_thread(watched.wait_for_primary, replica)
            assert top.get("u").items == await read_on(aside) == ["a"]
            with client(replica) as now:
                now.set(key, a_list("b"))
            assert top.get("u").items == ["b"]
        await aside.close()

    asyncio.run(asyncio.wait_for(both(), 120))


def test_a_service_that_no_sentinel_knows_is_named(watched: Watched) -> None:
    """It may come: Sentinel forgets a service only by order."""
    url = watched.url.replace("/shop-lists/", "/shop-list/")
    with TopK(url) as top, pytest.raises(UnavailableError, match="No master found for 'shop-list'"):
        top.get("u")


def test_a_password_of_sentinel_is_one_of_its_own(watched: Watched) -> None:
    """Redis has none here, and must not be sent Sentinel's."""
    for sentinel in watched.sentinels:
        with client(sentinel) as opened:
            # The rights that docs/operations.md names.
            opened.execute_command("ACL SETUSER", "lists", "on", ">hunter2", "+sentinel|masters")
            opened.execute_command("ACL SETUSER", "default", "off")
    with client(watched.servers[0]) as write:
        write.set(Keys("afterclick").top(0, "u"), a_list("a"))
    options = "?sentinel_username=lists&sentinel_password="

    with TopK(watched.url + options + "hunter2") as top:
        assert top.get("u").items == ["a"]
    for url in (watched.url, watched.url + options + "other"):
        with TopK(url) as top, pytest.raises(ConfigError, match="sentinel_password") as caught:
            top.get("u")
        assert "other" not in str(caught.value)
