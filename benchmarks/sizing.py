"""What a deployment needs, worked out from what one click and one user cost.

Pure arithmetic over a `Cost` that `benchmarks.scale` measured: no clock, no server. Every figure of
the table is one of these products, so a reader with other costs can do the sum again.
"""

import math
from typing import NamedTuple

import msgspec

WORKER_SHARE = 0.25
"""Of what workers drain, planned with live: live chunks are smaller and cost more a click, and a
quarter is what `make bench` found sustained on two cores beside broker, load and watcher.
"""
SERVER_SHARE = 0.5
"""Of a core of Redis or of the broker: beyond, what waits for it grows fast."""
PARTITIONS_A_WORKER = 2
"""So that a worker more can take some."""
REPLICAS = 2
"""Copies of every byte in Redis, the primary included."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """CPU µs and bytes of one click, bytes of one user."""

    worker_us: float
    redis_us: float
    broker_us: float
    scan_us: float
    """Of `worker_us`: what another catalogue changes."""
    user_bytes: float
    redis_in_bytes: float
    redis_out_bytes: float
    click_bytes: float
    """In topic `clicks`: what a producer sends and a worker fetches."""
    signal_bytes: float
    """In topic `signals`."""


class Need(NamedTuple):
    """One row of the sizing table."""

    clicks_per_s: float
    users: float
    items: int
    workers: int
    """Processes, one a core."""
    redis_cores: int
    broker_cores: int
    partitions: int
    redis_gb: float
    mbit_per_s: float
    """Between all of them, once through the broker and once through Redis, replication left out."""


def need(
    cost: Cost, *, clicks_per_s: float, users: float, items: int, scan_us: float | None = None
) -> Need:
    """What serves so many clicks a second of so many users; `scan_us` of another catalogue."""
    worker_us = cost.worker_us + (0.0 if scan_us is None else scan_us - cost.scan_us)
    workers = _cores(clicks_per_s, worker_us, WORKER_SHARE)
    bytes_a_click = cost.redis_in_bytes + cost.redis_out_bytes
    bytes_a_click += 2 * (cost.click_bytes + cost.signal_bytes)
    return Need(
        clicks_per_s=clicks_per_s,
        users=users,
        items=items,
        workers=workers,
        redis_cores=_cores(clicks_per_s, cost.redis_us, SERVER_SHARE),
        broker_cores=_cores(clicks_per_s, cost.broker_us, SERVER_SHARE),
        partitions=workers * PARTITIONS_A_WORKER,
        redis_gb=round(REPLICAS * users * cost.user_bytes / 1e9, 1),
        mbit_per_s=round(clicks_per_s * bytes_a_click * 8 / 1e6, 1),
    )


def _cores(clicks_per_s: float, us: float, share: float) -> int:
    return max(1, math.ceil(clicks_per_s * us / 1e6 / share))


def table(needs: list[Need]) -> list[str]:
    """As Markdown."""
    lines = [
        "| clicks/s | users | items | workers = cores | Redis cores = shards | broker cores "
        f"| partitions ≥ | Redis, GB in {REPLICAS} copies | network, Mbit/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in needs:
        cells = [
            f"{one.clicks_per_s:,.0f}", f"{one.users:,.0f}", f"{one.items:,}",
            f"{one.workers:,}", f"{one.redis_cores:,}", f"{one.broker_cores:,}",
            f"{one.partitions:,}", f"{one.redis_gb:,}", f"{one.mbit_per_s:,}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines
