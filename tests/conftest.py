"""Real servers for the tests, and the rules that hold for all of them.

`broker` is tansu unless `--broker kafka` asks for Apache Kafka 4: then exactly the tests that use a
broker run, on Kafka. Both servers live for the whole run, so a test takes topics and a namespace of
its own; one that stops or kills a server starts its own with `afterclick.streams.local`.
"""

import os
import uuid
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from afterclick.serving.keys import Layout
from afterclick.streams.admin import create_topics
from afterclick.streams.local import Redis, Server, local_broker, local_kafka, local_redis
from afterclick.streams.local_cluster import LocalCluster, local_redis_cluster
from afterclick.streams.settings import StreamsSettings

ROOT = Path(__file__).parents[1]

NEVER_SKIPPED_IN_CI = ("service", "kafka", "realdata", "demo", "fault")
"""What these need is there in CI, or CI must say that it is not."""

SOCKETS_OF_KAFKA_PYTHON = r"unclosed <(ssl\.SSLS|s)ocket"
"""kafka-python 3.0.12 leaves the socket of every refused connection to the garbage collector, which
comes when it likes, even after the last test. Runs on Kafka forgive it; on tansu the same tests
show what we leave open ourselves, but for sockets to the run's own broker: one that is just being
connected when its client closes has the same fate.
"""

BROKER_FIXTURES = {"broker", "broker_address", "topics"}

# Two cores, and results that do not depend on how many: numpy's and torch's pools read this when
# they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--broker",
        choices=("tansu", "kafka"),
        default="tansu",
        help="kafka: run the tests that use a broker, and only those, on Apache Kafka 4",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest sets up the filters
def pytest_configure(config: pytest.Config) -> None:
    """What a developer's shell tells Afterclick is not part of a test."""
    if config.getoption("broker") == "kafka":
        line = f"ignore:{SOCKETS_OF_KAFKA_PYTHON}:ResourceWarning"
        config.addinivalue_line("filterwarnings", line)
        # pytest 9.2 has read the line above already for what is collected after the last test.
        warnings.filterwarnings("ignore", SOCKETS_OF_KAFKA_PYTHON, ResourceWarning)
    for name in list(os.environ):
        if name.startswith(
            ("AFTERCLICK_SERVING__", "AFTERCLICK_STREAMS__", "AFTERCLICK_TRAINING__")
        ):
            del os.environ[name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`kafka` tests run on Kafka only; with `--broker kafka` nothing else does but what uses
    a broker and is not `anybroker`. `fault` tests take minutes and run only where `-m` names them.
    """
    on_kafka = config.getoption("broker") == "kafka"
    on_faults = "fault" in config.getoption("markexpr")
    kept, left_out = [], []
    for item in items:
        uses_broker = bool(BROKER_FIXTURES & set(getattr(item, "fixturenames", ())))
        needs_kafka = item.get_closest_marker("kafka") is not None
        again = uses_broker and item.get_closest_marker("anybroker") is None
        runs = needs_kafka or again if on_kafka else not needs_kafka
        runs = runs and (on_faults or item.get_closest_marker("fault") is None)
        (kept if runs else left_out).append(item)
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A service test that is skipped in CI promises what nobody checked: it fails instead."""
    report = yield
    named = [name for name in NEVER_SKIPPED_IN_CI if item.get_closest_marker(name)]
    if report.skipped and not hasattr(report, "wasxfail") and named and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, which a {named[0]} test may not be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The run's broker, tansu or Kafka."""
    folder = tmp_path_factory.mktemp("broker")
    if request.config.getoption("broker") == "kafka":
        with local_kafka(folder, cache=ROOT / ".cache" / "kafka") as server:
            yield server
    else:
        with local_broker(folder) as server:
            to_it = rf"{SOCKETS_OF_KAFKA_PYTHON}.* raddr=\('127.0.0.1', {server.port}\)"
            request.config.addinivalue_line("filterwarnings", f"ignore:{to_it}:ResourceWarning")
            warnings.filterwarnings("ignore", to_it, ResourceWarning)  # for the test that runs
            yield server


@pytest.fixture
def broker_address(broker: Server) -> str:
    """`host:port` of the run's broker."""
    return broker.address


@pytest.fixture
def topics(broker_address: str, request: pytest.FixtureRequest) -> StreamsSettings:
    """Fresh topics: 2 partitions of clicks, 1 of items; `parametrize(..., indirect=True)` takes
    (clicks, items) for other counts. The group is fresh too.
    """
    partitions, item_partitions = getattr(request, "param", (2, 1))
    name = uuid.uuid4().hex[:8]
    settings = StreamsSettings(
        broker=broker_address,
        clicks_topic=f"clicks-{name}",
        items_topic=f"items-{name}",
        signals_topic=f"signals-{name}",
        group=f"group-{name}",
    )
    create_topics(settings, partitions=partitions, replication=1, item_partitions=item_partitions)
    return settings


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """The run's Redis."""
    with local_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """URL of the run's Redis; keys of other tests are there under their namespaces."""
    return redis_server.url


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The run's Redis Cluster: three masters, each with a third of the slots."""
    with local_redis_cluster(tmp_path_factory.mktemp("redis-cluster")) as cluster:
        yield cluster


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> Layout:
    """`single`; a test parametrized by `BOTH_LAYOUTS` runs on Redis Cluster too."""
    layout: Layout = getattr(request, "param", "single")
    return layout


@pytest.fixture
def place(request: pytest.FixtureRequest, layout: Layout) -> str:
    """URL of the run's Redis, or of its Redis Cluster, as `layout` says."""
    name = "redis_cluster" if layout == "cluster" else "redis_server"
    url: str = request.getfixturevalue(name).url
    return url


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{uuid.uuid4().hex[:12]}"
