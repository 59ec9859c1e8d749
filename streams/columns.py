"""Which column of a file holds what: told by options, guessed from the usual names otherwise.

Reads no file; `files.py` does.
"""

import argparse
from typing import Literal, get_args

import msgspec

from afterclick.serving.errors import ConfigError
from afterclick.serving.manifest import EVENTS
from afterclick.streams.events import NO_ITEM_EVENTS

KINDS = (*EVENTS[1:], *sorted(NO_ITEM_EVENTS))
"""Events that mean something of their own; all others are alike."""

TimeUnit = Literal["auto", "s", "ms", "us", "ns"]


class ClickColumns(msgspec.Struct, frozen=True, kw_only=True):
    """Where a file keeps what; empty means the usual names, and a name given must be there."""

    user: str = ""
    """Usually `user_id`, else `session_id` and others (`files.USER_NAMES`)."""
    item: str = ""
    """Usually `item_id`."""
    time: str = ""
    """Usually `timestamp_ms`, else `timestamp`, `time`; a file without times keeps its order."""
    order: str = ""
    """Numbers that order rows of equal times, where times are days, say; empty: the file's order.
    """
    event: str = ""
    """Usually `event`; without one every row is a `click`."""
    event_kinds: tuple[tuple[str, str], ...] = ()
    """Names in the event column, and which of `KINDS` each stands for."""
    event_id: str = ""
    """Usually `event_id`, may be missing."""
    time_unit: TimeUnit = "auto"
    """Of numbers in the time column: `auto` is ms for a name that ends in `_ms`, else the coarsest
    unit in which not all are past the year 5000.
    """
    names: tuple[str, ...] = ()
    """Of a CSV file without a header: its columns in order. Empty: the first line has them."""
    skip_incomplete: bool = False
    """Leave out rows that lack a user or an item, and say how many; else the first one is an error.
    """


class ItemColumns(msgspec.Struct, frozen=True, kw_only=True):
    """Where a catalogue file keeps what; empty means the usual names, only the id must exist."""

    item: str = ""
    """Usually `item_id`."""
    title: str = ""
    """Usually `title`, else `name` and others (`files.TITLE_NAMES`)."""
    text: str = ""
    """Usually `text`, else `description` and others."""
    categories: str = ""
    """Usually `categories`, else `genres` and others: lists, or text split on `|`."""
    published: str = ""
    """Usually `published_ms`, else `published_at`."""
    available: str = ""
    """Usually `available`: true/false or 1/0; without one everything is."""
    time_unit: TimeUnit = "auto"
    """Of numbers in the column of publication, as in `ClickColumns`."""


def add_click_columns(parser: argparse.ArgumentParser) -> None:
    """Options that name the columns of a file of clicks."""
    group = parser.add_argument_group("columns of the clicks file")
    group.add_argument("--user-column", default="", help="default: user_id, session_id, …")
    group.add_argument("--item-column", default="", help="default: item_id, item, …")
    group.add_argument("--time-column", default="", help="default: timestamp, time, …")
    group.add_argument("--order-column", default="", help="numbers: order among equal times")
    group.add_argument("--event-column", default="", help="default: event, may be missing")
    group.add_argument(
        "--event-kinds",
        default="",
        metavar="NAME=KIND,…",
        help=f"what names in the event column stand for, each one of {', '.join(KINDS)}",
    )
    group.add_argument("--event-id-column", default="", help="default: event_id, may be missing")
    group.add_argument(
        "--time-unit",
        choices=get_args(TimeUnit),
        default="auto",
        help="unit of numbers; auto: ms for a column named *_ms, else s, or finer where too large",
    )
    group.add_argument(
        "--columns",
        default="",
        metavar="NAME,…",
        help="the file has no header; its columns are these, in order",
    )
    group.add_argument(
        "--skip-incomplete",
        action="store_true",
        help="leave out rows without a user or an item, and say how many",
    )


def click_columns(options: argparse.Namespace) -> ClickColumns:
    """What `add_click_columns` parsed.

    Raises:
        ConfigError: `--event-kinds` does not say what it should.
    """
    return ClickColumns(
        user=options.user_column,
        item=options.item_column,
        time=options.time_column,
        order=options.order_column,
        event=options.event_column,
        event_kinds=_event_kinds(options.event_kinds),
        event_id=options.event_id_column,
        time_unit=options.time_unit,
        names=tuple(filter(None, (name.strip() for name in options.columns.split(",")))),
        skip_incomplete=options.skip_incomplete,
    )


def _event_kinds(told: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in filter(None, (part.strip() for part in told.split(","))):
        name, _, kind = (part.strip() for part in pair.partition("="))
        if not name or kind not in KINDS:
            raise ConfigError(
                f"--event-kinds: expected NAME=KIND, a kind being one of {', '.join(KINDS)}; "
                f"got {pair!r}"
            )
        pairs.append((name, kind))
    return tuple(pairs)


def add_item_columns(parser: argparse.ArgumentParser) -> None:
    """Options that name the columns of a catalogue file."""
    group = parser.add_argument_group("columns of the items file")
    group.add_argument("--items-id-column", default="", help="default: item_id")
    group.add_argument("--title-column", default="", help="default: title, name, …")
    group.add_argument("--text-column", default="", help="default: text, description, …")
    group.add_argument(
        "--categories-column", default="", help="default: categories, genres, …; split on |"
    )
    group.add_argument(
        "--published-column", default="", help="default: published_ms, else published_at"
    )
    group.add_argument("--available-column", default="", help="default: available")


def item_columns(options: argparse.Namespace) -> ItemColumns:
    """What `add_item_columns` parsed."""
    return ItemColumns(
        item=options.items_id_column,
        title=options.title_column,
        text=options.text_column,
        categories=options.categories_column,
        published=options.published_column,
        available=options.available_column,
    )
