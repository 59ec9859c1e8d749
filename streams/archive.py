"""The archive: a topic's records in Parquet files, so that the log outlives Kafka's retention.

A file holds the records of one partition from `begin` to `end`; the next one begins where it ends,
so
that the ranges in the names say what is there and what is missing. Files are written whole
(serving/place.py) and never touched again, except that the clicks of a forgotten user lose key,
value
and headers. Beside them stand copies of the partitions' inputs lists, which a rebuild needs once
Redis
is gone. Knows no Kafka: `archiver.py` fills it, `joined.py` reads it and the topic as one log.

    <topic>/date=2026-11-24/p00002-<begin>-<end>.parquet    day of its first record, UTC
    <topic>/forgotten/p00002.json                           up to which `forget` all is done
    inputs/<namespace>/p00002.jsonl                         one inputs entry a line, oldest first
"""

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afterclick.serving.errors import ContractError
from afterclick.serving.place import Place
from afterclick.serving.records import InputsEntry
from afterclick.streams.events import decode_click
from afterclick.streams.record import Record

FILE_RECORDS_MAX = 200_000
FILE_BYTES_MAX = 64 << 20
"""Of keys and values: a file is written, read and rewritten in memory."""

READ_RECORDS = 5000
"""Records handed over at once."""

METADATA = b"afterclick"

SCHEMA = pa.schema(
    [
        ("offset", pa.int64()),
        ("timestamp_ms", pa.int64()),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("headers", pa.list_(pa.struct([("name", pa.string()), ("value", pa.binary())]))),
    ]
)

_NAME = re.compile(r"(?P<topic>[^/]+)/date=[0-9-]{10}/p(\d{5})-(\d{20})-(\d{20})\.parquet")

log = logging.getLogger(__name__)


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself, JSON under `afterclick` in Parquet's metadata."""

    v: int = 1
    topic: str
    topic_id: str
    """Kafka's id; a topic created anew is another log."""
    partition: int
    begin: int
    end: int
    records: int
    forgets: int = 0
    """`forget` events in it."""
    redacted: int = 0
    """Records that lost key, value and headers to a later `forget`."""


class ArchivedFile(NamedTuple):
    """A file as its name tells it: records of a partition with begin ≤ offset < end."""

    partition: int
    begin: int
    end: int
    name: str


class _Done(msgspec.Struct, frozen=True):
    done: int
    """`forget` events below this offset have been applied to all that was before them."""


class Archive:
    """Archived topics under one root, a folder or an fsspec URL."""

    def __init__(self, root: str) -> None:
        self.place = Place(root)

    def files(self, topic: str, partition: int) -> list[ArchivedFile]:
        """Files of a partition in log order; ranges may overlap where two archivers ran."""
        found = []
        for name in self.place.names(f"{topic}/date=*/p{partition:05d}-*.parquet"):
            match = _NAME.fullmatch(name)
            if match:
                found.append(ArchivedFile(partition, int(match[3]), int(match[4]), name))
        return sorted(found, key=lambda file: (file.begin, -file.end))

    def num_partitions(self, topic: str) -> int:
        """One more than the highest partition that has a file."""
        names = self.place.names(f"{topic}/date=*/p*.parquet")
        return max((int(m[2]) + 1 for name in names if (m := _NAME.fullmatch(name))), default=0)

    def edges(self, topic: str, partition: int) -> tuple[int, int] | None:
        """First offset, and the offset after the last, of what the archive holds without a hole.

        Raises:
            ContractError: files are missing between others.
        """
        chain = list(self._chain(topic, partition))
        return (chain[0].begin, chain[-1].end) if chain else None

    def info(self, file: ArchivedFile) -> FileInfo:
        """What a file says of itself."""
        return self._info(file, pq.read_schema(io.BytesIO(self._bytes(file))))

    def read(
        self, topic: str, partition: int, start: int, stop: int, *, topic_id: str = ""
    ) -> Iterator[list[Record]]:
        """Records with start ≤ offset < stop, redacted ones left out as if they were a gap.

        Raises:
            ContractError: files are missing, disagree with their names, or are of a topic with
                another id than `topic_id`.
        """
        for file in self._chain(topic, partition):
            if file.end <= start or file.begin >= stop:
                continue
            table, info = self._table(file)
            self.check_topic(info, topic_id)
            offset = table["offset"]
            table = table.filter(
                pc.and_(
                    pc.and_(pc.greater_equal(offset, start), pc.less(offset, stop)),
                    pc.invert(pc.and_(pc.is_null(table["key"]), pc.is_null(table["value"]))),
                )
            )
            for batch in table.to_batches(max_chunksize=READ_RECORDS):
                yield [_record(*row) for row in zip(*_columns(batch), strict=True)]
            start = file.end

    def check_topic(self, info: FileInfo, topic_id: str) -> None:
        """Refuse to join files with another log.

        Raises:
            ContractError: the topic was created anew since.
        """
        if info.topic_id and topic_id and info.topic_id != topic_id:
            raise ContractError(
                f"archive {self.place.root}: topic {info.topic!r} has id {info.topic_id} there, "
                f"the topic now has {topic_id}: it was created anew; take another folder",
                reason="topic-recreated",
            )

    def write(
        self, topic: str, topic_id: str, partition: int, begin: int, records: Sequence[Record]
    ) -> ArchivedFile:
        """Add a file from `begin` to the last record; one of the same range is replaced.

        Args:
            topic: its name.
            topic_id: Kafka's id of it, empty where the broker has none.
            partition: whose log this is.
            begin: where the file before ends; gaps of the log may follow.
            records: in log order, at least one.
        """
        info = FileInfo(
            topic=topic,
            topic_id=topic_id,
            partition=partition,
            begin=begin,
            end=records[-1].offset + 1,
            records=len(records),
            forgets=sum(_forgotten(record) is not None for record in records),
        )
        day = _day(records[0].timestamp_ms)
        name = f"{topic}/date={day}/p{partition:05d}-{begin:020d}-{info.end:020d}.parquet"
        table = pa.table(
            [
                [record.offset for record in records],
                [record.timestamp_ms for record in records],
                [record.key for record in records],
                [record.value for record in records],
                [[{"name": n, "value": v} for n, v in record.headers] for record in records],
            ],
            schema=SCHEMA,
        )
        self.place.replace(name, _encoded(table, info))
        return ArchivedFile(partition, begin, info.end, name)

    def redact(self, topic: str, partition: int, since: int) -> int:
        """Take the clicks before a user's `forget` out of every file.

        Rows stay with offset and timestamp, so that ranges and counts go on to fit. A crash on the
        way is made good by the next call: what is done is noted last.

        Args:
            topic: a clicks topic.
            partition: one of its partitions.
            since: `forget` events from this offset on may be new, whatever was noted.

        Returns:
            Rows emptied by this call.
        """
        note = f"{topic}/forgotten/p{partition:05d}.json"
        data = self.place.read(note)
        done = msgspec.json.decode(data, type=_Done).done if data else 0
        files = self.files(topic, partition)
        forgets: dict[bytes, int] = {}
        for file in files:
            if file.end > min(done, since) and self.info(file).forgets:
                for key, offset in self._forgets(file).items():
                    forgets[key] = max(offset, forgets.get(key, 0))
        emptied = 0
        for file in files:
            if file.begin < max(forgets.values(), default=0):
                emptied += self._empty(file, forgets)
        end = max((file.end for file in files), default=0)
        if end > done:
            self.place.replace(note, msgspec.json.encode(_Done(end)))
        return emptied

    def redacted(self, topic: str, partition: int, start: int, stop: int) -> int:
        """Rows emptied in the files that hold start ≤ offset < stop."""
        files = self._chain(topic, partition)
        return sum(self.info(f).redacted for f in files if f.end > start and f.begin < stop)

    def inputs(self, namespace: str, partition: int) -> list[InputsEntry]:
        """The copy of a partition's inputs list, empty where there is none."""
        data = self.place.read(_inputs_name(namespace, partition)) or b""
        return [msgspec.json.decode(line, type=InputsEntry) for line in data.splitlines()]

    def epochs(self, namespace: str) -> bool:
        """Whether there are copies of a later epoch's inputs lists: users moved to other
        partitions since the first.
        """
        return bool(self.place.names(f"inputs/{namespace}/e*/p*.jsonl"))

    def keep_inputs(self, namespace: str, partition: int, entries: Sequence[InputsEntry]) -> None:
        """Copy a partition's inputs list.

        The list only grows. Where Redis holds less than the copy, it lost its last writes or is
        empty, and the copy stays; where it holds something else, folding began anew, and the copy
        is
        kept under a name of its own before it is replaced.
        """
        name = _inputs_name(namespace, partition)
        old = self.place.read(name) or b""
        new = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
        if old.startswith(new):
            return
        if not new.startswith(old):
            aside = f"{name}.{hashlib.sha256(old).hexdigest()[:8]}"
            log.warning(
                "archive %s: partition %d: Redis holds another inputs list than was copied; the "
                "former copy is now %s",
                self.place.root,
                partition,
                aside,
            )
            self.place.replace(aside, old)
        self.place.replace(name, new)

    def _chain(self, topic: str, partition: int) -> Iterator[ArchivedFile]:
        """Files one after the other, those left out that others cover."""
        at: int | None = None
        for file in self.files(topic, partition):
            if at is not None and file.end <= at:
                continue
            if at is not None and file.begin > at:
                raise ContractError(
                    f"archive {self.place.root}: {topic}/{partition}: nothing holds offsets {at} "
                    f"to {file.begin}: a file is missing",
                    reason="archive-hole",
                )
            yield file
            at = file.end

    def _bytes(self, file: ArchivedFile) -> bytes:
        data = self.place.read(file.name)
        if data is None:
            raise ContractError(
                f"archive {self.place.root}: {file.name} vanished", reason="archive-hole"
            )
        return data

    def _table(self, file: ArchivedFile, columns: list[str] | None = None) -> tuple[Any, FileInfo]:
        try:
            table = pq.read_table(io.BytesIO(self._bytes(file)), columns=columns)
        except pa.ArrowException as error:
            raise self._broken(file, str(error)) from error
        info = self._info(file, table.schema)
        if info.records != table.num_rows:
            raise self._broken(file, f"{table.num_rows} records, it says {info.records}")
        return table, info

    def _info(self, file: ArchivedFile, schema: Any) -> FileInfo:
        try:
            info = msgspec.json.decode((schema.metadata or {})[METADATA], type=FileInfo)
        except (KeyError, msgspec.MsgspecError) as error:
            raise self._broken(file, f"its metadata cannot be read: {error!r}") from error
        if (info.partition, info.begin, info.end) != file[:3]:
            raise self._broken(file, f"inside it is {info.partition}, {info.begin} to {info.end}")
        return info

    def _broken(self, file: ArchivedFile, words: str) -> ContractError:
        return ContractError(
            f"archive {self.place.root}: {file.name}: {words}", reason="archive-file"
        )

    def _forgets(self, file: ArchivedFile) -> dict[bytes, int]:
        """Users that a file's events forget, with the last such offset."""
        table, _ = self._table(file)
        records = (_record(*row) for row in zip(*_columns(table), strict=True))
        return {key: r.offset for r in records if (key := _forgotten(r)) is not None}

    def _empty(self, file: ArchivedFile, forgets: dict[bytes, int]) -> int:
        keys = pa.array(forgets, pa.binary())
        before = pa.array(forgets.values(), pa.int64())
        table, _ = self._table(file, ["offset", "key"])
        at = pc.index_in(table["key"], value_set=keys)
        hit = pc.fill_null(pc.less(table["offset"], before.take(at.combine_chunks())), False)
        num = pc.sum(hit).as_py() or 0
        if not num:
            return 0
        table, info = self._table(file)
        kept = pc.invert(hit)
        for name, empty in (("key", None), ("value", None), ("headers", [])):
            field = SCHEMA.field(name)
            column = pc.if_else(kept, table[name], pa.scalar(empty, field.type))
            table = table.set_column(SCHEMA.get_field_index(name), field, column)
        info = msgspec.structs.replace(info, redacted=info.redacted + num)
        self.place.replace(file.name, _encoded(table, info))
        return int(num)


class Cut(NamedTuple):
    """Records for one file."""

    begin: int
    records: list[Record]


def cut(
    batches: Iterable[list[Record]],
    begin: int,
    *,
    records_max: int = FILE_RECORDS_MAX,
    bytes_max: int = FILE_BYTES_MAX,
) -> Iterator[Cut]:
    """Cut a partition's log into files: by records, by bytes, and where a later day begins.

    What came before an error of the log is handed over before the error.
    """
    piece: list[Record] = []
    size, day = 0, ""
    failure: Exception | None = None
    batches = iter(batches)
    while failure is None:
        try:
            batch = next(batches)
        except StopIteration:
            break
        except Exception as error:  # noqa: BLE001 - raised below, once what was read is safe
            failure = error
            break
        for record in batch:
            today = _day(record.timestamp_ms)
            own = len(record.key or b"") + len(record.value or b"")
            if piece and (len(piece) >= records_max or size + own > bytes_max or today > day):
                yield Cut(begin, piece)
                begin, piece, size = piece[-1].offset + 1, [], 0
            if not piece:
                day = today
            piece.append(record)
            size += own
    if piece:
        yield Cut(begin, piece)
    if failure is not None:
        raise failure


def _inputs_name(namespace: str, partition: int) -> str:
    return f"inputs/{namespace}/p{partition:05d}.jsonl"


def _day(timestamp_ms: int) -> str:
    return datetime.fromtimestamp(max(timestamp_ms, 0) / 1000, UTC).strftime("%Y-%m-%d")


def _forgotten(record: Record) -> bytes | None:
    """Key of the user that a record asks to forget."""
    value = record.value or b""
    if b"forget" not in value and b"\\u" not in value:  # JSON may spell any letter as \u0066
        return None
    try:
        event = decode_click(record.key, record.value, offset=record.offset, record_ms=0)
    except ContractError:
        return None
    return record.key if event.event == "forget" else None


def _encoded(table: Any, info: FileInfo) -> bytes:
    sink = io.BytesIO()
    metadata = {METADATA: msgspec.json.encode(info)}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def _columns(table: Any) -> list[list[Any]]:
    return [table.column(name).to_pylist() for name in SCHEMA.names]


def _record(
    offset: int, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: list[Any]
) -> Record:
    pairs = tuple((pair["name"], pair["value"]) for pair in headers or ())
    return Record(offset, timestamp_ms, key, value, pairs)
