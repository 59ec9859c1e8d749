"""Where clicks and items come from: files, or Kafka's topics from their beginning to their end.

Knows no model. Every click becomes an entry of `data.Columns`, whatever its source.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import ItemRow, Snapshot
from afterclick.streams.events import FoldEvent, Item, decode_click, decode_item
from afterclick.streams.settings import StreamsSettings
from afterclick.training.data import Columns

if TYPE_CHECKING:
    from afterclick.streams.columns import ClickColumns, ItemColumns
    from afterclick.streams.joined import JoinedLog
    from afterclick.streams.record import Record

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Everything a training run reads."""

    columns: Columns
    items: dict[str, ItemRow]
    """Catalogue as of its latest versions, by item id."""
    snapshot: Snapshot
    items_offset: list[int]
    """Next offset per partition of the items topic; empty for files."""
    num_bad: int = 0
    """Records of the topics that are neither click nor item."""
    signals_offset: int = 0
    """The signals topic tells nothing new to a memory of this snapshot below this offset."""


def read_files(
    clicks: Path,
    items: Path | None,
    click_columns: "ClickColumns | None" = None,
    item_columns: "ItemColumns | None" = None,
) -> Source:
    """Read clicks, and items where they are given, from files.

    Raises:
        ConfigError: a file or a column is not there.
        ContractError: a file cannot be read.
    """
    columns = read_columns(clicks, click_columns)
    return source_of(clicks.name, columns, items, item_columns)


def source_of(
    name: str,
    columns: Columns,
    items: Path | None = None,
    item_columns: "ItemColumns | None" = None,
) -> Source:
    """Clicks at hand, and items of a file where one is given; `name` is for the manifest.

    Raises:
        ConfigError: the file or a column is not there.
        ContractError: the file cannot be read.
    """
    from afterclick.streams.files import read_items

    catalogue = [] if items is None else read_items(items, item_columns)
    return Source(columns, _rows(catalogue), _snapshot(name, columns, {}), [])


def read_columns(clicks: Path, click_columns: "ClickColumns | None" = None) -> Columns:
    """Clicks of one file; times count only where every click has one.

    Raises:
        ConfigError: the file or a column is not there.
        ContractError: the file cannot be read.
    """
    from afterclick.streams.files import read_clicks

    table = read_clicks(clicks, click_columns)
    time_ms = event_id = None
    if table["timestamp_ms"].null_count == 0:
        time_ms = table["timestamp_ms"].to_numpy().astype(np.int64)
    elif table["timestamp_ms"].null_count < table.num_rows:
        log.warning("%s: some clicks have no time, so the file's order counts", clicks.name)
    if table["event_id"].null_count < table.num_rows:
        event_id = table["event_id"].to_numpy(zero_copy_only=False)
    user, item, event = (
        table[name].to_numpy(zero_copy_only=False).astype(object)
        for name in ("user_id", "item_id", "event")
    )
    return Columns(user, item, event, time_ms, event_id)


def read_topic(settings: StreamsSettings) -> Source:
    """Read both topics from their beginning to where they end when this is called.

    Where an archive is set and Kafka has dropped the beginning, it is the archive's. Bad records
    are counted and skipped, as a worker sends them to the dead letters. Every partition's records
    keep their order; a user's are all in one.

    Raises:
        ConfigError: a topic is not there.
        ContractError: records are in neither topic nor archive.
        UnavailableError: the broker does not answer.
    """
    from afterclick.streams.joined import JoinedLog

    reader = JoinedLog(settings)
    try:
        # Before the clicks' ends: what is told by now is of clicks that will be read.
        told = reader.num_partitions(settings.signals_topic)
        signals_offset = reader.edges(settings.signals_topic, 0)[1] if told else 0
        clicks = _decoded(reader, settings, settings.clicks_topic, _click)
        items = _decoded(reader, settings, settings.items_topic, _item)
    finally:
        reader.close()
    columns = Columns(
        _objects([click.user_id for click in clicks.found]),
        _objects([click.item_id for click in clicks.found]),
        _objects([click.event for click in clicks.found]),
        np.array([click.event_ms for click in clicks.found], np.int64),
        _objects([click.event_id for click in clicks.found]),
    )
    if not any(click.event_id for click in clicks.found):
        columns = columns._replace(event_id=None)
    offsets = {str(partition): end for partition, end in enumerate(clicks.ends)}
    return Source(
        columns,
        _rows(items.found),
        _snapshot(f"kafka:{settings.clicks_topic}", columns, offsets),
        items.ends,
        clicks.num_bad + items.num_bad,
        signals_offset,
    )


class _Decoded(NamedTuple):
    found: list[Any]
    ends: list[int]
    num_bad: int


def _click(record: "Record") -> FoldEvent:
    return decode_click(
        record.key, record.value, offset=record.offset, record_ms=record.timestamp_ms
    )


def _item(record: "Record") -> Item:
    return decode_item(record.key, record.value)


def _decoded(
    reader: "JoinedLog",
    settings: StreamsSettings,
    topic: str,
    decode: Callable[["Record"], Any],
) -> _Decoded:
    """Everything in a topic that decodes, partition after partition."""
    num_partitions = reader.num_partitions(topic)
    if not num_partitions:
        raise ConfigError(
            f"Kafka at {settings.broker}: no topic {topic!r}; "
            "create it with `afterclick topics create`"
        )
    # All ends first: clicks that come while this reads belong to the next run.
    edges = [reader.edges(topic, partition) for partition in range(num_partitions)]
    found: list[Any] = []
    num_bad = 0
    for partition, (start, end) in enumerate(edges):
        for records in reader.read(topic, partition, start, end):
            for record in records:
                try:
                    found.append(decode(record))
                except ContractError:
                    num_bad += 1
    return _Decoded(found, [end for _, end in edges], num_bad)


def item_row(item: Item) -> ItemRow:
    """An item event as a row of the catalogue, with everything that the trainer reads."""
    return ItemRow(
        item_id=item.item_id,
        title=item.title,
        categories=item.categories,
        published_ms=item.published_ms,
        available=item.available,
        text=item.text,
        domain=item.domain,
        vector=item.vector,
    )


def _rows(items: Iterable[Item]) -> dict[str, ItemRow]:
    """The last version of every item."""
    return {item.item_id: item_row(item) for item in items}


def _snapshot(source: str, columns: Columns, offsets: dict[str, int]) -> Snapshot:
    times = columns.time_ms
    has_times = times is not None and len(times) > 0
    return Snapshot(
        source=source,
        offsets=offsets,
        num_events=len(columns.user),
        first_ms=int(times.min()) if has_times and times is not None else 0,
        last_ms=int(times.max()) if has_times and times is not None else 0,
    )


def _objects(values: list[Any]) -> "np.ndarray[Any, np.dtype[np.object_]]":
    array = np.empty(len(values), object)
    array[:] = values
    return array
