"""Apache Kafka 4 on one machine from Maven's jars: fetch, format, command line, probe.

One KRaft node that is broker and controller, for tests and `afterclick up --kafka`; no Docker. The
jars stand in a git-ignored cache, fetched once through Maven. Runs nothing for long: `local.py`
does.
"""

import fcntl
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from afterclick.serving.errors import ConfigError, UnavailableError

VERSION = "4.3.1"
JAVA_VERSION_MIN = 17
"""Kafka 4's brokers need it (KIP-1013)."""

FETCH_TIMEOUT_S = 300.0
"""91 jars, 54 MB: 7 s on a good line."""
FORMAT_TIMEOUT_S = 60.0

INSTALL = "apt-get install openjdk-17-jdk-headless maven"

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>afterclick</groupId>
  <artifactId>local-kafka</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""

_LISTENERS = ("listeners", "advertised.listeners", "listener.security.protocol.map")

_CLUSTER_ID = "YWZ0ZXJjbGlja19sb2NhbA"
"""Sixteen fixed bytes in Kafka's base64: each node here is a cluster of its own."""


def kafka_jars(cache: Path) -> Path:
    """Folder with Kafka's jars, fetched at the first use; safe when several processes ask at once.

    Raises:
        ConfigError: Java is missing or too old, or Maven is missing.
        UnavailableError: Maven could not fetch them; shows what it said.
    """
    _check_java()
    jars = (cache / VERSION).resolve()
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise ConfigError(f"Kafka {VERSION}: expected mvn on PATH, found none; run: {INSTALL}")
    jars.parent.mkdir(parents=True, exist_ok=True)
    with (jars.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, so that no lock is ever left
        if not jars.is_dir():
            _fetch(maven, jars)
    return jars


def prepare(
    folder: Path,
    jars: Path,
    *,
    port: int,
    controller_port: int,
    properties: Mapping[str, str] | None = None,
    format_arguments: Sequence[str] = (),
) -> Path:
    """Write the configuration and format the log folder, unless it was before.

    Args:
        folder: of configuration and log.
        jars: Kafka's.
        port: of the listener without TLS and passwords.
        controller_port: of the controller.
        properties: further ones; they replace ours, except that lists of listeners are appended to.
        format_arguments: further ones of StorageTool's `format`, `--add-scram …` for example.

    Returns:
        path of server.properties.

    Raises:
        UnavailableError: formatting failed; shows what Kafka said.
    """
    folder = folder.resolve()
    path = folder / "server.properties"
    values = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": f"{folder / 'log'}",
        "offsets.topic.replication.factor": "1",
        # The default of 50 makes 50 folders before the first group can join.
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        # After kill -9 the new start waits until the old registration has lapsed: 9 s by default.
        "broker.session.timeout.ms": "2000",
        "broker.heartbeat.interval.ms": "500",
        # A mistyped topic must fail here as it does in production.
        "auto.create.topics.enable": "false",
    }
    for name, value in (properties or {}).items():
        values[name] = f"{values[name]},{value}" if name in _LISTENERS else value
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    if not (folder / "log" / "meta.properties").exists():
        argv = _java(jars, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID)
        argv += ["-c", str(path), *format_arguments]
        _run(argv, FORMAT_TIMEOUT_S, "Kafka: formatting the log folder")
    return path


def server_argv(jars: Path, properties: Path) -> list[str]:
    """Command line of the broker."""
    return _java(jars, "kafka.Kafka", str(properties))


def broker_answers(port: int) -> bool:
    """Whether the broker on this port tells of itself in its metadata.

    The port opens a moment before that, and a client that comes in between sees a cluster of none.
    """
    # Metadata request (key 3, version 1, correlation id 1, client id "probe") for no topics.
    request = struct.pack(">hhih5si", 3, 1, 1, 5, b"probe", 0)
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
            connection.settimeout(2.0)
            connection.sendall(struct.pack(">i", len(request)) + request)
            with connection.makefile("rb") as answer:
                head = answer.read(12)
    except OSError:
        return False
    if len(head) < 12:
        return False
    _size, correlation, brokers = struct.unpack(">iii", head)
    return bool(correlation == 1 and brokers > 0)


def _java(jars: Path, *arguments: str) -> list[str]:
    return ["java", "-Xmx512m", "-cp", f"{jars}/*", *arguments]


def _check_java() -> None:
    java = shutil.which("java")
    if java is None:
        raise ConfigError(f"Kafka {VERSION}: expected java on PATH, found none; run: {INSTALL}")
    told = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', told)
    if found is None or int(found[1]) < JAVA_VERSION_MIN:
        first = (told.splitlines() or ["nothing"])[0]
        raise ConfigError(
            f"Kafka {VERSION}: expected Java {JAVA_VERSION_MIN} or newer, java -version says "
            f"{first!r}; run: {INSTALL}"
        )


def _fetch(maven: str, jars: Path) -> None:
    with tempfile.TemporaryDirectory(dir=jars.parent, prefix="fetch-") as name:
        folder = Path(name)
        (folder / "pom.xml").write_text(_POM)
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={folder / 'jars'}"]
        argv = [maven, "-q", "-B", "-f", str(folder / "pom.xml"), *goal]
        _run(argv, FETCH_TIMEOUT_S, f"Kafka {VERSION}: fetching its jars")
        # Renamed when whole, so that a fetch cut short is never taken for the real thing.
        (folder / "jars").rename(jars)


def _run(argv: list[str], timeout_s: float, what: str) -> None:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{what}: not done within {timeout_s:g} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise UnavailableError(f"{what}: exit code {done.returncode}; it said:\n{said}")
