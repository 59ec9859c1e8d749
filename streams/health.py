"""/livez, /readyz and /metrics on a port, by the standard library's HTTP server in its own threads.

Runs beside the worker's event loop, so that it answers while that loop is busy or stuck. Knows
nothing of what is checked: two functions say whether and why.
"""

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from afterclick.serving.errors import ConfigError

Check = Callable[[], tuple[bool, dict[str, Any]]]
"""Whether all is well, and what an operator should see either way; called from any thread."""

REQUEST_TIMEOUT_S = 5.0
"""A client that sends or reads more slowly is dropped."""

log = logging.getLogger(__name__)


class HealthServer:
    """Answers probes until stopped.

    Args:
        host: address to listen on.
        port: 0 takes a free one; `port` tells which.
        livez: false means: kill this process and start another.
        readyz: false means: something is not served right now, and the detail says what.
        registry: what /metrics shows.

    Raises:
        ConfigError: the port is taken or the address is not this machine's.
    """

    def __init__(
        self, host: str, port: int, livez: Check, readyz: Check, registry: CollectorRegistry
    ) -> None:
        class Handler(_Handler):
            checks: Mapping[str, Check] = {"/livez": livez, "/readyz": readyz}
            shown = registry

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True  # a slow scraper must not keep the process alive

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"health port {host}:{port}: {error.strerror or error}; set "
                "AFTERCLICK_STREAMS__PORT to another one, or to 0 for any"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            daemon=True,
            name="health",
        )

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    checks: Mapping[str, Check]
    shown: CollectorRegistry
    timeout = REQUEST_TIMEOUT_S
    server_version = "afterclick"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.shown))
        elif path in self.checks:
            ok, detail = _asked(path, self.checks[path])
            self._answer_json(200 if ok else 503, {"ok": ok} | detail)
        else:
            self._answer_json(404, {"ok": False, "paths": [*self.checks, "/metrics"]})

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        log.debug("%s %s", self.address_string(), format % args)

    def _answer_json(self, status: int, detail: dict[str, Any]) -> None:
        self._answer(status, "application/json", msgspec.json.encode(detail) + b"\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _asked(path: str, check: Check) -> tuple[bool, dict[str, Any]]:
    """A check that fails to answer is a failed check, with its error as the reason."""
    try:
        return check()
    except Exception as error:
        log.exception("%s cannot be told", path)
        return False, {"error": repr(error)}
