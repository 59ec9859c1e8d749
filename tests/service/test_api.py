"""`afterclick api` as a process of its own, over real HTTP, beside a real Redis."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import redis

from afterclick.serving.keys import Keys
from afterclick.serving.reader import TopK
from afterclick.streams.local import Redis, afterclick_argv, local_redis
from afterclick.streams.processes import free_port
from tests.lists import a_list

pytestmark = pytest.mark.service

WAIT_S = 60.0
"""Longest wait for a process that starts in a second: two cores may be busy."""


class Answer(NamedTuple):
    status: int
    headers: Any
    body: Any


class Api:
    """One running process."""

    def __init__(self, port: int, process: "subprocess.Popen[str]") -> None:
        self.port = port
        self.process = process

    def get(self, path: str) -> Answer:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as found:
                return Answer(found.status, found.headers, found.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read().decode())

    def ask(self, path: str) -> Any:
        answer = self.get(path)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    def is_up(self) -> bool:
        try:
            return self.get("/livez").status == 200
        except OSError:
            return False


@contextmanager
def running(redis_url: str, port: int) -> Iterator[Api]:
    process = subprocess.Popen(
        afterclick_argv("api", "--port", str(port)),
        env={**os.environ, "AFTERCLICK_SERVING__REDIS": redis_url},
        stderr=subprocess.PIPE,
        text=True,
    )
    api = Api(port, process)
    try:
        until_s = time.monotonic() + WAIT_S
        while not api.is_up() and process.poll() is None:
            assert time.monotonic() < until_s, "the API does not answer"
            time.sleep(0.02)
        yield api
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with local_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: Redis) -> Iterator[Api]:
    with running(server.url, free_port()) as api, redis.Redis.from_url(server.url) as write:
        keys = Keys("afterclick")
        write.set(keys.top(0, "a/b ü"), a_list("新闻", "x", "y"))
        write.set(keys.top(0, "c"), a_list("z"))
        write.set(keys.top(0, ""), a_list("p"))
        write.set(keys.top(0, "odd"), b"\xff")
        yield api


def test_http_gives_what_the_reader_gives(api: Api, server: Redis) -> None:
    """Two doors to one list; an id is any text, slashes too."""
    with TopK(server.url) as reader:
        expected = [msgspec.to_builtins(top) for top in reader.get_many(["a/b ü", "c", "new"], 2)]

    one = api.ask(f"/v1/top/{urllib.parse.quote('a/b ü', safe='')}?k=2")
    several = api.ask("/v1/top?user=a/b+%C3%BC&user=c&user=new&k=2")

    for answer in (one, *several, *expected):
        answer.pop("age_ms")
    assert one == expected[0]
    assert several == expected
    assert [top["source"] for top in several] == ["model", "model", "fallback"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/top/c?k=0", "k: expected a whole number from 1 to 1000, got '0'"),
        ("/v1/top/c?k=1001", "k: expected"),
        ("/v1/top/c?k=%C2%B2", "k: expected a whole number from 1 to 1000, got '²'"),
        ("/v1/top?k=2", "user: expected 1 to 512 of them, got 0"),
        ("/v1/top?" + "user=a&" * 513, "user: expected 1 to 512 of them, got 513"),
        ("/v1/top/" + "a" * 513, "user: expected 1 to 512 characters, got 513"),
    ],
)
def test_a_request_for_the_impossible_is_told_why(api: Api, path: str, words: str) -> None:
    """Whoever integrates this reads the answer, not our source."""
    answer = api.get(path)

    assert answer.status == 400
    assert words in json.loads(answer.body)["error"]


def test_a_key_that_is_no_list_is_a_500_that_names_it(api: Api) -> None:
    """And nothing else is hurt by it."""
    answer = api.get("/v1/top/odd")

    assert answer.status == 500
    assert "afterclick:top:odd" in json.loads(answer.body)["error"]
    assert api.ask("/v1/top/c")["items"] == ["z"]


async def _together(port: int, paths: list[str]) -> list[tuple[int, Any]]:
    """Status and body of requests that arrive in one moment, each on a connection of its own."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in paths]
    for path, (_, writer) in zip(paths, connections, strict=True):
        writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    answers = []
    for reader, writer in connections:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        answers.append((int(head.split()[1]), json.loads(body)))
        writer.close()
        await writer.wait_closed()
    return answers


def test_a_crowd_is_answered_with_few_connections_to_redis(api: Api, server: Redis) -> None:
    """A connection to Redis for each request ended at the client's limit of 100, with 503."""
    with redis.Redis.from_url(server.url) as look:
        before = look.info("stats")["total_connections_received"]
        answers = asyncio.run(_together(api.port, ["/v1/top/c"] * 300))
        opened = look.info("stats")["total_connections_received"] - before

    assert [status for status, _ in answers] == [200] * 300
    assert opened <= 2


def test_nobody_in_a_crowd_gets_anothers_answer(api: Api) -> None:
    """They share one read: by user, by k, and where one key among them is no list."""
    paths = [
        "/v1/top/c",
        "/v1/top/odd",
        "/v1/top/a%2Fb%20%C3%BC?k=1",
        "/v1/top/a%2Fb%20%C3%BC",
    ] * 20

    answers = asyncio.run(_together(api.port, paths))

    expected = [(200, ["z"]), (500, None), (200, ["新闻"]), (200, ["新闻", "x", "y"])] * 20
    assert [(status, body.get("items")) for status, body in answers] == expected


def test_every_answer_is_counted(api: Api) -> None:
    """Alerts on 503 come from here; probes are not requests for lists."""
    before = api.get("/metrics").body
    api.get("/v1/top/c")
    api.get("/v1/top/c?k=x")
    after = api.get("/metrics").body

    def counted(text: str, status: int) -> float:
        name = f'afterclick_api_requests_total{{status="{status}"}} '
        return sum(float(row[len(name) :]) for row in text.splitlines() if row.startswith(name))

    assert counted(after, 200) - counted(before, 200) == 1
    assert counted(after, 400) - counted(before, 400) == 1


def test_redis_away_is_503_and_it_comes_back(tmp_path: Path) -> None:
    """An API that must be restarted after an outage of Redis is an outage of its own."""
    with local_redis(tmp_path) as server, running(server.url, free_port()) as api:
        assert api.get("/readyz").status == 200
        server.kill()

        answer = api.get("/v1/top/u")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "does not answer" in json.loads(answer.body)["error"]
        assert api.get("/readyz").status == 503
        assert api.get("/livez").status == 200

        server.start()
        assert api.ask("/v1/top/u")["source"] == "none"


def test_a_taken_port_is_a_config_error_and_sigterm_a_clean_end(server: Redis) -> None:
    """Exit codes are what an orchestrator reads."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with running(server.url, taken.getsockname()[1]) as refused:
            _, words = refused.process.communicate(timeout=30)
            assert refused.process.returncode == 2
            assert "AFTERCLICK_SERVING__API_PORT" in words
    with running(server.url, free_port()) as api:
        api.process.send_signal(signal.SIGTERM)
        assert api.process.wait(timeout=30) == 0
