"""State and releases whose bytes are not what we wrote: named, never guessed, never a crash."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import (
    ITEMS_NAME,
    MANIFEST_NAME,
    read_manifest,
)
from afterclick.serving.records import (
    Head,
    InputsEntry,
    TopList,
    decode_record,
    decode_stored,
    encode_record,
)
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.events import Click
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges
from afterclick.streams.replica import Replica
from tests.doubles import log_of
from tests.fuzz.poison import STRANGE
from tests.fuzz.run import load_release


def damaged(data: bytes, num: int, *, seed: int = 1) -> list[bytes]:
    """The same bytes with something flipped, cut, doubled or replaced, and some other bytes."""
    rng = random.Random(seed)
    found = [b"", b"\xff", b"[" * 100_000, *(text.encode("utf-8", "replace") for text in STRANGE)]
    for _ in range(num):
        piece = bytearray(data)
        at = rng.randrange(len(piece))
        action = rng.randrange(3)
        if action == 0:
            piece[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del piece[at:]
        else:
            piece[at:at] = rng.choice([b"\xed\xa0\x80", b"\x00", bytes(piece[:at])])
        found.append(bytes(piece))
    return found


def refusals(data: list[bytes], read: Callable[[bytes], object]) -> list[ContractError]:
    """What reading each of these was refused with; any other exception is a failure."""
    found = []
    for one in data:
        try:
            read(one)
        except ContractError as error:
            found.append(error)
    return found


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> LoadedRelease:
    return load_release(tmp_path_factory.mktemp("releases") / "r1")


def folding(store: Replica, release: LoadedRelease) -> PartitionFold:
    p = release.publication
    serving = Serving(p.number, p.release, p.sha256, release, release.catalog)
    return PartitionFold(
        0,
        store,
        ListRules.of(ServingSettings(k=5)),
        Limits(users_max=256, records_max=1024, bytes_max=1 << 20),
        serving=lambda: serving,
        dead_letters=lambda letters: None,
        log_start=lambda: 0,
        batch_ids=(f"b{n}" for n in itertools.count()),
    )


@pytest.fixture
def store(release: LoadedRelease) -> Replica:
    """Ten clicks of two users, folded."""
    store = Replica()
    fold = folding(store, release)
    fold.open(LogEdges("t", 0, 100), lambda offset: None)
    fold.process(Chunk(0, 10, log_of([click(n) for n in range(10)])))
    return store


def click(number: int) -> Click:
    return Click(user_id=f"u{number % 2}", item_id=f"i{number:05d}", event_id=f"e{number}")


@pytest.mark.parametrize("kind", [Head, InputsEntry, TopList])
def test_damaged_json_in_redis_is_read_or_named(store: Replica, kind: type[msgspec.Struct]) -> None:
    """Another kind of exception would end the worker at every start, for all its partitions."""
    whole = {
        Head: store.heads[0],
        InputsEntry: msgspec.json.encode(store.entries[0][0]),
        TopList: store.lists["u1"],
    }[kind]
    refused = refusals(damaged(whole, 500), lambda data: decode_stored(data, kind, "here"))
    assert len(refused) > 100
    assert all(str(error).startswith("here: ") for error in refused)


def test_a_damaged_record_is_read_or_named(store: Replica) -> None:
    """Its length must agree with its header, whatever the header says."""
    refused = refusals(damaged(store.records[0, "u1"], 500), decode_record)
    assert len(refused) > 100
    assert {error.reason for error in refused} == {"record"}


def test_a_damaged_head_refuses_its_partition(store: Replica, release: LoadedRelease) -> None:
    """Taken for absent, the whole log would be folded into records that are already there."""
    store.heads[0] = store.heads[0][:-1]

    with pytest.raises(ContractError, match="partition 0: head: "):
        folding(store, release).open(LogEdges("t", 0, 100), lambda offset: None)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], "need"),
        (lambda data: b"\x07" + data[1:], "version 7"),
        (lambda data: data[:9], "at least"),
        (
            lambda data: encode_record(
                msgspec.structs.replace(decode_record(data), state=b"\x00" * 40)
            ),
            "state of 40 bytes",
        ),
    ],
)
def test_a_damaged_record_refuses_its_partition_and_names_the_user(
    store: Replica, release: LoadedRelease, damage: object, says: str
) -> None:
    """Started over in silence, the user would have lost a past that the log still has."""
    store.records[0, "u1"] = damage(store.records[0, "u1"])  # type: ignore[operator]
    before = (dict(store.records), dict(store.heads))
    fold = folding(store, release)
    fold.open(LogEdges("t", 0, 100), lambda offset: None)

    with pytest.raises(ContractError, match=f"partition 0, user 'u1': .*{says}"):
        fold.process(Chunk(10, 12, log_of([click(10), click(11)], start=10)))
    assert (store.records, store.heads) == before


def test_a_damaged_publication_or_manifest_is_named(release: LoadedRelease, tmp_path: Path) -> None:
    """The worker keeps what it has and says why; it must not end."""
    folder = tmp_path / "r1"
    write = tmp_path / "current.json"
    releases = ReleaseStore(str(tmp_path))
    load_release(folder)
    releases.publish("r1")

    def current(data: bytes) -> None:
        write.write_bytes(data)
        releases.current()

    def manifest(data: bytes) -> None:
        (folder / MANIFEST_NAME).write_bytes(data)
        read_manifest(folder)

    refused = refusals(damaged(write.read_bytes(), 300), current)
    assert len(refused) > 80
    assert {error.reason for error in refused} == {"publication"}
    assert len(refusals(damaged((folder / MANIFEST_NAME).read_bytes(), 300), manifest)) > 80


def test_damaged_items_of_a_release_are_named(release: LoadedRelease, tmp_path: Path) -> None:
    """A checksum that fits says only that the writer wrote what it wrote."""
    folder = tmp_path / "r1"
    load_release(folder)
    manifest = read_manifest(folder)

    def items(data: bytes) -> None:
        (folder / ITEMS_NAME).write_bytes(data)
        Catalog.from_release(folder, manifest)

    assert len(refusals(damaged((folder / ITEMS_NAME).read_bytes(), 60), items)) > 20
