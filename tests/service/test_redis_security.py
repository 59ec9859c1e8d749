"""Redis that asks who is there: a worker and readers with the rights of the page and no others."""

import asyncio
import re
import subprocess
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from afterclick.serving.errors import ConfigError
from afterclick.serving.keys import Keys
from afterclick.serving.reader import AsyncTopK, TopK
from afterclick.serving.store import Store
from afterclick.streams.events import Item
from afterclick.streams.local import Redis, afterclick_argv, local_redis
from afterclick.streams.processes import free_port
from afterclick.streams.settings import StreamsSettings
from tests.conftest import ROOT
from tests.pki import Pki, write_pki
from tests.service.stage import Stage, some_clicks

pytestmark = [pytest.mark.service, pytest.mark.anybroker]

WORDS = {"worker": "right-word-4711", "reader": "other-word-0815", "waiter": "third-word-1234"}
WRONG = "wrong-word-2342"
PAGE = ROOT / "docs" / "operations.md"


class Secured(NamedTuple):
    """A Redis with TLS that wants client certificates, and no rights for who has no name."""

    server: Redis
    tls_port: int
    pki: Pki

    def url(self, user: str, word: str | None = None, options: str | None = None) -> str:
        """For one of the users; `word` in place of the right password; options name PEM files."""
        if options is None:
            options = "ssl_ca_certs=AUTHORITY&ssl_certfile=CLIENT"
        for name, path in self.pki._asdict().items():
            options = options.replace(name.upper(), str(path))
        word = WORDS[user] if word is None else word
        return f"rediss://{user}:{word}@127.0.0.1:{self.tls_port}/0?{options}"


def users() -> str:
    """The page's lines as an ACL file; `waiter` is the reader that waits for its own clicks. The
    probe of `local_redis` may PING, and nothing else.
    """
    page = PAGE.read_text()
    lines = dict(re.findall(r"^ +ACL SETUSER (\w+) (on >PASSWORD .*)$", page, re.MULTILINE))
    heads = re.findall(r"~\{afterclick:\[0-9\][^ `]*:head", page)
    assert lines.keys() == {"worker", "reader"}
    assert heads
    lines["waiter"] = f"{lines['reader']} {' '.join(heads)}"
    shown = [f"user {user} {line}".replace("PASSWORD", WORDS[user]) for user, line in lines.items()]
    return "\n".join([*shown, "user default on nopass -@all +ping", ""])


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    pki, tls_port = write_pki(folder), free_port()
    (folder / "users.acl").write_text(users())
    arguments = ["--tls-port", str(tls_port), "--tls-auth-clients", "yes"]
    arguments += ["--tls-cert-file", str(pki.server), "--tls-key-file", str(pki.server)]
    arguments += ["--tls-ca-cert-file", str(pki.authority)]
    arguments += ["--aclfile", str(folder / "users.acl")]
    with local_redis(folder / "redis", arguments=arguments) as server:
        yield Secured(server, tls_port, pki)


@pytest.fixture
def stage(topics: StreamsSettings, secured: Secured, tmp_path: Path) -> Iterator[Stage]:
    """On the namespace that the page's lines name; one test fills it."""
    stage = Stage(topics, secured.url("worker"), "afterclick", tmp_path)
    yield stage
    stage.close()


async def source_of(user: str, url: str) -> str:
    async with AsyncTopK(url) as top_k:
        return (await top_k.get(user)).source


def test_worker_and_readers_need_no_more_rights_than_the_page_gives(
    stage: Stage, secured: Secured
) -> None:
    """Whoever holds the reader's password must not learn what users did."""
    stage.publish("r1", seed=1)
    with stage.worker() as worker, TopK(secured.url("reader")) as top_k:
        stage.send([Item(item_id="i00001", available=False)])
        stage.send(some_clicks(100))
        stage.send_raw(b"u1", b"no JSON")
        stage.wait_folded()
        stage.publish("r2", seed=2)
        stage.send(some_clicks(50, start=100))
        stage.wait_folded()
        stage.wait(lambda: bool(top_k.get("nobody").items), "the fallback list is written")
        pages = [
            urllib.request.urlopen(f"{worker.url}/{path}", timeout=5).read().decode()  # noqa: S310
            for path in ("livez", "readyz", "metrics")
        ]
        assert top_k.get("u7").source == "model"
        partition = top_k.place("u7").partition
    report = stage.verify()
    assert report.first_difference is None
    assert report.clicks == 150

    told = "".join(pages) + worker.process.log.read_text()
    assert not [word for word in WORDS.values() if word in told]
    assert not re.search(r"\bu\d+\b", "".join(pages)), "no user id on the port of the probes"

    reader, waiter = secured.url("reader"), secured.url("waiter")
    record = stage.keys.user(partition, "u7")
    assert asyncio.run(source_of("u7", reader)) == "model"
    with TopK(reader) as top_k, pytest.raises(ConfigError, match=r"docs/operations\.md"):
        top_k.folded_to(partition)
    with TopK(waiter) as top_k:
        assert top_k.folded_to(partition) > 0
    with redis.Redis.from_url(secured.url("worker")) as worker_s:
        worker_s.set("{afterclick:0}:u:x}:head", b"the record of a user called 'x}:head'")
    for url in (reader, waiter):
        with redis.Redis.from_url(url) as client:
            for command in (
                ("GET", record),
                ("MGET", stage.keys.fallback, record),
                ("GET", stage.keys.inputs(partition)),
                ("GET", "{afterclick:0}:u:x}:head"),
                ("GET", "another:top:u7"),
                ("SET", stage.keys.fallback, "x"),
                ("SCAN", "0"),
                ("CONFIG", "GET", "*"),
            ):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.execute_command(*command)


WAYS_IN = [
    pytest.param("worker", WRONG, None, r"AFTERCLICK_SERVING__REDIS_PASSWORD", id="password"),
    pytest.param("waiter", None, None, r"docs/operations\.md", id="rights"),
    pytest.param("worker", None, "", r"CERTIFICATE_VERIFY_FAILED.*ssl_ca_certs", id="system"),
    pytest.param(
        "worker", None, "ssl_ca_certs=STRANGER&ssl_certfile=CLIENT",
        r"CERTIFICATE_VERIFY_FAILED.*ssl_ca_certs", id="stranger",
    ),
    pytest.param(
        "worker", None, "ssl_ca_certs=/absent.pem", r"No such file.*ssl_ca_certs", id="no-file"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("user", "word", "options", "says"), WAYS_IN)
def test_a_wrong_way_in_is_named_to_workers_and_to_readers(
    secured: Secured, user: str, word: str | None, options: str | None, says: str
) -> None:
    """Waiting heals none of them, and what was given stays unsaid."""
    url = secured.url(user, word, options)
    store = Store(url, Keys("elsewhere"), record_ttl_s=60, popularity_ttl_s=60)
    with TopK(url, namespace="elsewhere") as top_k:
        for call in (store.check_server, lambda: top_k.get("u1")):
            with pytest.raises(ConfigError, match=says) as caught:
                call()
            said = "".join(traceback.format_exception(caught.value))
            assert not [secret for secret in (*WORDS.values(), WRONG) if secret in said]
    store.close()


@pytest.mark.parametrize("verb", [("worker",), ("top", "u1")])
def test_a_wrong_password_ends_a_verb_with_2_and_stays_unsaid(
    topics: StreamsSettings, secured: Secured, verb: tuple[str, ...], tmp_path: Path
) -> None:
    """Debug output included: it ends up in log stores that many can read."""
    (tmp_path / "word").write_text(WRONG)
    url = secured.url("worker").replace(f":{WORDS['worker']}@", "@")
    if verb == ("worker",):
        verb += ("--log-level", "debug", "--port", "0")
    done = subprocess.run(
        afterclick_argv(*verb),
        env={
            "PATH": "/usr/bin:/bin",
            "AFTERCLICK_STREAMS__BROKER": topics.broker,
            "AFTERCLICK_STREAMS__CLICKS_TOPIC": topics.clicks_topic,
            "AFTERCLICK_STREAMS__ITEMS_TOPIC": topics.items_topic,
            "AFTERCLICK_STREAMS__SIGNALS_TOPIC": topics.signals_topic,
            "AFTERCLICK_SERVING__REDIS": url,
            "AFTERCLICK_SERVING__REDIS_PASSWORD_FILE": str(tmp_path / "word"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "AFTERCLICK_SERVING__REDIS_PASSWORD" in said
    assert "Traceback" not in said
    assert WRONG not in said
