"""Click logs and catalogues in files: CSV, Parquet or JSON lines in, tables and items out.

Everything runs in Arrow, nothing per row in Python. Ids are text always, whatever the file's type.
Knows no Kafka and no training: replay, the trainer and the demo all read files through here.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from afterclick.serving.errors import AfterclickError, ConfigError, ContractError
from afterclick.streams.columns import (
    ClickColumns,
    ItemColumns,
    TimeUnit,
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.streams.events import NO_ITEM_EVENTS, Item

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
    *("reviewer_id", "member_id", "client_id", "user_session"),
)
ITEM_NAMES = (
    *("item_id", "item", "product_id", "article_id", "news_id", "movie_id", "track_id"),
    *("asin", "video_id", "book_id", "artist_id", "content_id"),
)
TIME_NAMES = (
    *("timestamp_ms", "timestamp", "time_ms", "time", "event_time", "ts"),
    *("datetime", "created_at", "event_date", "date"),
)
EVENT_NAMES = ("event", "event_type")
PUBLISHED_NAMES = ("published_ms", "published_at")
CATEGORY_NAMES = ("categories", "genres")
"""Usual names, the first that a file has; letters' case, `_` and a `:type` at the end do not count:
public data sets write `SessionId` and `user_id:token`.
"""

MISSING = ("", "NA", "NaN", "nan", "NULL", "null", "None", "\\N")
"""How CSV files write that a row has no user or no item: taken for an id, everybody without one
would be one user.
"""

CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".inter")
"""The last is RecBole's."""

OR_ALL = ", or all by --columns where the file has no header"

ID_LENGTH_MAX, EVENT_LENGTH_MAX, EVENT_ID_LENGTH_MAX = 512, 64, 256
"""Letters, as `events.Click` has it: longer ones would be dead letters later."""

log = logging.getLogger(__name__)

TIME_MS_MAX = 1 << 53
"""As `events.Click` has it; beyond, JSON readers lose digits."""

SECONDS_MAX = 100_000_000_000
"""A larger number of unix seconds is past the year 5000: it is milliseconds, or not a time."""

HEADER_BYTES_MAX = 1 << 16
"""A longer header is cut where the delimiter is looked for."""

BLOCK_BYTES = 16 << 20
"""One JSON line must fit in a block; items carry texts up to 64 KiB."""

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
    """Read a log of clicks, oldest first.

    Returns:
        Table of `CLICKS_SCHEMA`: user_id, item_id and event are text and never null, timestamp_ms
        (unix milliseconds) and event_id may be. Rows with a time are sorted by it, equal times in
        file order; rows without one come last.

    Raises:
        ConfigError: the file or a column is missing, or its kind is not known.
        ContractError: a value is not what its column promises; names file, row and value.
    """
    columns = columns or ClickColumns()
    found = _names(path)
    names = list(columns.names) or found
    user = _pick(path, names, columns.user, USER_NAMES, f"--user-column{OR_ALL}", required=True)
    item = _pick(path, names, columns.item, ITEM_NAMES, f"--item-column{OR_ALL}", required=True)
    time = _pick(path, names, columns.time, TIME_NAMES, "--time-column")
    event = _pick(path, names, columns.event, EVENT_NAMES, "--event-column")
    event_id = _pick(path, names, columns.event_id, ("event_id",), "--event-id-column")
    wanted = [name for name in (user, item, time, event, event_id) if name]
    table = _read(path, wanted, columns.names)
    event_N = _short(path, table, event, EVENT_LENGTH_MAX)
    event_N = pc.fill_null(pc.if_else(pc.equal(event_N, ""), None, event_N), "click")
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
    if columns.skip_incomplete:
        clicks = _complete(path, clicks, no_item_N)
    if time:
        clicks = clicks.take(pc.sort_indices(clicks, sort_keys=[("timestamp_ms", "ascending")]))
    return clicks.combine_chunks()


def read_items(path: Path, columns: ItemColumns | None = None) -> list[Item]:
    """Read a catalogue in file order; an id that comes twice is two versions of one item.

    Raises:
        ConfigError: the file or a named column is missing, or its kind is not known.
        ContractError: a value is not what its column promises; names file, row and value.
    """
    columns = columns or ItemColumns()
    names = _names(path)
    item = _pick(path, names, columns.item, ITEM_NAMES, "--items-id-column", required=True)
    title = _pick(path, names, columns.title, ("title",), "--title-column")
    text = _pick(path, names, columns.text, ("text", "description"), "--text-column")
    tags = _pick(path, names, columns.categories, CATEGORY_NAMES, "--categories-column")
    born = _pick(path, names, columns.published, PUBLISHED_NAMES, "--published-column")
    there = _pick(path, names, columns.available, ("available",), "--available-column")
    table = _read(path, [name for name in (item, title, text, tags, born, there) if name])
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


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".zst", ".lz4"):
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in CSV_SUFFIXES:
        return "csv"
    if last in (".parquet", ".pq"):
        return "parquet"
    if last in (".jsonl", ".ndjson", ".json"):
        return "json"
    raise ConfigError(
        f"{path}: expected a file named {', '.join('*' + suffix for suffix in CSV_SUFFIXES)}, "
        "*.jsonl (each also .gz) or *.parquet"
    )


def _names(path: Path) -> list[str]:
    """Column names, read from the head of the file."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    kind = _kind(path)
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return list(pq.read_schema(path).names)
        if kind == "json":
            return list(_read_json(path).schema.names)
        import pyarrow.csv as pacsv

        with pacsv.open_csv(str(path), **_csv_options(path, None)) as reader:
            return list(reader.schema.names)
    except (pa.ArrowInvalid, OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path, columns: Sequence[str], header: Sequence[str] = ()) -> pa.Table:
    """The columns; `header` names all of a CSV file that has no header."""
    kind = _kind(path)
    if header and kind != "csv":
        raise ConfigError(f"{path}: --columns is for CSV files without a header, this is {kind}")
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path, columns=list(columns)).combine_chunks()
        if kind == "json":
            return _read_json(path).select(list(columns)).combine_chunks()
        import pyarrow.csv as pacsv

        options = _csv_options(path, columns)
        if header:
            options["read_options"] = pacsv.ReadOptions(column_names=list(header))
        return pacsv.read_csv(str(path), **options).combine_chunks()
    except (pa.ArrowInvalid, OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _read_json(path: Path) -> pa.Table:
    import pyarrow.json as pajson

    return pajson.read_json(str(path), read_options=pajson.ReadOptions(block_size=BLOCK_BYTES))


def _delimiter(path: Path) -> str:
    """The one of comma, tab and semicolon that the header has most of; a comma where none is."""
    with pa.input_stream(str(path), compression="detect") as stream:  # noqa: TID251 - no reader
        header = stream.read(HEADER_BYTES_MAX).partition(b"\n")[0].decode(errors="replace")
    return max(",\t;", key=header.count)


def _csv_options(path: Path, columns: Sequence[str] | None) -> dict[str, Any]:
    """All columns as text: a type guessed from the first block fails on the second."""
    import pyarrow.csv as pacsv

    chosen = {} if columns is None else {"include_columns": list(columns)}
    return {
        "parse_options": pacsv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
        "convert_options": pacsv.ConvertOptions(
            column_types=dict.fromkeys(columns or (), pa.string()), **chosen
        ),
    }


def _unreadable(path: Path, error: Exception) -> AfterclickError:
    return ContractError(f"{path}: cannot be read as {_kind(path)}: {error}", reason="file")


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
        wanted = given or " or ".join(usual)
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
    missing = MISSING if _kind(path) == "csv" else MISSING[:1]
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


def _short(path: Path, table: pa.Table, name: str, length_max: int) -> pa.Array:
    """Text of an optional column; all null where there is none."""
    if not name:
        return _nulls(table, pa.string())
    text_N = _text(path, table, name)
    _refuse_long(path, name, text_N, length_max)
    return text_N


def _times(path: Path, table: pa.Table, name: str, unit: TimeUnit) -> pa.Array:
    """Unix milliseconds from numbers in seconds or milliseconds, or from dates (UTC)."""
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
    in_ms = unit == "ms" or (unit == "auto" and (name.endswith("_ms") or _all_too_late(column)))
    highest = TIME_MS_MAX if in_ms else SECONDS_MAX
    expected = "unix milliseconds" if in_ms else "unix seconds (--time-unit ms if it is those)"
    fine_N = pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, highest))
    _refuse(path, name, expected, column, pc.invert(fine_N))
    if pa.types.is_floating(column.type):
        factor = 1.0 if in_ms else 1000.0
        return pc.round(pc.multiply(column.cast(pa.float64()), factor)).cast(pa.int64())
    return pc.multiply(column.cast(pa.int64()), 1 if in_ms else 1000)


def _all_too_late(column: pa.Array) -> bool:
    """Whether no number can be seconds."""
    first = pc.min(column).as_py()
    return first is not None and first > SECONDS_MAX


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
        "unix times (or every row a date)",
        text_N,
        pc.invert(pc.match_substring_regex(text_N, number)),
    )
    raise ContractError(f"{path}: column {name}: mixes numbers and dates", reason="file")


def _lists(path: Path, table: pa.Table, name: str) -> pa.Array:
    column = _column(table, name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(column.cast(pa.list_(pa.string())), [])
    text_N = pc.fill_null(_text(path, table, name), "")
    return pc.if_else(
        pc.equal(text_N, ""), pa.scalar([], pa.list_(pa.string())), pc.split_pattern(text_N, "|")
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
