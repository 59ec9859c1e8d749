"""Lists over HTTP, for applications that do not speak Redis: an ASGI app around `AsyncTopK`.

Reads what workers wrote and computes nothing; knows no release, model or Kafka. Errors are JSON:
`{"error": text}`, 400 for a request that asks for something impossible, 503 where Redis is away.

    GET /v1/top/{user}?k=10       one user's list, as `TopK.get`
    GET /v1/top?user=a&user=b     several users' lists, in order
    GET /livez /readyz /metrics   the process works; Redis answers; Prometheus
"""

import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from afterclick.serving.errors import AfterclickError, ConfigError, UnavailableError
from afterclick.serving.gathering import GatheredTopK
from afterclick.serving.reader import AsyncTopK
from afterclick.serving.settings import ServingSettings

USERS_MAX = 512
"""Users of one request: one round trip to Redis."""

USER_ID_MAX = 512
"""Characters of a user id; clicks with longer ones are dead letters."""

K_MAX = 1000
"""As the setting `k`: no list is longer."""

CONCURRENT_MAX = 1024
"""Requests in progress; further ones are told 503 at once instead of waiting in a queue that
grows.
"""

RETRY_AFTER_S = 1
"""What a client is told to wait where Redis is away."""

Endpoint = Callable[[Request], Awaitable[Response]]


class ApiMetrics:
    """What the process counts; one registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "afterclick_api_requests_total",
            "Requests for lists, by status.",
            ["status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "afterclick_api_request_seconds",
            "From a request for lists to its answer.",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
            registry=self.registry,
        )


def build_api(settings: ServingSettings, metrics: ApiMetrics | None = None) -> Starlette:
    """The ASGI application of one process; it connects when it is first asked.

    Raises:
        ConfigError: the Redis URL is wrong.
    """
    metrics = metrics or ApiMetrics()
    reader = AsyncTopK(settings.redis, namespace=settings.namespace, layout=settings.layout)
    # On a cluster users of a node that is away must not share the error with others.
    single: AsyncTopK | GatheredTopK = reader
    if settings.layout == "single":
        single = GatheredTopK(reader)

    async def one(request: Request) -> Response:
        user, k = _user(request.path_params["user"]), _k(request)
        return _json(await single.get(user, k))

    async def several(request: Request) -> Response:
        users = [_user(user) for user in request.query_params.getlist("user")]
        if not 1 <= len(users) <= USERS_MAX:
            raise _RequestError(f"user: expected 1 to {USERS_MAX} of them, got {len(users)}")
        return _json(await reader.get_many(users, _k(request)))

    def counted(endpoint: Endpoint) -> Endpoint:
        async def answer(request: Request) -> Response:
            begun_s = time.perf_counter()
            response = await _answered(endpoint, request)
            metrics.seconds.observe(time.perf_counter() - begun_s)
            metrics.requests.labels(str(response.status_code)).inc()
            return response

        return answer

    async def livez(_: Request) -> Response:
        return _json({"ok": True})

    async def readyz(request: Request) -> Response:
        async def look(_: Request) -> Response:
            # The empty user's list: the one key that every deployment has, once a worker ran.
            await reader.get("")
            return _json({"ok": True})

        return await _answered(look, request)

    async def shown(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        yield
        await reader.close()

    return Starlette(
        routes=[
            Route("/v1/top/{user:path}", counted(one)),
            Route("/v1/top", counted(several)),
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", shown),
        ],
        lifespan=lifespan,
    )


def run_api(settings: ServingSettings) -> None:
    """Serve until SIGTERM or SIGINT; requests in progress are answered first.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    api = build_api(settings)
    # uvicorn sends itself the signal again once it has stopped; to be told to end is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with _listening(settings.api_host, settings.api_port) as sock:
        config = uvicorn.Config(
            api,
            access_log=False,
            log_level="warning",
            limit_concurrency=CONCURRENT_MAX,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[sock])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if os.name == "posix":
            # Several processes share the port, and the kernel spreads the connections.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"api: cannot listen on {host}:{port}: {error.strerror or error}; set "
            "AFTERCLICK_SERVING__API_HOST and AFTERCLICK_SERVING__API_PORT"
        ) from error
    return sock


class _RequestError(AfterclickError):
    """The request asks for something impossible."""


async def _answered(endpoint: Endpoint, request: Request) -> Response:
    try:
        return await endpoint(request)
    except _RequestError as error:
        return _json({"error": str(error)}, 400)
    except UnavailableError as error:
        response = _json({"error": str(error)}, 503)
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return response
    except AfterclickError as error:
        return _json({"error": str(error)}, 500)


def _json(answer: Any, status: int = 200) -> Response:
    # A list is a moment's: a proxy that keeps it serves yesterday's.
    return Response(
        msgspec.json.encode(answer),
        status,
        {"Cache-Control": "no-store"},
        media_type="application/json",
    )


def _user(user: str) -> str:
    if not 1 <= len(user) <= USER_ID_MAX:
        raise _RequestError(f"user: expected 1 to {USER_ID_MAX} characters, got {len(user)}")
    return user


def _k(request: Request) -> int | None:
    text = request.query_params.get("k")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= K_MAX and len(text) <= 4):
        raise _RequestError(f"k: expected a whole number from 1 to {K_MAX}, got {text[:40]!r}")
    return int(text)
