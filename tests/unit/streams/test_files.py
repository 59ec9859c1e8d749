"""Files in, tables and items out: every kind of file, every kind of bad row, and the real data."""

import argparse
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.streams.columns import (
    ClickColumns,
    ItemColumns,
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.streams.events import Item
from afterclick.streams.files import CLICKS_SCHEMA, read_clicks, read_items
from tests.realdata import DATA, needs_data

ROWS = [
    {"user_id": "7", "item_id": "b", "timestamp": 1400000002},
    {"user_id": "7", "item_id": "a", "timestamp": 1400000001},
    {"user_id": "07", "item_id": "c", "timestamp": 1400000002},
]
EXPECTED = [("7", "a", 1400000001000), ("7", "b", 1400000002000), ("07", "c", 1400000002000)]


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_csv(folder: Path) -> Path:
    lines = [",".join(map(str, row.values())) for row in ROWS]
    return write(folder / "log.csv", "\n".join(["user_id,item_id,timestamp", *lines]))


def as_gzip(folder: Path) -> Path:
    return write(folder / "log.csv.gz", as_csv(folder).read_text())


def as_tsv(folder: Path) -> Path:
    return write(folder / "log.tsv", as_csv(folder).read_text().replace(",", "\t"))


def as_json_lines(folder: Path) -> Path:
    return write(folder / "log.jsonl", "\n".join(json.dumps(row) for row in ROWS))


def as_parquet(folder: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    users = table.column("user_id").dictionary_encode()
    pq.write_table(table.set_column(0, "user_id", users), folder / "log.parquet")
    return folder / "log.parquet"


@pytest.mark.parametrize("make", [as_csv, as_gzip, as_tsv, as_json_lines, as_parquet])
def test_every_kind_of_file_gives_the_same_clicks(make, tmp_path):
    """Sorted by time, equal times in file order, ids as they were written, `07` not `7`."""
    clicks = read_clicks(make(tmp_path))

    assert clicks.schema == CLICKS_SCHEMA
    rows = clicks.to_pylist()
    assert [(r["user_id"], r["item_id"], r["timestamp_ms"]) for r in rows] == EXPECTED
    assert {(r["event"], r["event_id"]) for r in rows} == {("click", None)}


def test_whole_number_ids_become_text(tmp_path):
    """Parquet keeps ids as numbers where a data frame did; Kafka keys are text."""
    table = pa.table({"session_id": [12, 3], "item_id": [5, 6], "timestamp_ms": [20, 10]})
    pq.write_table(table, tmp_path / "log.parquet")

    rows = read_clicks(tmp_path / "log.parquet").to_pylist()

    assert [(r["user_id"], r["item_id"], r["timestamp_ms"]) for r in rows] == [
        ("3", "6", 10),
        ("12", "5", 20),
    ]


@pytest.mark.parametrize(
    ("name", "value", "unit", "expected_ms"),
    [
        ("timestamp", "1592337718.25", "auto", 1592337718250),
        ("timestamp", "1592337718", "auto", 1592337718000),
        ("timestamp_ms", "1592337718250", "auto", 1592337718250),
        ("timestamp", "1592337718250", "ms", 1592337718250),
        ("Time", "1592337718250", "auto", 1592337718250),
        ("Time", "1592337718250999", "auto", 1592337718250),
        ("Time", "1592337718250999999", "auto", 1592337718250),
        ("Time", "1592337718250999", "us", 1592337718250),
        ("Time", "1592337718250000.0", "us", 1592337718250),
        ("Time", "1592337718250999999", "ns", 1592337718250),
        ("timestamp_ms", "1592337718", "s", 1592337718000),
        ("timestamp", "2010-12-01 08:26:00", "auto", 1291191960000),
        ("timestamp", "2010-12-01T08:26:00Z", "auto", 1291191960000),
        ("event_time", "2010-12-01 08:26:00 UTC", "auto", 1291191960000),
        ("eventdate", "2010-12-01", "auto", 1291161600000),
        ("timestamp", "", "auto", None),
    ],
)
def test_times_in_seconds_milliseconds_and_dates(name, value, unit, expected_ms, tmp_path):
    """The unit comes from the column's name unless it is said; decimals survive to the ms."""
    path = write(tmp_path / "log.csv", f"user_id,item_id,{name}\nu,i,{value}\n")

    clicks = read_clicks(path, ClickColumns(time_unit=unit))

    assert clicks.column("timestamp_ms").to_pylist() == [expected_ms]


def test_a_file_without_times_keeps_its_order(tmp_path):
    """Benchmarks come as sessions in order: sorting by anything would destroy them."""
    path = write(tmp_path / "log.csv", "session_id,item_id\n2,b\n1,a\n2,c\n")

    rows = read_clicks(path).to_pylist()

    assert [(r["user_id"], r["item_id"], r["timestamp_ms"]) for r in rows] == [
        ("2", "b", None),
        ("1", "a", None),
        ("2", "c", None),
    ]


def test_events_ids_and_clicks_without_an_item(tmp_path):
    """An empty event is a click, an empty event id is none, `visit` and `forget` need no item."""
    text = "user_id,item_id,timestamp,event,event_id\nu,i,1,,\nu,,2,visit,e2\nu,j,3,cart,e3\n"
    rows = read_clicks(write(tmp_path / "log.csv", text)).to_pylist()

    assert [(r["item_id"], r["event"], r["event_id"]) for r in rows] == [
        ("i", "click", None),
        ("", "visit", "e2"),
        ("j", "cart", "e3"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log.csv", "SessionId,ItemId,Time\nu,i,7\n"),
        ("log.csv", "item;session;timestamp\ni;u;7\n"),
        ("log.tsv", "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t5\t7\n"),
        ("log.csv", "visitorid\tevent\titemid\ttimestamp\nu\tclick\ti\t7\n"),
        ("log.csv", "UserId,item,session_id,ts\nu,i,s,7\n"),
        ("log.csv", "user_id|item_id|timestamp\nu|i|7\n"),
        ("log.txt", "user_id item_id timestamp\nu i 7\n"),
        ("log.json", '{"reviewerID": "u", "asin": "i", "unixReviewTime": 7}\n'),
        ("log.csv", "user_id,session_id,click_article_id,click_timestamp\nu,s,i,7\n"),
    ],
)
def test_the_usual_names_of_public_data_sets_need_no_options(name, text, tmp_path):
    """Whoever tries their own file first tries it without reading `--help`."""
    clicks = read_clicks(write(tmp_path / name, text)).to_pylist()

    assert [(c["user_id"], c["item_id"], c["timestamp_ms"]) for c in clicks] == [("u", "i", 7000)]


def test_events_may_have_other_names(tmp_path, caplog):
    """RetailRocket's: without their kinds a cart and a purchase would be alike, without a word."""
    path = write(
        tmp_path / "events.csv",
        "timestamp,visitorid,event,itemid\n1,u,view,a\n2,u,addtocart,a\n3,u,transaction,a\n4,u,,a\n",
    )
    parser = argparse.ArgumentParser()
    add_click_columns(parser)

    plain = read_clicks(path, click_columns(parser.parse_args([])))
    assert plain["event"].to_pylist() == ["view", "addtocart", "transaction", "click"]
    assert "events named addtocart, transaction are all alike" in caplog.text
    caplog.clear()

    kinds = "addtocart=cart, transaction = purchase"
    told = read_clicks(path, click_columns(parser.parse_args(["--event-kinds", kinds])))
    assert told["event"].to_pylist() == ["view", "cart", "purchase", "click"]
    assert not caplog.text

    for wrong in ("addtocart=basket", "addtocart", "=cart"):
        with pytest.raises(ConfigError, match=r"--event-kinds: expected NAME=KIND.*got '"):
            click_columns(parser.parse_args([f"--event-kinds={wrong}"]))


def test_columns_are_named_by_options(tmp_path):
    """Invoices: other names, dates, columns nobody asked for and a quoted line break."""
    text = 'Who,What,Note,When\nu,i,"two\nlines",2010-12-01 08:26:00\n'
    parser = argparse.ArgumentParser()
    add_click_columns(parser)
    add_item_columns(parser)
    names = "--user-column=Who --item-column=What --time-column=When"
    names += " --items-id-column=What --title-column=Note"
    options = parser.parse_args(names.split())
    path = write(tmp_path / "log.csv", text)

    clicks = read_clicks(path, click_columns(options)).to_pylist()
    items = read_items(path, item_columns(options))

    assert clicks[0]["timestamp_ms"] == 1291191960000
    assert items == [Item(item_id="i", title="two\nlines")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id,item_id,timestamp\nu,i,1\nu,,2\n", "row 2, column item_id: expected an id"),
        ("user_id,item_id,timestamp\n,i,1\n", "row 1, column user_id: expected an id"),
        ("user_id,item_id,timestamp\nu,i,1\nu,i,soon\n", "row 2, column timestamp: .* 'soon'"),
        ("user_id,item_id,timestamp\nu,i,-5\n", "row 1, column timestamp: .* '-5'"),
        ("user_id,item_id,timestamp\nu,i,1\nu,i,1592337718250\n", "row 2, .*--time-unit ms"),
        ("user_id,item_id,timestamp\nu,i\n", "cannot be read as csv"),
        (f"user_id,item_id,timestamp\n{'u' * 513},i,1\n", "at most 512 letters"),
        ("", "cannot be read as csv"),
        (f"user_id,item_id,event\nu,i,{'e' * 65}\n", "row 1, column event: .*at most 64"),
    ],
)
def test_a_bad_row_is_named(text, message, tmp_path):
    """File, row, column, expectation and value: enough to open the file at the spot."""
    path = write(tmp_path / "log.csv", text)

    with pytest.raises(ContractError, match=message) as caught:
        read_clicks(path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", [b"session,item,titl\xe9\n1,a,x\n", b"session,item\n1,caf\xe9\n"])
def test_a_file_in_another_encoding_is_named(text, tmp_path):
    """Spreadsheets write Latin-1; the header in it ended in a traceback."""
    path = tmp_path / "log.csv"
    path.write_bytes(text)
    with pytest.raises(ContractError, match=r"cannot be read as csv: .*(utf-8|UTF8)"):
        read_clicks(path)


def test_incomplete_rows_may_be_left_out_and_are_counted(tmp_path, caplog):
    """A shop's till has no customer for every sale; nobody is told less than how many there are."""
    path = write(tmp_path / "a.csv", "user_id,item_id,event\nu,a,\n,b,\nv,,\nw,,visit\nx,c,\n")
    with pytest.raises(ContractError, match=r"row 2, column user_id: expected an id; .*got ''"):
        read_clicks(path)
    table = read_clicks(path, ClickColumns(skip_incomplete=True))
    assert table["user_id"].to_pylist() == ["u", "w", "x"]
    assert "left out 2 of 5 rows, which lack a user or an item; the first is row 2" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        # GRU4Rec's own files, RecBole's, shops' logs of REES46.
        ("a.txt", "SessionId\tItemId\tTime\ns\ti\t1400000000.5\n", ""),
        ("a.inter", "user_id:token\titem_id:token\ttimestamp:float\ns\ti\t1400000000.5\n", ""),
        ("a.csv", "event_time,event_type,product_id,user_id\n"
         "2014-05-13 16:53:20.5 UTC,click,i,s\n", ""),
        # Without a header: YooChoose, Amazon's ratings, Gowalla.
        ("a.dat", "s,2014-05-13T16:53:20.500Z,i,0\n", "session,time,item,category"),
        ("a.csv", "s,i,5.0,1400000000.5\n", "user_id,item_id,rating,timestamp"),
        ("a.txt.gz", "s\t2014-05-13T16:53:20.5Z\t30.2\ti\n", "user, time, lat, item"),
        # MovieLens of a million and of a hundred thousand ratings, SASRec's own files.
        ("a.dat", "s::i::5::1400000000.5\n", "user,item,rating,time"),
        ("u.data", "s\ti\t5\t1400000000.5\n", "user,item,rating,time"),
        ("a.txt", "s i 1400000000.5\n", "user,item,time"),
    ],
)  # fmt: skip
def test_public_logs_are_read_as_they_come(name, text, columns, tmp_path):
    """Whoever tries us on a log of his own, or on a known one, edits no file first."""
    parser = argparse.ArgumentParser()
    add_click_columns(parser)
    options = parser.parse_args(["--columns", columns] if columns else [])

    clicks = read_clicks(write(tmp_path / name, text), click_columns(options)).to_pylist()

    assert [(r["user_id"], r["item_id"], r["timestamp_ms"], r["event"]) for r in clicks] == [
        ("s", "i", 1400000000500, "click")
    ]


def test_whoever_has_times_under_another_name_is_told(tmp_path, caplog):
    """In the file's order, which is often by product, a log teaches nonsense without a word."""
    read_clicks(write(tmp_path / "a.csv", "user_id,item_id\nu,a\n"))
    assert not caplog.text

    read_clicks(write(tmp_path / "b.csv", "user_id,item_id,price,seen_at\nu,a,3,2014-05-13\n"))
    assert "b.csv: no column of times" in caplog.text
    assert "--time-column names one, if it is among price, seen_at" in caplog.text


def test_rows_of_one_day_are_ordered_by_another_column(tmp_path):
    """Diginetica has the day, and milliseconds since the session began, in no order."""
    path = write(
        tmp_path / "views.csv",
        "sessionId;userId;itemId;timeframe;eventdate\n"
        "1;NA;b;526309;2016-05-09\n1;NA;c;1031018;2016-05-09\n2;NA;z;0;2016-05-08\n"
        "1;NA;a;9;2016-05-09\n",
    )
    parser = argparse.ArgumentParser()
    add_click_columns(parser)
    options = parser.parse_args(["--user-column=sessionId", "--order-column=timeframe"])

    clicks = read_clicks(path, click_columns(options))

    assert clicks["item_id"].to_pylist() == ["z", "a", "b", "c"]
    with pytest.raises(ContractError, match="column itemId: expected numbers"):
        read_clicks(path, ClickColumns(user="sessionId", order="itemId"))
    untimed = write(tmp_path / "untimed.csv", "session_id,item_id,place\n1,a,2\n")
    with pytest.raises(ConfigError, match="name --time-column"):
        read_clicks(untimed, ClickColumns(order="place"))


def test_a_folder_is_warned_of_once(tmp_path, caplog):
    """Spark writes two hundred parts; as many warnings would hide the others."""
    folder = tmp_path / "clicks"
    folder.mkdir()
    for part in range(3):
        write(folder / f"{part}.csv", f"user_id,item_id,event,seen\nu,i,kind{part},7\n")

    assert read_clicks(folder).num_rows == 3

    assert caplog.text.count("no column of times") == 1
    assert caplog.text.count("events named kind0, kind1, kind2 are all alike") == 1


def test_a_folder_is_one_log(tmp_path):
    """As Spark leaves a table: parts below folders, marks of its own, no order among the parts."""
    folder = tmp_path / "clicks"
    (folder / "day=2").mkdir(parents=True)
    as_parquet(folder / "day=2")
    write(folder / "part-0.csv.gz", "user_id,item_id,timestamp\n9,z,1400000003\n9,y,1400000000\n")
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.csv.gz.crc").write_bytes(b"crc")

    clicks = read_clicks(folder).to_pylist()

    assert [(r["user_id"], r["item_id"], r["timestamp_ms"]) for r in clicks] == [
        ("9", "y", 1400000000000),
        *EXPECTED,
        ("9", "z", 1400000003000),
    ]
    write(folder / "readme.md", "")
    with pytest.raises(ConfigError, match=r"readme\.md: expected a file named"):
        read_clicks(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: the folder holds no file"):
        read_clicks(tmp_path / "empty")


def test_a_user_of_whom_nothing_is_known_is_none(tmp_path):
    """Diginetica writes `NA` for most users: as an id they would be one user with half the log."""
    path = write(tmp_path / "a.csv", "sessionId;userId;itemId\n1;NA;a\n1;7;b\n")
    wanted = "row 1, column userId: expected an id .or --user-column sessionId.*got 'NA'"
    with pytest.raises(ContractError, match=wanted):
        read_clicks(path)
    by_session = read_clicks(path, ClickColumns(user="sessionId"))
    assert by_session["user_id"].to_pylist() == ["1", "1"]
    known = read_clicks(path, ClickColumns(skip_incomplete=True))
    assert known["user_id"].to_pylist() == ["7"]


def test_only_csv_files_lack_a_header(tmp_path):
    """Parquet and JSON name their columns themselves."""
    path = write(tmp_path / "a.jsonl", '{"user_id": "u", "item_id": "i"}\n')
    with pytest.raises(ConfigError, match="--columns is for CSV files"):
        read_clicks(path, ClickColumns(names=("user_id", "item_id")))


@needs_data
def test_a_dirty_till_is_read_but_for_sales_to_nobody(caplog):
    """541,909 lines, 406,829 of which name a customer."""
    parser = argparse.ArgumentParser()
    add_click_columns(parser)
    names = ["--user-column=CustomerID", "--item-column=StockCode", "--time-column=InvoiceDate"]
    columns = click_columns(parser.parse_args([*names, "--skip-incomplete"]))
    table = read_clicks(DATA / "online-retail" / "lines.csv.gz", columns)
    assert table.num_rows == 406_829
    assert "left out 135080 of 541909 rows" in caplog.text


def test_a_missing_column_names_those_there_are(tmp_path):
    """An operator sees which option to set without opening the file."""
    path = write(tmp_path / "log.csv", "Who,item_id\nu,i\n")

    with pytest.raises(ConfigError, match=r"user_id or .*, found Who, item_id.*--user-col"):
        read_clicks(path)
    with pytest.raises(
        ConfigError, match=r"item_id or .*, found Wer; name it by --items-id-col\w+$"
    ):
        read_items(write(tmp_path / "items.csv", "Wer\ni\n"))  # has no --columns
    with pytest.raises(ConfigError, match="expected a column Wer"):
        read_clicks(path, ClickColumns(user="Wer"))
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_clicks(tmp_path / "gone.csv")
    with pytest.raises(ConfigError, match=r"expected a file named \*\.csv"):
        read_clicks(write(tmp_path / "log.xlsx", ""))


def test_ids_that_are_fractions_are_refused(tmp_path):
    """A data frame with gaps turns ids into floats: `17850.0` is another user than `17850`."""
    pq.write_table(pa.table({"user_id": [1.0], "item_id": ["i"]}), tmp_path / "log.parquet")

    with pytest.raises(ContractError, match="column user_id: expected text or whole numbers"):
        read_clicks(tmp_path / "log.parquet")


def test_torn_files_are_refused(tmp_path):
    """Half a download must not become half a log."""
    whole = as_gzip(tmp_path).read_bytes()
    (tmp_path / "torn.csv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "torn.parquet").write_bytes(as_parquet(tmp_path).read_bytes()[:-20])

    for name in ("torn.csv.gz", "torn.parquet"):
        with pytest.raises(ContractError, match="cannot be read"):
            read_clicks(tmp_path / name)


def test_items_with_every_attribute(tmp_path):
    """Categories split on `|`, times as for clicks, availability in the usual spellings."""
    text = (
        "item_id,title,genres,published_at,available\n"
        "1,新闻,War|Comedy,1400000000.5,false\n"
        "2,Plain,,,\n"
    )
    assert read_items(write(tmp_path / "items.csv", text)) == [
        Item(
            item_id="1",
            title="新闻",
            categories=["War", "Comedy"],
            published_ms=1400000000500,
            available=False,
        ),
        Item(item_id="2", title="Plain"),
    ]


def test_items_of_recbole_and_of_a_folder(tmp_path):
    """Its atomic files say the type of a column; a `token_seq` is split at blanks."""
    folder = tmp_path / "items"
    folder.mkdir()
    text = "item_id:token\tmovie_title:token_seq\tclass:token_seq\n1\tToy Story\tWar Comedy\n"
    write(folder / "ml.item", text)
    write(folder / "shop.csv", "sku,product_name,description,category\n2,Mug,White,a|b\n")

    assert read_items(folder) == [
        Item(item_id="1", title="Toy Story", categories=["War", "Comedy"]),
        Item(item_id="2", title="Mug", text="White", categories=["a", "b"]),
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_one_column_may_be_two_things(suffix, tmp_path):
    """A till has the article's name only: it is title and text, and was a KeyError."""
    path = tmp_path / f"till.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"sku": ["1"], "label": ["Mug"]}), path)
    else:
        write(path, "sku,label\n1,Mug\n" if suffix == "csv" else '{"sku": "1", "label": "Mug"}\n')

    items = read_items(path, ItemColumns(title="label", text="label"))

    assert items == [Item(item_id="1", title="Mug", text="Mug")]


def test_items_from_json_lines(tmp_path):
    """Lists and booleans come as they are; a missing field is the contract's default."""
    text = '{"item_id": 1, "categories": ["a", "b"], "available": false}\n{"item_id": 2}\n'

    items = read_items(write(tmp_path / "items.jsonl", text), ItemColumns())

    assert items == [
        Item(item_id="1", categories=["a", "b"], available=False),
        Item(item_id="2"),
    ]


def test_a_bad_item_is_named(tmp_path):
    """A title longer than the contract allows would be a dead letter later; it is named here."""
    text = f"item_id,title,available\n1,{'t' * 5000},1\n"
    with pytest.raises(ContractError, match=r"length <= 4096.*\[0\]\.title"):
        read_items(write(tmp_path / "items.csv", text))
    with pytest.raises(ContractError, match="row 1, column available: expected true or false"):
        read_items(write(tmp_path / "items.csv", "item_id,available\n1,maybe\n"))


@needs_data
@pytest.mark.parametrize(
    ("name", "columns", "num_clicks", "num_users"),
    [
        ("caixin-news-2014/clicks.csv.gz", ClickColumns(), 102_204, 9_543),
        ("serenade-toy/train.csv.gz", ClickColumns(), 113_601, None),
        ("serenade-toy/test.csv.gz", ClickColumns(), 1_233, None),
        ("yoochoose-1-64/test.csv.gz", ClickColumns(), 71_222, 15_324),
        ("movielens-1m/interactions.csv.gz", ClickColumns(), 999_611, 6_040),
        (
            "online-retail/lines.csv.gz",
            ClickColumns(user="InvoiceNo", item="StockCode", time="InvoiceDate"),
            541_909,
            None,
        ),
    ],
)
def test_the_real_logs_are_read_whole(name, columns, num_clicks, num_users):
    """Counts are those of the datasets' README; times never run backwards."""
    clicks = read_clicks(DATA / name, columns)

    assert clicks.num_rows == num_clicks
    if num_users is not None:
        assert len(clicks.column("user_id").unique()) == num_users
    times = clicks.column("timestamp_ms").drop_null().to_pylist()
    assert times == sorted(times)


@needs_data
def test_the_real_catalogues_are_read_whole():
    """Chinese titles and times of publication at caixin, genres at movielens."""
    news = read_items(DATA / "caixin-news-2014/items.csv.gz")
    films = read_items(DATA / "movielens-1m/items.csv.gz")

    assert len(news) == 5_768
    assert all(item.published_ms and item.title for item in news)
    assert films[0].categories == ["Action", "Adventure"]
