"""What a worker counts and times, in a registry of its own; nothing is global.

Names carry their unit; docs/operations.md lists them all, and a test compares the two. Knows no
HTTP: `health.py` shows the registry.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

WAIT_BUCKETS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05,
    0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""Click to list: fine around the milliseconds promised, and up to an outage caught up with."""

WORK_BUCKETS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0,
)  # fmt: skip
"""One call: from a lone click's script to a chunk that blocks everything behind it."""


class Metrics:
    """Counters, gauges and histograms of one worker process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"afterclick_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"afterclick_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"afterclick_{name}", what, buckets=buckets, registry=registry)

        self.clicks = counter("clicks_total", "Interactions folded, repeats left out.")
        self.duplicates = counter("duplicates_total", "Repeated events, counted and not stepped.")
        self.dead_letters = counter(
            "dead_letters_total", "Records that broke the contract, by reason.", ("reason",)
        )
        self.clock_replaced = counter(
            "clock_replaced_total", "Event times too far ahead, replaced by the record's own."
        )
        self.unknown_items = counter(
            "unknown_items_total", "Clicks on items that the catalogue does not know."
        )
        self.misplaced = counter(
            "misplaced_clicks_total",
            "Clicks of users whose partition is another: their producer partitions otherwise.",
        )
        self.forgotten = counter("forgotten_total", "Users emptied by a forget event.")
        self.steps = counter("steps_total", "Model steps of clicks.")
        self.rebuilt_records = counter(
            "rebuilt_records_total", "Records rebuilt from their history for another release."
        )
        self.lists = counter("lists_total", "Users written, their lists with them.")
        self.put_off_lists = counter(
            "put_off_lists_total", "Users written without a list: it is due, made when clicks rest."
        )
        self.renewed_lists = counter(
            "renewed_lists_total",
            "Lists made later: put off, or renewed for another release or newer signals.",
        )
        self.chunks = counter("chunks_total", "Writes that went through, one script each.")
        self.mismatches = counter(
            "mismatches_total", "Writes refused because Redis held another head."
        )
        self.seeks = counter("seeks_total", "Times a partition was read again from its head.")
        self.lost_records = counter(
            "lost_records_total", "Records the log dropped before they were folded (ACCEPT_LOSS)."
        )
        self.signals_published = counter(
            "signals_published_total", "Chunks whose moves the signals topic has taken."
        )
        self.signals_dropped = counter(
            "signals_dropped_total",
            "Chunks whose moves were given up: the outbox was full, or the topic takes none so "
            "large.",
        )
        self.signals_absorbed = counter(
            "signals_absorbed_total", "Moves taken into the memory of the release in force."
        )
        self.swaps = counter("swaps_total", "Releases put in force.")
        self.refused_releases = counter(
            "refused_releases_total", "Publications that failed a check, by reason.", ("reason",)
        )

        self.publication = gauge("publication", "Number of the publication in force; 0 for none.")
        self.catalog_items = gauge("catalog_items", "Items in the catalogue in force.")
        self.head_offset = gauge(
            "head_offset", "Offset of the first record not yet folded.", ("partition",)
        )
        self.lag = gauge(
            "lag_records", "Records in the log that are not folded yet.", ("partition",)
        )

        self.signals_waiting = gauge(
            "signals_waiting", "Chunks whose moves wait to be published.", ("partition",)
        )
        self.signals_offset = gauge(
            "signals_offset", "Offset of the signals topic that new lists are made with."
        )
        self.signals_lag = gauge(
            "signals_lag_records", "Records of the signals topic that are not absorbed yet."
        )

        self.click_to_list_seconds = histogram(
            "click_to_list_seconds",
            "From a record's timestamp in Kafka until its list stood in Redis; oldest of a write.",
            WAIT_BUCKETS_S,
        )
        self.chunk_seconds = histogram(
            "chunk_seconds", "From taking up a chunk until it was written.", WORK_BUCKETS_S
        )
        self.redis_seconds = histogram(
            "redis_seconds",
            "One MGET or the scripts of one round, answer included.",
            WORK_BUCKETS_S,
        )
        self.engine_seconds = histogram(
            "engine_seconds",
            "Model steps, scan and ranking of one round of chunks.",
            WORK_BUCKETS_S,
        )

    def forget_partition(self, partition: int) -> None:
        """Stop showing a partition that another worker has now."""
        for metric in (self.head_offset, self.lag, self.signals_waiting):
            metric.remove_by_labels({"partition": str(partition)})
