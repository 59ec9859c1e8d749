"""Prequential evaluation: a log is replayed through the worker's own path, in one process.

The fold, its store in memory, the items feed and the trainer are the real ones; only Kafka, Redis
and the clock are not there: event time is the clock. Before each click of the live part two lists
are judged, then the click is folded: the one that stood for the user (the fallback list for a user
without one), and one made at that moment from the user's record, the release and the items in
force. Ties cannot occur: lists are ordered.

The past is folded under the first release, trained on it; at every further release the lists of
recent users are renewed at once, as a worker does in the background.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from afterclick.serving.catalog import Catalog
from afterclick.serving.records import TopList, decode_record
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.demo_source import DemoSource
from afterclick.streams.events import Click, Item, decode_item, encode
from afterclick.streams.fold import Inputs, renew
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, DeadLetter, LogEdges, Record
from afterclick.streams.replica import Replica
from afterclick.streams.score import DAY_MS, MISS, K, Markov, Popularity, Rates, Tally
from afterclick.training.data import Columns
from afterclick.training.pipeline import train_release
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import item_row, source_of

HOUR_MS = 3600 * 1000

CHUNK = 1024
"""Records of the past folded at once."""

RENEWED_MAX = 2000
"""Users whose lists are renewed at a new release, those written last first."""

LIMITS = Limits(users_max=256, records_max=CHUNK, bytes_max=1 << 20, rebuilds_max=256)

METHODS = ("standing", "at_click", "popularity_24h", "popularity_6h", "markov", "markov_popularity")


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of the live part."""

    hours: float
    """Event time since live began, at the stretch's end."""
    clicks: int
    hit_rate_20: float
    """Of the lists made at the click; the standing ones and the strongest baseline follow."""
    mrr_20: float
    standing_hit_rate_20: float
    standing_mrr_20: float
    markov_popularity_hit_rate_20: float


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What a prequential evaluation found."""

    mode: str = "live"
    test: dict[str, float]
    """`hit_rate_20`, `mrr_20`, `predictions` of the lists made at the click, as fractions."""
    methods: dict[str, dict[str, float]]
    """The same for `METHODS`."""
    curve: list[Point]
    releases: int
    """Trained and put in force, the first one included."""
    unranked: int
    """Clicks on items that no release or catalogue had a row for: out of the model's reach."""
    training_s: float
    seconds: float


class _Worker:
    """One partition's worker without Kafka and Redis."""

    def __init__(self, serving: ServingSettings) -> None:
        self.loaded: LoadedRelease | None = None
        self._serving_settings = serving
        self._catalog = Catalog.empty()
        self._items: list[tuple[int, Item]] = []
        self._replica = Replica()
        self._offset = 0
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
        """Put a release in force, with the items that came since it was made."""
        for offset, item in self._items[sum(loaded.manifest.items_offset) :]:
            loaded.catalog.apply(item, 0, offset)
        loaded.catalog.offsets = [len(self._items)]
        loaded.refresh()
        self.loaded = loaded
        recent = self._fold.recent_users(RENEWED_MAX)
        for begin in range(0, len(recent), LIMITS.users_max):
            self._fold.renew(recent[begin : begin + LIMITS.users_max])

    def take_item(self, item: Item) -> None:
        """One record of the items topic."""
        decoded = decode_item(*encode(item))
        offset = len(self._items)
        self._items.append((offset, decoded))
        self.catalog.apply(decoded, 0, offset)
        if self.loaded is not None:
            self.loaded.refresh()

    @property
    def num_items(self) -> int:
        """Records of the items topic so far."""
        return len(self._items)

    def take(self, clicks: list[Click], *, put_off: bool = False) -> None:
        """Records of the clicks topic; with `put_off` their lists are due."""
        begin = self._offset
        records = []
        for click in clicks:
            key, value = encode(click)
            records.append(Record(self._offset, click.timestamp_ms or 0, key, value))
            self._offset += 1
        moved = self._fold.process(Chunk(begin, self._offset, records), put_off=put_off)
        assert moved.seek is None, "nobody else writes here"

    def make_due(self) -> None:
        """All lists that were put off."""
        while self._fold.renew_due(LIMITS.users_max).lists:
            pass

    def standing(self, user: str) -> list[str]:
        """What a reader is given now."""
        body = self._replica.lists.get(user)
        if body is None:
            popular = self._fold.popularity.top(K, available=self.catalog.is_available)
            return [item for item, _ in popular]
        return msgspec.json.decode(body, type=TopList).items[:K]

    def at_click(self, user: str, now_ms: int) -> list[str]:
        """What the fold would list for a user's record as it stands, under all that is in force."""
        serving = self._serving()
        if serving.release is None:
            return self.standing(user)
        data = self._replica.records.get((0, user))
        items = tuple(serving.catalog.offsets)
        inputs = Inputs(
            serving.publication, serving.name, serving.sha256, items, items, self._fold.rules
        )
        folded = renew(
            {user: (decode_record(data) if data else None, self._offset, now_ms)},
            partition=0,
            inputs=inputs,
            release=serving.release,
        )
        return msgspec.json.decode(folded.lists[user], type=TopList).items[:K]

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
        )


class _Stretch(NamedTuple):
    until_ms: int
    tallies: dict[str, Tally]


def run_live(
    source: DemoSource,
    columns: Columns,
    settings: TrainingSettings,
    serving: ServingSettings,
    *,
    retrain_every_h: float,
    tell: Callable[[str], None] = lambda _line: None,
) -> Live:
    """Replay a log's live part and judge every list before its click.

    Args:
        source: past, live part and items, as the demo splits them.
        columns: the same clicks in the same order, for the trainer.
        settings: of every training run; no validation part is held out.
        serving: rules, and a folder for the releases of this evaluation alone.
        retrain_every_h: hours of event time between two releases; 0 keeps the first one.
        tell: given a line of progress now and then.
    """
    began_s = time.monotonic()
    settings = msgspec.structs.replace(settings, validation=0.0)
    worker = _Worker(serving)
    catalogue: list[Item] = []
    for item in source.items:
        worker.take_item(item)
        catalogue.append(item)
    training_s = 0.0

    def export(num_clicks: int) -> None:
        nonlocal training_s
        started_s = time.monotonic()
        worker.swap(_trained(columns.select(slice(num_clicks)), catalogue, settings, serving))
        training_s += time.monotonic() - started_s

    export(len(source.past))
    for begin in range(0, len(source.past), CHUNK):
        worker.take(source.past[begin : begin + CHUNK], put_off=True)
    worker.make_due()
    day, six = Popularity(), Popularity(DAY_MS // 4)
    markov, alone = Markov(day), Markov(Popularity())
    for click in source.past:
        _learn(click, day, six, markov, alone)
    tell(f"past of {len(source.past)} clicks folded, {time.monotonic() - began_s:.0f} s")

    every_ms = round((retrain_every_h or 24) * HOUR_MS)
    start_ms = source.first_ms or 0
    total = {name: Tally() for name in METHODS}
    stretch = _Stretch(start_ms + every_ms, {name: Tally() for name in METHODS})
    curve: list[Point] = []
    releases, unranked, num_clicks = 1, 0, len(source.past)
    for event in source.live:
        if isinstance(event, Item):
            worker.take_item(event)
            catalogue.append(event)
            continue
        now_ms = event.timestamp_ms or 0
        while now_ms >= stretch.until_ms:
            if (point := _point(stretch, start_ms)) is not None:
                curve.append(point)
                tell(f"hour {point.hours:g}: HR@20 {100 * point.hit_rate_20:.1f}")
            if retrain_every_h:
                export(num_clicks)
                releases += 1
            # A long silence needs one release, not one for every stretch of it.
            skipped = max(0, (now_ms - stretch.until_ms) // every_ms)
            stretch = _Stretch(
                stretch.until_ms + (skipped + 1) * every_ms, {name: Tally() for name in METHODS}
            )
        if event.item_id:
            user, clicked = event.user_id, event.item_id
            ranks = {
                "standing": _place(worker.standing(user), clicked),
                "at_click": _place(worker.at_click(user, now_ms), clicked),
                "popularity_24h": day.rank(clicked),
                "popularity_6h": six.rank(clicked),
                "markov": alone.rank(user, clicked),
                "markov_popularity": markov.rank(user, clicked),
            }
            for name, rank in ranks.items():
                total[name].add(rank)
                stretch.tallies[name].add(rank)
            unranked += worker.catalog.row(clicked) is None
        worker.take([event])
        _learn(event, day, six, markov, alone)
        num_clicks += 1
    if (point := _point(stretch, start_ms)) is not None:
        curve.append(point)
    methods = {name: _rates(tally.rates()) for name, tally in total.items()}
    return Live(
        test=methods["at_click"],
        methods=methods,
        curve=curve,
        releases=releases,
        unranked=unranked,
        training_s=round(training_s, 1),
        seconds=round(time.monotonic() - began_s, 1),
    )


def describe_live(live: Live) -> str:
    """A table of methods and the curve, in percent."""
    lines = [f"live: {int(live.test['predictions'])} clicks, {live.releases} releases"]
    lines.append(f"{'':<20}{'HR@20':>7}{'MRR@20':>8}")
    for name, values in live.methods.items():
        lines.append(f"{name:<20}{100 * values['hit_rate_20']:7.1f}{100 * values['mrr_20']:8.1f}")
    lines.append(f"{'hours':>8}{'clicks':>8}{'HR@20':>7}{'standing':>9}{'markov_popularity':>18}")
    for point in live.curve:
        lines.append(
            f"{point.hours:8g}{point.clicks:8}{100 * point.hit_rate_20:7.1f}"
            f"{100 * point.standing_hit_rate_20:9.1f}"
            f"{100 * point.markov_popularity_hit_rate_20:18.1f}"
        )
    lines.append(f"clicks on items without a row: {live.unranked}")
    return "\n".join(lines) + "\n"


def _trained(
    columns: Columns, catalogue: list[Item], settings: TrainingSettings, serving: ServingSettings
) -> LoadedRelease:
    """A release of the clicks and items so far, published and loaded as a worker loads it."""
    items = {item.item_id: item_row(item) for item in catalogue}
    source = source_of("live", columns)._replace(items=items, items_offset=[len(catalogue)])
    train_release(source, settings, serving)
    store = ReleaseStore(serving.releases, serving.releases_cache)
    publication = store.current()
    assert publication is not None, "train_release has just published one"
    return LoadedRelease(publication, Path(store.fetch(publication.release)), serving)


def _refuse(letters: list[DeadLetter]) -> None:
    raise AssertionError(f"live: a click that its file's reader took: {letters[0].message}")


def _learn(click: Click, day: Popularity, six: Popularity, markov: Markov, alone: Markov) -> None:
    if not click.item_id:
        return
    time_ms = click.timestamp_ms or 0
    day.learn(click.item_id, time_ms)
    six.learn(click.item_id, time_ms)
    markov.learn(click.user_id, click.item_id)
    alone.learn(click.user_id, click.item_id)


def _place(items: list[str], item: str) -> int:
    return next((at for at, other in enumerate(items, 1) if other == item), MISS)


def _point(stretch: _Stretch, start_ms: int) -> Point | None:
    own = {name: tally.rates() for name, tally in stretch.tallies.items()}
    if not own["standing"].clicks:
        return None
    return Point(
        hours=round((stretch.until_ms - start_ms) / HOUR_MS, 2),
        clicks=own["at_click"].clicks,
        hit_rate_20=own["at_click"].hit_rate_20,
        mrr_20=own["at_click"].mrr_20,
        standing_hit_rate_20=own["standing"].hit_rate_20,
        standing_mrr_20=own["standing"].mrr_20,
        markov_popularity_hit_rate_20=own["markov_popularity"].hit_rate_20,
    )


def _rates(found: Rates) -> dict[str, float]:
    return {
        "hit_rate_20": found.hit_rate_20,
        "mrr_20": found.mrr_20,
        "predictions": float(found.clicks),
    }
