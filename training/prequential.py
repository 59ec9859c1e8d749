"""Prequential evaluation: a log is replayed through the worker's own path, in one process.

Before each click of the live part two lists are judged, then the click is folded: the one that
stood for the user (the fallback list for a user without one), and one made at that moment from the
user's record and all that is in force. Ties cannot occur: lists are ordered.

The past is folded under the first release, trained on it; every so often the trainer makes another
from all clicks so far. In between the worker renews the lists of recent users, as its background
pass does. Of such a pass only the lists are made that somebody will be judged by before the next
pass: the others would be replaced unseen, and nothing else depends on a list.
"""

import bisect
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from afterclick.serving.manifest import ItemRow
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.streams.demo_source import DemoSource
from afterclick.streams.events import Click, Item
from afterclick.streams.score import DAY_MS, MISS, Markov, Popularity, Rates, Tally
from afterclick.training.blending import Fitted as FittedBlend
from afterclick.training.blending import Scorer, model_at_zero
from afterclick.training.data import Columns
from afterclick.training.live_worker import CHUNK, LiveWorker
from afterclick.training.pipeline import train_release
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import source_of

HOUR_MS = 3600 * 1000

METHODS = ("standing", "at_click", "popularity_24h", "popularity_6h", "markov", "markov_popularity")
"""And where the releases have a blend: `at_click_without_model`, one that was fitted anew without
the model's features and candidates, and `at_click_model_at_zero`, the release's own with the
model's features counted as missing.
"""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often what happens, in event time; part of the result."""

    retrain_every_h: float = 24.0
    """0 keeps the first release."""
    renew_every_s: float = 300.0
    renew_users_max: int = 10_000
    """Users of a renewal, those who clicked last; 0 never renews."""


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
    """The same for `METHODS`; a method's `known_…` leaves first clicks on an item out."""
    curve: list[Point]
    pace: Pace
    releases: int
    """Trained and put in force, the first one included."""
    first_clicks: dict[str, float]
    """The same as `test` for clicks on items that nobody had clicked before."""
    unranked: int
    """Clicks on items that no release or catalogue had a row for: out of the model's reach."""
    us_per_list: float
    """Microseconds of a list that stood, the fold of its click included."""
    training_s: float
    seconds: float


class _Stretch(NamedTuple):
    until_ms: int
    tallies: dict[str, Tally]


class _Baselines:
    """What needs no release."""

    def __init__(self) -> None:
        self.clicked: set[str] = set()
        self._day, self._six = Popularity(), Popularity(DAY_MS // 4)
        self._markov, self._alone = Markov(self._day), Markov(Popularity())

    def ranks(self, user: str, item: str) -> dict[str, int]:
        return {
            "popularity_24h": self._day.rank(item),
            "popularity_6h": self._six.rank(item),
            "markov": self._alone.rank(user, item),
            "markov_popularity": self._markov.rank(user, item),
        }

    def learn(self, click: Click) -> None:
        if not click.item_id:
            return
        self.clicked.add(click.item_id)
        for popularity in (self._day, self._six):
            popularity.learn(click.item_id, click.timestamp_ms or 0)
        for markov in (self._markov, self._alone):
            markov.learn(click.user_id, click.item_id)


class Renewals:
    """Whose lists a pass makes: recent users who will click before the next one."""

    def __init__(self, clicks: list[Click], pace: Pace, start_ms: int) -> None:
        self._clicks = clicks
        self._times = [click.timestamp_ms or 0 for click in clicks]
        self._pace = pace
        self._every_ms = round(pace.renew_every_s * 1000)
        self._next_ms = start_ms

    def due(
        self, recent: Callable[[int], list[str]], now_ms: int, *, at_once: bool = False
    ) -> list[str]:
        """Users to renew before a click at `now_ms`; `at_once` after a swap."""
        if not self._pace.renew_users_max or not (at_once or now_ms >= self._next_ms):
            return []
        # Passes since the last click would all have made the same lists but for the last one's.
        passed = max(0, now_ms - self._next_ms) // self._every_ms
        self._next_ms += (passed + (now_ms >= self._next_ms)) * self._every_ms
        begin = bisect.bisect_left(self._times, now_ms)
        end = bisect.bisect_left(self._times, self._next_ms)
        coming = {click.user_id for click in self._clicks[begin:end]}
        return [u for u in recent(self._pace.renew_users_max) if u in coming]


def run_live(
    source: DemoSource,
    columns: Columns,
    settings: TrainingSettings,
    serving: ServingSettings,
    pace: Pace,
    *,
    tell: Callable[[str], None] = lambda _line: None,
) -> Live:
    """Replay a log's live part and judge every list before its click.

    Args:
        source: past, live part and items, as the demo splits them.
        columns: the same clicks in the same order, for the trainer.
        settings: of every training run; its validation part is the newest clicks so far.
        serving: rules, and a folder for the releases of this evaluation alone.
        pace: how often what happens.
        tell: given a line of progress now and then.
    """
    began_s = time.monotonic()
    if settings.blend_memory == "auto":  # a worker's memory takes every click in
        settings = msgspec.structs.replace(settings, blend_memory="live")
    worker = LiveWorker(serving, signals_from=len(source.past))
    catalogue: list[Item] = []
    for item in source.items:
        worker.take_item(item)
        catalogue.append(item)
    training_s = 0.0
    without: Scorer | None = None

    def on_blend(blend: FittedBlend) -> None:
        nonlocal without
        without = blend.scorers.get("blend_without_model")

    def export(num_clicks: int) -> None:
        nonlocal training_s
        started_s = time.monotonic()
        so_far = columns.select(slice(num_clicks))
        worker.swap(_trained(so_far, catalogue, settings, serving, on_blend))
        training_s += time.monotonic() - started_s

    export(len(source.past))
    tell(f"trained on {len(source.past)} clicks, {time.monotonic() - began_s:.0f} s")
    baselines = _Baselines()
    for begin in range(0, len(source.past), CHUNK):
        worker.take(source.past[begin : begin + CHUNK], put_off=True)
    worker.make_due()
    for click in source.past:
        baselines.learn(click)
    tell(f"past folded, {time.monotonic() - began_s:.0f} s")

    live = list(source.live)
    start_ms = source.first_ms or 0
    renewals = Renewals([event for event in live if isinstance(event, Click)], pace, start_ms)
    every_ms = round((pace.retrain_every_h or 24) * HOUR_MS)
    total: dict[str, Tally] = {}
    first = Tally()
    stretch = _Stretch(start_ms + every_ms, {})
    curve: list[Point] = []
    releases, unranked, num_clicks = 1, 0, len(source.past)
    for event in live:
        if isinstance(event, Item):
            worker.take_item(event)
            catalogue.append(event)
            continue
        now_ms = event.timestamp_ms or 0
        swapped = False
        while now_ms >= stretch.until_ms:
            if (point := _point(stretch, start_ms)) is not None:
                curve.append(point)
                tell(_told(point, time.monotonic() - began_s))
            if pace.retrain_every_h:
                export(num_clicks)
                releases, swapped = releases + 1, True
            # A long silence needs one release, not one for every stretch of it.
            skipped = max(0, (now_ms - stretch.until_ms) // every_ms)
            stretch = _Stretch(stretch.until_ms + (skipped + 1) * every_ms, {})
        worker.renew(renewals.due(worker.recent_users, now_ms, at_once=swapped))
        if event.item_id:
            user, clicked = event.user_id, event.item_id
            ranks = {
                "standing": _place(worker.standing(user), clicked),
                "at_click": _place(worker.at_click(user, now_ms), clicked),
                **baselines.ranks(user, clicked),
            }
            if without is not None:
                own = worker.at_click_by(without, user, now_ms)
                ranks["at_click_without_model"] = _place(own, clicked)
            if worker.loaded is not None and worker.loaded.blend is not None:
                own = worker.at_click_by(model_at_zero(worker.loaded.blend), user, now_ms)
                ranks["at_click_model_at_zero"] = _place(own, clicked)
            for tallies in (total, stretch.tallies):
                for name, rank in ranks.items():
                    tallies.setdefault(name, Tally()).add(rank)
            if clicked not in baselines.clicked:
                first.add(ranks["at_click"])
            unranked += worker.catalog.row(clicked) is None
        worker.take([event])
        baselines.learn(event)
        num_clicks += 1
    if (point := _point(stretch, start_ms)) is not None:
        curve.append(point)
    methods = {name: _rates(tally.rates()) for name, tally in total.items()}
    return Live(
        test=methods["at_click"],
        methods=methods,
        curve=curve,
        pace=pace,
        releases=releases,
        first_clicks=_rates(first.rates()),
        unranked=unranked,
        us_per_list=round(1e6 * worker.list_s / max(worker.num_lists, 1), 1),
        training_s=round(training_s, 1),
        seconds=round(time.monotonic() - began_s, 1),
    )


def describe_live(live: Live) -> str:
    """A table of methods and the curve, in percent."""
    pace = live.pace
    lines = [
        f"live: {int(live.test['predictions'])} clicks, {live.releases} releases, one every "
        f"{pace.retrain_every_h:g} h; lists of the last {pace.renew_users_max} users renewed every "
        f"{pace.renew_every_s:g} s; {live.us_per_list:.0f} µs a list"
    ]
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
    first = live.first_clicks
    lines.append(
        f"first clicks on an item: {int(first['predictions'])}, HR@20 "
        f"{100 * first['hit_rate_20']:.1f}; clicks on items without a row: {live.unranked}"
    )
    return "\n".join(lines) + "\n"


def _trained(
    columns: Columns,
    catalogue: list[Item],
    settings: TrainingSettings,
    serving: ServingSettings,
    on_blend: Callable[[FittedBlend], None],
) -> LoadedRelease:
    """A release of the clicks and items so far, published and loaded as a worker loads it."""
    items = {
        item.item_id: ItemRow(
            item_id=item.item_id,
            title=item.title,
            categories=item.categories,
            published_ms=item.published_ms,
            available=item.available,
        )
        for item in catalogue
    }
    source = source_of("live", columns)._replace(items=items, items_offset=[len(catalogue)])
    train_release(source, settings, serving, baselines=False, on_blend=on_blend)
    store = ReleaseStore(serving.releases, serving.releases_cache)
    publication = store.current()
    assert publication is not None, "train_release has just published one"
    return LoadedRelease(publication, Path(store.fetch(publication.release)), serving)


def _place(items: list[str], item: str) -> int:
    return next((at for at, other in enumerate(items, 1) if other == item), MISS)


def _told(point: Point, seconds: float) -> str:
    return (
        f"hour {point.hours:g}: HR@20 {100 * point.hit_rate_20:.1f}, standing "
        f"{100 * point.standing_hit_rate_20:.1f}, {seconds:.0f} s"
    )


def _point(stretch: _Stretch, start_ms: int) -> Point | None:
    own = {name: tally.rates() for name, tally in stretch.tallies.items()}
    if not own:
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
