"""What the demo sends: a past to train on, and what happens live, from the click world or files.

Knows no Kafka, Redis or process.
"""

import heapq
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from afterclick.serving.errors import ConfigError
from afterclick.streams.columns import ClickColumns, ItemColumns
from afterclick.streams.events import Click, Item
from afterclick.streams.files import read_clicks, read_items
from afterclick.streams.replay import Pace, clicks_of
from afterclick.streams.synthetic import World

FILE_RATE = 50.0
"""Clicks per second of a replayed file unless told otherwise, as many as the click world makes."""


class DemoSource(NamedTuple):
    """One demo's events."""

    name: str
    items: list[Item]
    """The catalogue at the moment when live begins."""
    past: list[Click]
    live: Iterator[Click | Item]
    """In time order; new items come before they are clicked. Ends with a file's end."""
    pace: Pace
    first_ms: int | None
    """Event time from which `pace.speed` counts."""


def from_world(
    *, seed: int, num_users: int, num_items: int, num_past: int, pace: Pace, now_ms: int
) -> DemoSource:
    """The click world, whose past ends now."""
    world = World(seed, num_users, num_items)
    past = list(world.past(num_past, now_ms))
    if pace == Pace():
        pace = Pace(speed=1.0)
    return DemoSource("the click world", world.items(), past, world.live(), pace, now_ms)


def from_files(
    clicks: Path,
    items: Path | None,
    click_columns: ClickColumns,
    item_columns: ItemColumns,
    *,
    train_share: float,
    from_s: float | None,
    pace: Pace,
) -> DemoSource:
    """A log in files: its first part is the past, the rest is live.

    Items published after the cut come live, at their time; all others are there from the beginning.

    Args:
        clicks: the log.
        items: the catalogue; without one, items are known by their clicks alone.
        click_columns: names in the log.
        item_columns: names in the catalogue.
        train_share: share of the clicks that is the past, unless `from_s` says it by time.
        from_s: unix seconds where live begins.
        pace: of the live part; `FILE_RATE` where none is given.

    Raises:
        ConfigError: one of the two parts is empty, or the pace needs times that are not there.
        ContractError: a file breaks its contract.
    """
    table = read_clicks(clicks, click_columns)
    times = table.column("timestamp_ms")
    if times.null_count and (from_s is not None or pace.speed is not None):
        raise ConfigError(f"{clicks}: --from and --speed need the time of every click")
    cut = round(table.num_rows * train_share)
    if from_s is not None:
        cut = pc.sum(pc.less(times, round(from_s * 1000))).as_py() or 0
    if not 0 < cut < table.num_rows:
        raise ConfigError(
            f"{clicks}: {cut} of {table.num_rows} clicks would be the past; "
            "expected some before and some after, see --train-share and --from"
        )
    catalogue = read_items(items, item_columns) if items else []
    live = table.slice(cut)
    first_ms = live.column("timestamp_ms")[0].as_py()
    there: list[Item] = []
    coming: list[Item] = []
    for item in catalogue:
        new = (
            first_ms is not None and item.published_ms is not None and item.published_ms > first_ms
        )
        (coming if new else there).append(item)
    if pace == Pace():
        pace = Pace(rate=FILE_RATE)
    events = with_items(clicks_of(live), coming)
    return DemoSource(
        clicks.name, there, list(clicks_of(table.slice(0, cut))), events, pace, first_ms
    )


def with_items(clicks: Iterable[Click], coming: Iterable[Item]) -> Iterator[Click | Item]:
    """Both by time; an item stands before a click of the same millisecond."""
    ordered = sorted(coming, key=lambda item: item.published_ms or 0)
    items = (((item.published_ms or 0, 0), item) for item in ordered)
    events = (((click.timestamp_ms or 0, 1), click) for click in clicks)
    pairs: Iterator[tuple[tuple[int, int], Click | Item]] = heapq.merge(
        items, events, key=itemgetter(0)
    )
    return (event for _, event in pairs)
