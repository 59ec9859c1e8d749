"""Probes and metrics over a real port, on the loopback address."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from afterclick.serving.errors import ConfigError
from afterclick.streams.health import HealthServer
from afterclick.streams.metrics import Metrics


class Worker:
    """What the checks answer; tests change it while the server runs."""

    def __init__(self) -> None:
        self.live: tuple[bool, dict[str, Any]] = (True, {"folding_for_s": {}})
        self.ready: tuple[bool, dict[str, Any]] = (True, {"partitions": {}})
        self.metrics = Metrics()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def server(worker: Worker) -> Iterator[HealthServer]:
    with HealthServer(
        "127.0.0.1", 0, lambda: worker.live, lambda: worker.ready, worker.metrics.registry
    ) as running:
        yield running


def ask(server: HealthServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def test_a_healthy_worker_answers_200(server: HealthServer) -> None:
    """What Kubernetes and Docker go by."""
    assert ask(server, "/livez")[0] == 200
    status, content_type, body = ask(server, "/readyz?verbose")

    assert (status, content_type) == (200, "application/json")
    assert json.loads(body) == {"ok": True, "partitions": {}}


def test_an_unready_worker_says_why_per_partition(server: HealthServer, worker: Worker) -> None:
    """`503` alone sends an operator to the logs."""
    why = {"3": {"state": "refused", "why": "the topic was created anew"}}
    worker.ready = (False, {"partitions": why})

    status, _, body = ask(server, "/readyz")

    assert status == 503
    assert json.loads(body) == {"ok": False, "partitions": why}
    assert ask(server, "/livez")[0] == 200


def test_a_check_that_raises_is_a_failed_check(worker: Worker) -> None:
    """A probe that hangs or drops the connection tells nothing about the worker."""

    def broken() -> tuple[bool, dict[str, Any]]:
        raise RuntimeError("dictionary changed size during iteration")

    registry = worker.metrics.registry
    with HealthServer("127.0.0.1", 0, broken, lambda: worker.ready, registry) as server:
        status, _, body = ask(server, "/livez")

    assert status == 503
    assert "dictionary changed size" in json.loads(body)["error"]


def test_metrics_are_in_prometheus_text(server: HealthServer, worker: Worker) -> None:
    """Scrapers parse it; a renamed metric silently empties a dashboard."""
    worker.metrics.clicks.inc(3)
    worker.metrics.dead_letters.labels(reason="json").inc()
    worker.metrics.lag.labels(partition="2").set(17)
    worker.metrics.click_to_list_seconds.observe(0.004)

    status, content_type, body = ask(server, "/metrics")
    lines = body.splitlines()

    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    assert "afterclick_clicks_total 3.0" in lines
    assert 'afterclick_dead_letters_total{reason="json"} 1.0' in lines
    assert 'afterclick_lag_records{partition="2"} 17.0' in lines
    assert 'afterclick_click_to_list_seconds_bucket{le="0.003"} 0.0' in lines
    assert 'afterclick_click_to_list_seconds_bucket{le="0.005"} 1.0' in lines


def test_unknown_paths_are_404_and_name_the_known_ones(server: HealthServer) -> None:
    """/healthz and /ready are the usual guesses."""
    status, _, body = ask(server, "/healthz")

    assert status == 404
    assert json.loads(body)["paths"] == ["/livez", "/readyz", "/metrics"]


def test_head_has_no_body(server: HealthServer) -> None:
    """Load balancers probe with HEAD."""
    assert ask(server, "/livez", "HEAD") == (200, "application/json", "")


def test_a_silent_client_does_not_hold_up_a_probe(server: HealthServer) -> None:
    """One stuck scraper must not make Kubernetes kill a healthy worker."""
    with socket.create_connection(("127.0.0.1", server.port)):
        assert ask(server, "/livez")[0] == 200


def test_a_taken_port_is_a_config_error_that_names_the_setting(server: HealthServer) -> None:
    """Two workers on one machine is the first thing anyone tries."""
    with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}.*AFTERCLICK_STREAMS__PORT"):
        HealthServer(
            "127.0.0.1", server.port, lambda: (True, {}), lambda: (True, {}), Metrics().registry
        )


def test_stop_frees_port_and_thread(worker: Worker) -> None:
    """A test run starts hundreds of them."""
    before = threading.active_count()
    server = HealthServer(
        "127.0.0.1", 0, lambda: worker.live, lambda: worker.ready, worker.metrics.registry
    )
    server.start()
    port = server.port
    server.stop()

    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()


def test_a_server_that_never_started_can_be_stopped(worker: Worker) -> None:
    """Start-up may fail between the two."""
    server = HealthServer(
        "127.0.0.1", 0, lambda: worker.live, lambda: worker.ready, worker.metrics.registry
    )
    server.stop()


def test_two_workers_in_one_process_count_apart() -> None:
    """Tests and `afterclick up` run several; a global registry would refuse the second."""
    first, second = Metrics(), Metrics()
    first.clicks.inc()

    assert second.registry.get_sample_value("afterclick_clicks_total") == 0


def test_a_partition_given_away_is_no_longer_shown() -> None:
    """Otherwise its last lag stands on the dashboard for ever."""
    metrics = Metrics()
    for partition in (1, 2):
        metrics.lag.labels(partition=str(partition)).set(5)
        metrics.head_offset.labels(partition=str(partition)).set(5)

    metrics.forget_partition(1)
    metrics.forget_partition(7)

    value = metrics.registry.get_sample_value
    assert value("afterclick_lag_records", {"partition": "1"}) is None
    assert value("afterclick_head_offset", {"partition": "1"}) is None
    assert value("afterclick_lag_records", {"partition": "2"}) == 5
