"""The archive's files: ranges that chain, whole or not there, and forgotten users' clicks gone."""

import itertools
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.serving.errors import ContractError
from afterclick.serving.records import InputsEntry
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.archive import Archive, cut
from afterclick.streams.events import Click, encode
from afterclick.streams.record import Record
from tests.doubles import log_of

DAY_MS = 86_400_000


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(str(tmp_path / "archive"))


def read(archive: Archive, start: int = 0, stop: int = 10**9) -> list[Record]:
    return [r for batch in archive.read("clicks", 0, start, stop) for r in batch]


def clicks(num: int, users: int = 3) -> list[Record]:
    return log_of([Click(user_id=f"u{n % users}", item_id=f"i{n}") for n in range(num)])


def write(archive: Archive, records: list[Record], begin: int | None = None) -> None:
    archive.write("clicks", "id", 0, records[0].offset if begin is None else begin, records)


def test_records_come_back_as_they_were(archive: Archive) -> None:
    """A replay folds bytes: null is not empty, headers keep their order and may repeat."""
    records = [
        Record(4, 1_700_000_000_000, b"k", b"v", (("a", b"1"), ("a", b""), ("b", b"\xff"))),
        Record(7, 1_700_000_000_001, b"", b""),
        Record(8, -1, None, b"\x00"),
        Record(9, 1_700_000_000_002, b"\xff\xfe", None),
    ]
    write(archive, records, begin=3)

    assert read(archive) == records
    assert archive.edges("clicks", 0) == (3, 10)


@settings(max_examples=30, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 5), min_size=1, max_size=60),
    batch=st.integers(1, 20),
    records_max=st.integers(1, 25),
    bytes_max=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_files_chain_without_holes_however_the_log_is_cut(
    gaps: list[int], batch: int, records_max: int, bytes_max: int, seed: int
) -> None:
    """Gaps of the log are fine; a hole between two files would be records nobody has."""
    rng = random.Random(seed)
    records, offset = [], 10
    for gap in gaps:
        at = 1_700_000_000_000 + rng.choice([-DAY_MS, 0, 1000, DAY_MS])
        records.append(Record(offset, at, b"k", b"v" * rng.randrange(90)))
        offset += gap
    batches = [records[at : at + batch] for at in range(0, len(records), batch)]

    pieces = list(cut(batches, 10, records_max=records_max, bytes_max=bytes_max))

    assert [r for piece in pieces for r in piece.records] == records
    assert pieces[0].begin == 10
    for one, other in itertools.pairwise(pieces):
        assert other.begin == one.records[-1].offset + 1
    for piece in pieces:
        assert len(piece.records) <= records_max
        size = sum(len(r.key or b"") + len(r.value or b"") for r in piece.records)
        assert size <= bytes_max or len(piece.records) == 1


def test_what_was_read_before_an_error_is_kept() -> None:
    """A broker that goes away in the middle must not cost what it gave."""
    records = clicks(5)

    def failing() -> object:
        yield records
        raise RuntimeError("gone")

    pieces = cut(failing(), 0)

    assert next(pieces).records == records
    with pytest.raises(RuntimeError, match="gone"):
        next(pieces)


def test_overlapping_files_of_two_archivers_read_as_one_log(archive: Archive) -> None:
    """An object store has no lock: ranges may overlap, and no record may come twice."""
    records = clicks(40)
    for begin, end in ((0, 10), (0, 10), (5, 20), (8, 12), (20, 40), (10, 40)):
        write(archive, records[begin:end])

    assert read(archive) == records
    assert read(archive, 7, 31) == records[7:31]


def test_a_missing_file_is_a_hole_and_refused(archive: Archive) -> None:
    """Folding over it would give states that no log gives."""
    records = clicks(30)
    write(archive, records[:10])
    write(archive, records[20:])

    with pytest.raises(ContractError, match="offsets 10 to 20"):
        archive.edges("clicks", 0)
    with pytest.raises(ContractError, match="offsets 10 to 20"):
        read(archive)


def test_a_file_that_is_not_what_its_name_says_is_refused(archive: Archive, tmp_path: Path) -> None:
    """A renamed, cut or foreign file must not become history."""
    write(archive, clicks(10))
    (path,) = (tmp_path / "archive").glob("clicks/date=*/*.parquet")
    renamed = path.with_name(path.name.replace(f"-{10:020d}", f"-{11:020d}"))
    path.rename(renamed)
    with pytest.raises(ContractError, match="inside it is 0, 0 to 10"):
        read(archive)
    renamed.write_bytes(renamed.read_bytes()[:-100])
    with pytest.raises(ContractError, match=r"p00000.*parquet"):
        read(archive)


def test_a_topic_created_anew_is_refused(archive: Archive) -> None:
    """Equal offsets of another topic are other clicks."""
    write(archive, clicks(10))
    with pytest.raises(ContractError, match="created anew"):
        list(archive.read("clicks", 0, 0, 10, topic_id="other"))
    assert list(archive.read("clicks", 0, 0, 10, topic_id="id"))


def forget(user: str, offset: int) -> Record:
    key, value = encode(Click(user_id=user, event="forget"))
    return Record(offset, 1_700_000_000_000, key, value)


def test_a_forgotten_user_s_earlier_clicks_are_emptied_and_later_ones_stay(
    archive: Archive,
) -> None:
    """`forget` reaches what Kafka has long dropped; a user who comes back starts a new past."""
    records = clicks(30)
    escaped = msgspec.structs.replace(
        forget("u2", 31),
        value=b'{"user_id":"u2","event":"\\u0066orget"}',  # JSON spells it so, too
    )
    later = log_of([Click(user_id="u1", item_id="new")], start=32)
    write(archive, records[:10])
    write(archive, records[10:])
    write(archive, [forget("u1", 30), escaped, *later])

    assert archive.redact("clicks", 0, 0) == 20

    assert read(archive) == [
        *(r for r in records if r.key == b"u0"),
        forget("u1", 30),
        escaped,
        *later,
    ]
    assert archive.edges("clicks", 0) == (0, 33)
    infos = [archive.info(file) for file in archive.files("clicks", 0)]
    assert [info.redacted for info in infos] == [6, 14, 0]
    assert archive.redact("clicks", 0, 33) == 0


def test_a_redaction_cut_short_is_finished_by_the_next_round(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clicks of a forgotten user must not survive because a process died."""
    records = clicks(30)
    write(archive, records[:10])
    write(archive, records[10:])
    write(archive, [forget("u1", 30)])
    whole = archive.place.replace
    calls = []

    def dies_at_the_second(name: str, data: bytes) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(name, data)

    with monkeypatch.context() as patched:
        patched.setattr(archive.place, "replace", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            archive.redact("clicks", 0, 30)
    archive.redact("clicks", 0, 31)  # the next round finds nothing new

    assert b"u1" not in {r.key for r in read(archive, 0, 30)}


def test_a_late_archiver_does_not_bring_a_forgotten_user_back(archive: Archive) -> None:
    """In an object store a slow archiver may write an old range after another redacted it."""
    records = clicks(30)
    write(archive, records)
    write(archive, [forget("u1", 30)])
    archive.redact("clicks", 0, 0)
    write(archive, records[:20])  # the slow one, from offset 0
    write(archive, records)

    archive.redact("clicks", 0, 0)

    assert b"u1" not in {r.key for r in read(archive, 0, 30)}
    assert b"u1" not in {r.key for r in read(archive, 0, 20)}


def test_the_same_files_in_an_object_store() -> None:
    """fsspec's memory stands for s3 and gs: no folders, no rename."""
    archive = Archive("memory://archive-of-a-test/a")
    records = clicks(30)
    write(archive, records[:10])
    write(archive, [*records[10:], forget("u1", 30)])

    assert archive.redact("clicks", 0, 0) == 10
    assert archive.edges("clicks", 0) == (0, 31)
    assert {r.key for r in read(archive, 0, 30)} == {b"u0", b"u2"}


def entry(offset: int, publication: int = 1) -> InputsEntry:
    return InputsEntry(
        offset=offset,
        publication=publication,
        release="r",
        sha256="",
        publication_items=[],
        items=[],
        rules=ListRules.of(ServingSettings()),
    )


def test_the_copy_of_an_inputs_list_only_grows(archive: Archive) -> None:
    """A Redis that was emptied or rolled back must not take the copy with it."""
    archive.keep_inputs("ns", 0, [entry(0), entry(5)])
    archive.keep_inputs("ns", 0, [entry(0)])
    archive.keep_inputs("ns", 0, [])
    assert [e.offset for e in archive.inputs("ns", 0)] == [0, 5]
    archive.keep_inputs("ns", 0, [entry(0), entry(5), entry(9)])
    assert [e.offset for e in archive.inputs("ns", 0)] == [0, 5, 9]
    assert archive.inputs("other", 0) == []


def test_a_new_start_keeps_the_former_copy_beside_it(archive: Archive, tmp_path: Path) -> None:
    """It still says which releases the archived past was folded with."""
    archive.keep_inputs("ns", 0, [entry(0), entry(5)])
    archive.keep_inputs("ns", 0, [entry(3, publication=2)])
    assert [e.publication for e in archive.inputs("ns", 0)] == [2]
    (former,) = (tmp_path / "archive" / "inputs" / "ns").glob("p00000.jsonl.*")
    assert former.read_bytes().count(b"\n") == 2
