"""Click logs and catalogues in files, tables and items out: what the columns of a table mean.

Everything runs in Arrow, nothing per row in Python. Ids are text always, whatever the file's type.
Knows no Kafka and no training: replay, the trainer and the demo all read files through here.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.streams.columns import (
    KINDS,
    ClickColumns,
    ItemColumns,
    TimeUnit,
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.streams.events import NO_ITEM_EVENTS, Item
from afterclick.streams.tables import kind_of, names_of, parts_of, read_table

__all__ = [
    "CLICKS_SCHEMA",
    "ClickColumns",
    "ItemColumns",
    "add_click_columns",
    "add_item_columns",
    "click_columns",
    "item_columns",
    "read_clicks",
    "read_items",
]

USER_NAMES = (
    *("user_id", "session_id", "user", "session", "visitor_id", "customer_id"),
    *("reviewer_id", "member_id", "client_id", "user_session", "uid", "account_id"),
)
ITEM_NAMES = (
    *("item_id", "item", "product_id", "article_id", "news_id", "movie_id", "track_id"),
    *("parent_asin", "asin", "video_id", "book_id", "artist_id", "content_id", "iid", "sku"),
    *("click_article_id", "song_id", "business_id", "game_id", "recipe_id", "stock_code"),
)
TIME_NAMES = (
    *("timestamp_ms", "timestamp", "time_ms", "time", "event_time", "ts"),
    *("datetime", "created_at", "event_date", "date", "unix_review_time", "click_timestamp"),
    *("event_timestamp", "unix_time", "order_date", "invoice_date"),
)
EVENT_NAMES = ("event", "event_type")
TITLE_NAMES = ("title", "name", "movie_title", "item_name", "product_name", "headline")
TEXT_NAMES = ("text", "description", "abstract", "body")
PUBLISHED_NAMES = ("published_ms", "published_at")
CATEGORY_NAMES = ("categories", "genres", "category", "genre", "class")
"""Usual names, the first that a file has; letters' case, `_` and a `:type` at the end do not count:
public data sets write `SessionId` and `user_id:token`.
"""

MISSING = ("", "NA", "NaN", "nan", "NULL", "null", "None", "\\N")
"""How CSV files write that a row has no user or no item: taken for an id, everybody without one
would be one user.
"""

NAMES_SHOWN = 6
"""Of the usual names an error lists so many."""

OR_ALL = ", or all by --columns where the file has no header"

ID_LENGTH_MAX, EVENT_LENGTH_MAX, EVENT_ID_LENGTH_MAX = 512, 64, 256
"""Letters, as `events.Click` has it: longer ones would be dead letters later."""

log = logging.getLogger(__name__)

SECONDS_MAX = 100_000_000_000
"""A larger number of unix seconds is past the year 5000: it is of a finer unit, or not a time."""

INT64_MAX = (1 << 63) - 1

PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNIT_NAMES: dict[TimeUnit, str] = {
    "s": "seconds (--time-unit ms, us or ns if it is those)",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}

CLICKS_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp_ms", pa.int64()),
        ("event", pa.string()),
        ("event_id", pa.string()),
    ]
)


def read_clicks(path: Path, columns: ClickColumns | None = None) -> pa.Table:
    """Read a log of clicks, oldest first; of a folder all its files as one log.

    Returns:
        Table of `CLICKS_SCHEMA`: user_id, item_id and event are text and never null, timestamp_ms
        (unix milliseconds) and event_id may be. Rows with a time are sorted by it, equal times in
        file order; rows without one come last.

    Raises:
        ConfigError: the file or a column is missing, or its kind is not known.
        ContractError: a value is not what its column promises; names file, row and value.
    """
    columns = columns or ClickColumns()
    parts = parts_of(path)
    clicks = pa.concat_tables(
        [_clicks_of(part, columns, is_first=part == parts[0]) for part in parts]
    )
    alike = sorted(set(pc.unique(clicks["event"]).to_pylist()) - set(KINDS))
    if alike:
        log.warning(
            "%s: events named %s are all alike to a model; --event-kinds says which of them are %s",
            *(path, ", ".join(alike[:NAMES_SHOWN]), ", ".join(KINDS)),
        )
    by_time = pc.sort_indices(clicks, sort_keys=[("timestamp_ms", "ascending")])
    return clicks.take(by_time).combine_chunks()


def _clicks_of(path: Path, columns: ClickColumns, *, is_first: bool) -> pa.Table:
    """Clicks of one file in its order; what is said of the first is not said of all others."""
    names = list(columns.names) or names_of(path)
    user = _pick(path, names, columns.user, USER_NAMES, f"--user-column{OR_ALL}", required=True)
    item = _pick(path, names, columns.item, ITEM_NAMES, f"--item-column{OR_ALL}", required=True)
    time = _pick(path, names, columns.time, TIME_NAMES, "--time-column")
    order = _pick(path, names, columns.order, (), "--order-column")
    event = _pick(path, names, columns.event, EVENT_NAMES, "--event-column")
    event_id = _pick(path, names, columns.event_id, ("event_id",), "--event-id-column")
    wanted = [name for name in (user, item, time, order, event, event_id) if name]
    unread = [name for name in names if name not in wanted]
    if order and not time:
        raise ConfigError(f"{path}: --order-column orders rows of equal times: name --time-column")
    if not time and unread and is_first:
        log.warning(
            "%s: no column of times is known by its name, so its rows count as being in time "
            "order; --time-column names one, if it is among %s",
            *(path, ", ".join(unread)),
        )
    table = read_table(path, wanted, columns.names)
    event_N = _events(path, table, event, columns.event_kinds)
    id_N = _short(path, table, event_id, EVENT_ID_LENGTH_MAX)
    no_item_N = pc.is_in(event_N, value_set=pa.array(sorted(NO_ITEM_EVENTS)))
    may_lack_N = pa.repeat(columns.skip_incomplete, table.num_rows)
    others = [name for name in names if name != user and _plain(name) in map(_plain, USER_NAMES)]
    hint = "an id" if not others else f"an id (or --user-column {others[0]})"
    clicks = pa.table(
        [
            _ids(path, table, user, may_lack_N=may_lack_N, expected=hint),
            _ids(path, table, item, may_lack_N=pc.or_(no_item_N, may_lack_N)),
            _times(path, table, time, columns.time_unit) if time else _nulls(table, pa.int64()),
            event_N,
            pc.if_else(pc.equal(id_N, ""), None, id_N),
        ],
        schema=CLICKS_SCHEMA,
    )
    if order:
        clicks = clicks.append_column("order", _numbers(path, table, order))
    if columns.skip_incomplete:
        clicks = _complete(path, clicks, no_item_N)
    if order:
        by = [("timestamp_ms", "ascending"), ("order", "ascending")]
        clicks = clicks.take(pc.sort_indices(clicks, sort_keys=by)).drop_columns("order")
    return clicks


def read_items(path: Path, columns: ItemColumns | None = None) -> list[Item]:
    """Read a catalogue in file order; an id that comes twice is two versions of one item.

    Of a folder all files, one after the other by name.

    Raises:
        ConfigError: the file or a named column is missing, or its kind is not known.
        ContractError: a value is not what its column promises; names file, row and value.
    """
    columns = columns or ItemColumns()
    return [item for part in parts_of(path) for item in _items_of(part, columns)]


def _items_of(path: Path, columns: ItemColumns) -> list[Item]:
    names = names_of(path)
    item = _pick(path, names, columns.item, ITEM_NAMES, "--items-id-column", required=True)
    title = _pick(path, names, columns.title, TITLE_NAMES, "--title-column")
    text = _pick(path, names, columns.text, TEXT_NAMES, "--text-column")
    tags = _pick(path, names, columns.categories, CATEGORY_NAMES, "--categories-column")
    born = _pick(path, names, columns.published, PUBLISHED_NAMES, "--published-column")
    there = _pick(path, names, columns.available, ("available",), "--available-column")
    table = read_table(path, [name for name in (item, title, text, tags, born, there) if name])
    parts = {"item_id": _ids(path, table, item)}
    if title:
        parts["title"] = pc.fill_null(_text(path, table, title), "")
    if text:
        parts["text"] = pc.fill_null(_text(path, table, text), "")
    if tags:
        parts["categories"] = _lists(path, table, tags)
    if born:
        parts["published_ms"] = _times(path, table, born, columns.time_unit)
    if there:
        parts["available"] = _flags(path, table, there)
    rows = pa.table(parts).to_pylist()
    try:
        return msgspec.convert(rows, list[Item])
    except msgspec.ValidationError as error:
        raise ContractError(f"{path}: rows count from 0: {error}", reason="schema") from error


def _pick(
    path: Path,
    names: Sequence[str],
    given: str,
    usual: Sequence[str],
    option: str,
    *,
    required: bool = False,
) -> str:
    """The column to read, "" where an optional one is missing."""
    if given in names:
        return given
    plain = {_plain(name): name for name in reversed(names)}
    for name in () if given else usual:
        if _plain(name) in plain:
            return plain[_plain(name)]
    if given or required:
        more = ", …" if len(usual) > NAMES_SHOWN else ""
        wanted = given or " or ".join(usual[:NAMES_SHOWN]) + more
        raise ConfigError(
            f"{path}: expected a column {wanted}, found {', '.join(names)}; name it by {option}"
        )
    return ""


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.partition(":")[0].lower())


def _text(path: Path, table: pa.Table, name: str) -> pa.Array:
    column = _column(table, name)
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if not pa.types.is_string(kind):
        raise ContractError(
            f"{path}: column {name}: expected text or whole numbers, got {kind}", reason="file"
        )
    return column


def _ids(
    path: Path,
    table: pa.Table,
    name: str,
    may_lack_N: pa.Array | None = None,
    expected: str = "an id",
) -> pa.Array:
    """Text of a column, empty where a row has none and may lack it."""
    ids_N = pc.fill_null(_text(path, table, name), "")
    missing = MISSING if kind_of(path) == "csv" else MISSING[:1]
    absent_N = pc.is_in(ids_N, value_set=pa.array(missing))
    refused_N = absent_N if may_lack_N is None else pc.and_(absent_N, pc.invert(may_lack_N))
    if may_lack_N is not None:
        expected += "; --skip-incomplete leaves such rows out"
    _refuse(path, name, expected, ids_N, refused_N)
    _refuse_long(path, name, ids_N, ID_LENGTH_MAX)
    return pc.if_else(absent_N, "", ids_N)


def _complete(path: Path, clicks: pa.Table, no_item_N: pa.Array) -> pa.Table:
    """Without the rows that lack a user or an item, which are counted aloud."""
    lacks_item_N = pc.and_(pc.equal(clicks["item_id"], ""), pc.invert(no_item_N))
    lacks_N = pc.or_(pc.equal(clicks["user_id"], ""), lacks_item_N)
    row = pc.index(lacks_N, True).as_py()
    if row >= 0:
        num = pc.sum(lacks_N).as_py()
        log.warning(
            "%s: left out %d of %d rows, which lack a user or an item; the first is row %d",
            *(path, num, clicks.num_rows, row + 1),
        )
    return clicks.filter(pc.invert(lacks_N))


def _events(path: Path, table: pa.Table, name: str, kinds: Sequence[tuple[str, str]]) -> pa.Array:
    """Names of events, by their kinds; `click` where there is none."""
    event_N = _short(path, table, name, EVENT_LENGTH_MAX)
    event_N = pc.fill_null(pc.if_else(pc.equal(event_N, ""), None, event_N), "click")
    if kinds:
        named, meant = (pa.array(names, pa.string()) for names in zip(*kinds, strict=True))
        event_N = pc.coalesce(meant.take(pc.index_in(event_N, value_set=named)), event_N)
    return event_N


def _short(path: Path, table: pa.Table, name: str, length_max: int) -> pa.Array:
    """Text of an optional column; all null where there is none."""
    if not name:
        return _nulls(table, pa.string())
    text_N = _text(path, table, name)
    _refuse_long(path, name, text_N, length_max)
    return text_N


def _times(path: Path, table: pa.Table, name: str, unit: TimeUnit) -> pa.Array:
    """Unix milliseconds from numbers of seconds or finer units, or from dates (UTC)."""
    column = _column(table, name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = _parsed(path, name, column)
    if pa.types.is_null(column.type):
        return column.cast(pa.int64())
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ContractError(
            f"{path}: column {name}: expected unix times or dates, got {column.type}",
            reason="file",
        )
    if unit == "auto":
        unit = "ms" if name.endswith("_ms") else _unit_of(column)
    highest: float = min(SECONDS_MAX * PER_SECOND[unit], INT64_MAX)
    if pa.types.is_floating(column.type):  # Arrow compares integers past 2^53 to no fraction
        column, highest = column.cast(pa.float64()), float(highest)
    fine_N = pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, highest))
    _refuse(path, name, f"unix {UNIT_NAMES[unit]}", column, pc.invert(fine_N))
    if pa.types.is_floating(column.type):
        return pc.round(pc.multiply(column, 1000 / PER_SECOND[unit])).cast(pa.int64())
    if unit == "s":
        return pc.multiply(column.cast(pa.int64()), 1000)
    return pc.divide(column.cast(pa.int64()), PER_SECOND[unit] // 1000)


def _numbers(path: Path, table: pa.Table, name: str) -> pa.Array:
    column = _column(table, name)
    try:
        return column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ContractError(
            f"{path}: column {name}: expected numbers: {error}", reason="file"
        ) from error


def _unit_of(column: pa.Array) -> TimeUnit:
    """The coarsest unit in which the least number is not too late."""
    least = pc.min(column).as_py() or 0
    fits = (unit for unit, num in PER_SECOND.items() if least <= SECONDS_MAX * num)
    return next(fits, "s")


def _parsed(path: Path, name: str, text_N: pa.Array) -> pa.Array:
    text_N = pc.if_else(pc.equal(text_N, ""), None, text_N)
    text_N = pc.replace_substring_regex(text_N, " UTC$", "Z")
    for kind in (pa.int64(), pa.float64(), pa.timestamp("ms"), pa.timestamp("ms", "UTC")):
        try:
            return text_N.cast(kind)
        except pa.ArrowInvalid:
            continue
    number = r"^[0-9]+(\.[0-9]*)?$"
    _refuse(
        path,
        name,
        "unix times (or every row a date as 2026-12-31 08:26:00)",
        text_N,
        pc.invert(pc.match_substring_regex(text_N, number)),
    )
    raise ContractError(f"{path}: column {name}: mixes numbers and dates", reason="file")


def _lists(path: Path, table: pa.Table, name: str) -> pa.Array:
    column = _column(table, name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(column.cast(pa.list_(pa.string())), [])
    text_N = pc.fill_null(_text(path, table, name), "")
    mark = " " if name.endswith(":token_seq") else "|"  # RecBole says what a column is
    return pc.if_else(
        pc.equal(text_N, ""), pa.scalar([], pa.list_(pa.string())), pc.split_pattern(text_N, mark)
    )


def _flags(path: Path, table: pa.Table, name: str) -> pa.Array:
    column = _column(table, name)
    if not pa.types.is_boolean(column.type):
        text_N = pc.utf8_lower(_text(path, table, name))
        text_N = pc.if_else(pc.equal(text_N, ""), None, text_N)
        yes_N = pc.is_in(text_N, value_set=pa.array(["1", "true", "yes"]))
        no_N = pc.is_in(text_N, value_set=pa.array(["0", "false", "no"]))
        bad_N = pc.invert(pc.or_(pc.or_(yes_N, no_N), pc.is_null(text_N)))
        _refuse(path, name, "true or false", text_N, bad_N)
        column = pc.if_else(pc.is_null(text_N), None, yes_N)
    return pc.fill_null(column, True)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _nulls(table: pa.Table, kind: pa.DataType) -> pa.Array:
    return pa.nulls(table.num_rows, kind)


def _refuse_long(path: Path, name: str, text_N: pa.Array, length_max: int) -> None:
    long_N = pc.greater(pc.utf8_length(text_N), length_max)
    _refuse(path, name, f"at most {length_max} letters", text_N, long_N)


def _refuse(path: Path, name: str, expected: str, values_N: pa.Array, bad_N: pa.Array) -> None:
    """Raise for the first row that is bad, by number and value."""
    row = pc.index(pc.fill_null(bad_N, False), True).as_py()
    if row >= 0:
        value = str(values_N[row].as_py())[:64]
        raise ContractError(
            f"{path}: row {row + 1}, column {name}: expected {expected}, got {value!r}",
            reason="file",
        )
