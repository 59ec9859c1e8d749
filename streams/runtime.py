"""What a worker folds with: the release in force and the catalogue, and how they change while it
runs.

A new publication is loaded beside the running one, verified, self-tested, warmed and given the
items and signals that came since it was trained; then one reference is swapped between two chunks.
A release that fails its checks is refused by name and the old one stays. Items are applied between
two chunks too, at most twice a second, so that the inputs list can name the state of the catalogue
that each chunk was folded with.

Knows no partition, Redis record or Faust.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import F32
from afterclick.serving.errors import ConfigError, ContractError, UnavailableError
from afterclick.serving.manifest import Publication
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.serving.texts import Ranked, ranked_of
from afterclick.streams.events import Item, decode_item
from afterclick.streams.feed import SignalsFeed
from afterclick.streams.gate import Gate
from afterclick.streams.inference import rank_states
from afterclick.streams.log import LogReader, Tail
from afterclick.streams.metrics import Metrics
from afterclick.streams.partition import Serving
from afterclick.streams.record import DeadLetter, Record
from afterclick.streams.settings import StreamsSettings
from afterclick.streams.signals import Absorber

ITEMS_EVERY_S = 0.5
"""Least time between two changes of the catalogue; each one is an entry in every partition's
inputs. Half of the second within which a new item shall be scorable.
"""

LOOK_EVERY = 50
"""Releases loaded before the garbage collector looks at everything again, which stops all threads
for some 0.1 s.
"""

log = logging.getLogger(__name__)


class ItemRecord(NamedTuple):
    """One record of the items topic; `item` is None where it broke the contract."""

    partition: int
    offset: int
    item: Item | None


class ItemsLog(Protocol):
    """What reading items asks of the log: the topic, or topic and archive as one."""

    def edges(self, topic: str, partition: int) -> tuple[int, int]: ...  # noqa: D102
    def read(  # noqa: D102
        self, topic: str, partition: int, start: int, stop: int
    ) -> Iterator[list[Record]]: ...


class UnavailableChange(NamedTuple):
    """How the set of unavailable items moved, for readers."""

    before: int
    after: int
    """Versions: items offsets summed over partitions."""
    changes: list[str]
    whole: list[str]


class Runtime:
    """The release and the catalogue in force."""

    def __init__(
        self,
        serving: ServingSettings,
        streams: StreamsSettings,
        metrics: Metrics,
        *,
        on_unavailable: Callable[[UnavailableChange], None],
        on_bad_item: Callable[[int, DeadLetter], None],
    ) -> None:
        self.gate = Gate()
        self.catalog = Catalog.empty()
        self.loaded: LoadedRelease | None = None
        self.refused: dict[int, str] = {}
        """Publications that this worker won't serve, and why."""
        self.ready = False
        self.signals = SignalsFeed(streams, serving.namespace, self.gate, metrics)
        self._settings = serving
        self._streams = streams
        self._metrics = metrics
        self._on_unavailable = on_unavailable
        self._on_bad_item = on_bad_item
        self._store = ReleaseStore(serving.releases, serving.releases_cache)
        self._log = LogReader(streams)
        self._journal: list[ItemRecord] | None = None
        self._loads = 0

    def serving(self) -> Serving:
        """What is in force; constant while a chunk holds the gate."""
        loaded = self.loaded
        if loaded is None:
            return Serving(0, "", "", None, self.catalog)
        publication = loaded.publication
        return Serving(
            publication.number,
            publication.release,
            publication.sha256,
            loaded,
            self.catalog,
            self.signals.offset,
        )

    def first_list(self, want: int) -> Ranked:
        """What the release would give a user without a past; empty without a release.

        The caller holds the gate: a memory must not move meanwhile.
        """
        if self.loaded is None:
            return ranked_of([], [])
        state_BS: F32 = self.loaded.engine.zero_state(1)
        return rank_states(state_BS, self.loaded, want=want, head=self._settings.head)[0]

    async def start(self) -> None:
        """Load what is published and read all items; without a release, go on without one."""
        while not self.ready:
            try:
                await self._look()
                if self.loaded is None:
                    end = await asyncio.to_thread(self._item_edges)
                    await asyncio.to_thread(self._catch_up, self.catalog, end)
                self.ready = True
            except UnavailableError as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(self._settings.release_poll_s)
        await asyncio.to_thread(self._tell_unavailable, -2, [])

    async def watch_releases(self) -> None:
        """Look for new publications for ever."""
        while True:
            await asyncio.sleep(self._settings.release_poll_s)
            try:
                await self._look()
            except UnavailableError as error:
                log.warning("%s; trying again", error)

    async def follow_items(self) -> None:
        """Take new items for ever."""
        tail: Tail | None = None
        pending: list[tuple[int, Record]] = []
        applied_s = 0.0
        while True:
            try:
                if tail is None:
                    num = await asyncio.to_thread(
                        self._log.num_partitions, self._streams.items_topic
                    )
                    positions = [*self.catalog.offsets, *[0] * num][:num]
                    tail = await asyncio.to_thread(
                        Tail, self._streams, self._streams.items_topic, positions
                    )
                pending += await asyncio.to_thread(tail.poll)
                if pending and time.monotonic() - applied_s >= ITEMS_EVERY_S:
                    applied_s = time.monotonic()
                    await self._apply(pending)
                    pending = []
            except UnavailableError as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(self._settings.release_poll_s)

    async def _apply(self, pending: list[tuple[int, Record]]) -> None:
        items = await asyncio.to_thread(
            lambda: [self._decoded(partition, record) for partition, record in pending]
        )
        before, was = sum(self.catalog.offsets), self.catalog.unavailable
        async with self.gate.alone():
            self._take(self.catalog, items)
            if self.loaded is not None:
                self.loaded.refresh()
            if self._journal is not None:
                self._journal += items
        now = self.catalog.unavailable
        changes = [f"-{name}" for name in sorted(now - was)]
        changes += [f"+{name}" for name in sorted(was - now)]
        await asyncio.to_thread(self._tell_unavailable, before, changes)

    async def _look(self) -> None:
        """Swap the published release in, if it is another one."""
        try:
            publication = await asyncio.to_thread(self._store.current)
        except ContractError as error:
            log.error("%s; keeping %s", error, self._kept())
            return
        number = self.loaded.publication.number if self.loaded else 0
        if (
            publication is None
            or publication.number == number
            or publication.number in self.refused
        ):
            return
        if publication.number < number:
            self._refuse(publication, f"its number is below {number}, which is in force", "number")
            return
        self._journal = []
        try:
            self._loads += 1
            with long_lived(look=self._loads % LOOK_EVERY == 0):
                loaded, absorber = await asyncio.to_thread(self._load, publication)
            async with self.gate.alone():
                self._take(loaded.catalog, self._journal)
                loaded.refresh()
                self.loaded, self.catalog = loaded, loaded.catalog
                self.signals.put_in_force(absorber)
        except (ContractError, ConfigError) as error:
            if isinstance(error, ConfigError) and not self.ready:
                raise
            self._refuse(publication, str(error), getattr(error, "reason", "config"))
            return
        finally:
            self._journal = None
        self._metrics.swaps.inc()
        self._metrics.publication.set(publication.number)
        await asyncio.to_thread(self._tell_unavailable, -2, [])
        log.info("publication %d in force: release %s", publication.number, publication.release)

    def _load(self, publication: Publication) -> tuple[LoadedRelease, Absorber | None]:
        folder = self._store.fetch(publication.release)
        loaded = LoadedRelease(publication, folder, self._settings)
        loaded.catalog.offsets = list(loaded.manifest.items_offset)
        end = list(self.catalog.offsets) if self.ready else self._item_edges()
        self._catch_up(loaded.catalog, end)
        return loaded, self.signals.prepared(loaded, self._log)

    def _item_edges(self) -> list[int]:
        topic = self._streams.items_topic
        num = self._log.num_partitions(topic)
        return [self._log.edges(topic, partition)[1] for partition in range(num)]

    def _catch_up(self, catalog: Catalog, end: list[int]) -> None:
        self._take(catalog, read_items(self._log, self._streams.items_topic, catalog.offsets, end))

    def _take(self, catalog: Catalog, items: "Iterator[ItemRecord] | list[ItemRecord]") -> None:
        for record in items:
            try:
                catalog.apply(record.item, record.partition, record.offset)
            except ContractError as error:
                log.warning("%s", error)
        self._metrics.catalog_items.set(catalog.num_items)

    def _decoded(self, partition: int, record: Record) -> ItemRecord:
        try:
            return ItemRecord(partition, record.offset, decode_item(record.key, record.value))
        except ContractError as error:
            log.warning("items/%d at %d: %s", partition, record.offset, error)
            self._on_bad_item(partition, DeadLetter(record, error.reason, str(error)))
            return ItemRecord(partition, record.offset, None)

    def _tell_unavailable(self, before: int, changes: list[str]) -> None:
        whole = sorted(self.catalog.unavailable)
        try:
            self._on_unavailable(
                UnavailableChange(before, sum(self.catalog.offsets), changes, whole)
            )
        except UnavailableError as error:
            # The next change finds another version there and writes the whole set.
            log.warning("unavailable items: %s", error)

    def _refuse(self, publication: Publication, why: str, reason: str) -> None:
        self.refused[publication.number] = why
        self._metrics.refused_releases.labels(reason=reason).inc()
        log.error(
            "publication %d, release %s: refused: %s; keeping %s",
            publication.number,
            publication.release,
            why,
            self._kept(),
        )

    def _kept(self) -> str:
        return self.loaded.publication.release if self.loaded else "no release"


def read_items(
    reader: ItemsLog, topic: str, start: list[int], end: list[int]
) -> Iterator[ItemRecord]:
    """Every record of the items topic between two vectors of offsets, partition by partition."""
    for partition, stop in enumerate(end):
        begin = start[partition] if partition < len(start) else 0
        begin = max(begin, reader.edges(topic, partition)[0] if begin < stop else 0)
        for records in reader.read(topic, partition, begin, stop):
            for record in records:
                try:
                    item = decode_item(record.key, record.value)
                except ContractError as error:
                    log.warning("%s/%d at %d: %s", topic, partition, record.offset, error)
                    item = None
                yield ItemRecord(partition, record.offset, item)
        if begin < stop:
            # Markers may follow the last record: the catalogue stands at the end all the same.
            yield ItemRecord(partition, stop - 1, None)


@contextmanager
def long_lived(*, look: bool = False) -> Iterator[None]:
    """What is made meanwhile is no garbage: keep the collector from it, now and later.

    To look for cycles among all that a release holds took it 40 to 110 ms at 20,000 items, while no
    thread ran. What is referred to by nobody goes as ever; cycles made meanwhile (NumPy's of file
    headers: some 500 objects a release) stay until the collector may `look` at everything again.
    """
    gc.disable()
    try:
        yield
        if look:
            settle()
        else:
            gc.freeze()
    finally:
        gc.enable()


def settle() -> None:
    """Let the collector look at everything once more, and then never again at what is left."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
