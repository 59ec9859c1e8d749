"""One partition's worker in one process: the fold, the memory, the items feed and the renewals are
the real ones; Kafka and Redis are not there, and event time is the only clock.

Moves reach the memory right after their chunk, as topic `signals` would bring them. Knows no
trainer and judges nothing.
"""

import itertools
import time

import msgspec
import numpy as np

from afterclick.serving.blend import gather
from afterclick.serving.catalog import Catalog
from afterclick.serving.context import Context
from afterclick.serving.records import TopList, UserRecord, decode_record
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.events import Click, Item, decode_item, encode
from afterclick.streams.fold import Inputs, renew
from afterclick.streams.inference import rank_states
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, DeadLetter, LogEdges, Record
from afterclick.streams.replica import Replica
from afterclick.streams.signals import decode_parcel
from afterclick.training.blending import Scorer

K = 20

CHUNK = 1024
"""Records of the past folded at once."""

LIMITS = Limits(users_max=256, records_max=CHUNK, bytes_max=1 << 20, rebuilds_max=256)


class LiveWorker:
    """A worker that is told what comes and what time it is.

    Args:
        serving: rules, provider, threads.
        signals_from: clicks below this offset are in every release's memory.
    """

    def __init__(self, serving: ServingSettings, *, signals_from: int) -> None:
        self.loaded: LoadedRelease | None = None
        self.num_lists = 0
        """Made at clicks and by renewals."""
        self.list_s = 0.0
        """Seconds that these took, the fold of their clicks included."""
        self._settings = serving
        self._catalog = Catalog.empty()
        self._items: list[tuple[int, Item]] = []
        self._replica = Replica(signals_from=signals_from)
        self._signals = 0
        self._offset = 0
        self._fallback: tuple[tuple[int, ...], list[str]] = ((), [])
        self._fold = PartitionFold(
            0,
            self._replica,
            ListRules.of(serving),
            LIMITS,
            serving=self._serving,
            dead_letters=_refuse,
            log_start=lambda: 0,
            batch_ids=(str(number) for number in itertools.count()),
        )
        self._fold.open(LogEdges("", 0, 0), lambda _offset: None)

    @property
    def catalog(self) -> Catalog:
        """Items in force."""
        return self.loaded.catalog if self.loaded else self._catalog

    def swap(self, loaded: LoadedRelease) -> None:
        """Put a release in force, with the items that came since it was made.

        Its memory is as of all clicks so far: the trainer has just read them.
        """
        for offset, item in self._items[sum(loaded.manifest.items_offset) :]:
            loaded.catalog.apply(item, 0, offset)
        loaded.catalog.offsets = [len(self._items)]
        loaded.refresh()
        self.loaded = loaded

    def take_item(self, item: Item) -> None:
        """One record of the items topic."""
        decoded = decode_item(*encode(item))
        offset = len(self._items)
        self._items.append((offset, decoded))
        self.catalog.apply(decoded, 0, offset)
        if self.loaded is not None:
            self.loaded.refresh()

    def take(self, clicks: list[Click], *, put_off: bool = False) -> None:
        """Records of the clicks topic, then what they signal; with `put_off` lists are due."""
        begin = self._offset
        records = []
        for click in clicks:
            key, value = encode(click)
            records.append(Record(self._offset, click.timestamp_ms or 0, key, value))
            self._offset += 1
        begun_s = time.perf_counter()
        moved = self._fold.process(Chunk(begin, self._offset, records), put_off=put_off)
        assert moved.seek is None, "nobody else writes here"
        if not put_off:
            self.num_lists += len(clicks)
            self.list_s += time.perf_counter() - begun_s
        for written in self._replica.waiting_signals(0, CHUNK):
            if self.loaded is not None and self.loaded.memory is not None:
                parcel = decode_parcel(written.packed)
                self.loaded.memory.absorb([move for _, move in parcel.moves])
                self._signals += 1
            self._replica.published_signals(0, written.last)

    def make_due(self) -> None:
        """All lists that were put off."""
        while self._fold.renew_due(LIMITS.users_max).lists:
            pass

    def renew(self, users: list[str]) -> None:
        """Lists of these users anew, where anything has moved since."""
        begun_s = time.perf_counter()
        for begin in range(0, len(users), LIMITS.users_max):
            self.num_lists += self._fold.renew(users[begin : begin + LIMITS.users_max]).lists
        self.list_s += time.perf_counter() - begun_s

    def recent_users(self, limit: int) -> list[str]:
        """Users who clicked last, newest first."""
        return self._fold.recent_users(limit)

    def standing(self, user: str) -> list[str]:
        """What a reader is given now."""
        body = self._replica.lists.get(user)
        if body is None:
            return self.fallback()
        return msgspec.json.decode(body, type=TopList).items[:K]

    def fallback(self) -> list[str]:
        """The list of the empty user."""
        release = self.loaded
        if release is None or release.blend is None or release.memory is None:
            popular = self._fold.popularity.top(K, available=self.catalog.is_available)
            return [item for item, _ in popular]
        state = (release.publication.number, self._signals, len(self._items))
        if self._fallback[0] != state:
            empty_1S = release.engine.zero_state(1)
            now = Context(now_ms=release.memory.clock_ms)
            ranked = rank_states(empty_1S, release, want=K, contexts=[now])
            self._fallback = state, ranked[0].items
        return self._fallback[1]

    def at_click(self, user: str, now_ms: int) -> list[str]:
        """What the fold would list for a user's record as it stands, under all that is in force."""
        serving = self._serving()
        if serving.release is None:
            return self.standing(user)
        items = tuple(serving.catalog.offsets)
        inputs = Inputs(
            serving.publication,
            serving.name,
            serving.sha256,
            items,
            items,
            self._fold.rules,
            serving.signals,
        )
        folded = renew(
            {user: (self._record(user), self._offset, now_ms)},
            partition=0,
            inputs=inputs,
            release=serving.release,
        )
        return msgspec.json.decode(folded.lists[user], type=TopList).items[:K]

    def at_click_by(self, scorer: Scorer, user: str, now_ms: int) -> list[str]:
        """The same, the blend's candidates scored by somebody who does not look at the model."""
        release = self.loaded
        assert release is not None
        assert release.memory is not None
        assert release.blend is not None
        record = self._record(user) or UserRecord()
        found = gather(
            release.blend.spec,
            release.engine.query(release.engine.zero_state(1)),
            [Context(record.interactions, record.clicks, record.last_ms, now_ms)],
            release.memory,
            release.blend.rows(release.memory, release.catalog),
            release.scanner,
            K,
        )
        kept = np.flatnonzero(found.pool.source_R & scorer.sources)
        best = kept[np.argsort(-scorer.scores(found.feature_RF[kept]), kind="stable")[:K]]
        return [release.memory.ids[code] for code in found.pool.code_R[best].tolist()]

    def _record(self, user: str) -> UserRecord | None:
        data = self._replica.records.get((0, user))
        return decode_record(data) if data else None

    def _serving(self) -> Serving:
        if self.loaded is None:
            return Serving(0, "", "", None, self._catalog)
        publication = self.loaded.publication
        return Serving(
            publication.number,
            publication.release,
            publication.sha256,
            self.loaded,
            self.loaded.catalog,
            self._signals,
        )


def _refuse(letters: list[DeadLetter]) -> None:
    raise AssertionError(f"live: a click that its file's reader took: {letters[0].message}")
