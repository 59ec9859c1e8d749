"""Bytes of a user record, a head, an inputs entry and a list, versioned.

Pure: knows no Redis and no numpy. These formats are what a running deployment has in Redis, so a
change
needs a new version and a reader for the old one.

User record, little-endian:

    u8  version = 1        u8  reserved = 0      u16 interactions n
    u32 publication        u32 steps             u32 clicks
    i64 last_ms            u16 state words S     u16 reserved = 0
    S × 4 bytes            state, tensor after tensor as the manifest lists them: float32, or
                           float16 where the publication's release says so
    n × 14 bytes           interactions, oldest first: u64 item hash, u32 tag, u16 traits

`tag` is crc32 of the event and its event id (without one: its timestamp): the repeat check.
`traits`
packs event code (5 bits), gap bucket (5), hour of day UTC (5) and whether the state was reset
before it (1).
At H 128 and n = 50 a record has 1,752 bytes, 1,240 of float16.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

import msgspec

from afterclick.serving.errors import BAD_JSON, ContractError
from afterclick.serving.settings import ListRules

T = TypeVar("T")

RECORD_VERSION = 1
INTERACTION_BYTES = 14
_HEADER = struct.Struct("<BBHIIIqHH")
_INTERACTION = struct.Struct("<QIH")


class UserRecord(msgspec.Struct, frozen=True, gc=False):
    """A user's state: immutable, so that a cache can hand it out; never looked at by the collector,
    which would take milliseconds for a cache of them.
    """

    publication: int = 0
    """Publication whose release made `state`; 0 before the first."""
    steps: int = 0
    """Model steps in `state` since it was last rebuilt or reset."""
    clicks: int = 0
    """Interactions ever counted for the user, repeats left out."""
    last_ms: int = 0
    """Event time of the last interaction."""
    state: bytes = b""
    """Little-endian, as the publication's release keeps it; empty means the zero state."""
    interactions: bytes = b""
    """Packed interactions, oldest first."""

    @property
    def num_interactions(self) -> int:
        """How many interactions are kept."""
        return len(self.interactions) // INTERACTION_BYTES


class Interaction(NamedTuple):
    """One kept interaction, unpacked."""

    item_hash: int
    tag: int
    event: int
    gap: int
    hour: int
    reset: bool


def encode_record(record: UserRecord) -> bytes:
    """Pack a user record; its format is this module's docstring."""
    return (
        _HEADER.pack(
            RECORD_VERSION,
            0,
            record.num_interactions,
            record.publication,
            record.steps,
            record.clicks,
            record.last_ms,
            len(record.state) // 4,
            0,
        )
        + record.state
        + record.interactions
    )


def decode_record(data: bytes) -> UserRecord:
    """Unpack a user record.

    Raises:
        ContractError: another version, or a length that disagrees with the header.
    """
    if len(data) < _HEADER.size:
        raise ContractError(
            f"user record: expected at least {_HEADER.size} bytes, got {len(data)}", reason="record"
        )
    version, _, n, publication, steps, clicks, last_ms, words, _ = _HEADER.unpack_from(data)
    if version != RECORD_VERSION:
        raise ContractError(
            f"user record: version {version}, this worker reads {RECORD_VERSION}", reason="record"
        )
    middle = _HEADER.size + 4 * words
    if len(data) != middle + n * INTERACTION_BYTES:
        raise ContractError(
            f"user record: {words} words of state and {n} interactions need "
            f"{middle + n * INTERACTION_BYTES} bytes, got {len(data)}",
            reason="record",
        )
    return UserRecord(
        publication, steps, clicks, last_ms, data[_HEADER.size : middle], data[middle:]
    )


@lru_cache(maxsize=1 << 16)
def item_hash(item_id: str) -> int:
    """64-bit name of an item inside records: blake2b, little-endian."""
    return int.from_bytes(hashlib.blake2b(item_id.encode(), digest_size=8).digest(), "little")


def repeat_tag(event: str, event_id: str | None, timestamp_ms: int) -> int:
    """What makes two interactions with one item the same event.

    With an event id, the id; without one, the timestamp: so a click sent twice is counted once.
    """
    name = f"{event}\0{timestamp_ms}" if event_id is None else f"{event}\0id\0{event_id}"
    return zlib.crc32(name.encode())


def pack_interaction(interaction: Interaction) -> bytes:
    """14 bytes of one interaction."""
    traits = (
        interaction.event
        | interaction.gap << 5
        | interaction.hour << 10
        | int(interaction.reset) << 15
    )
    return _INTERACTION.pack(interaction.item_hash, interaction.tag, traits)


def unpack_interactions(data: bytes) -> list[Interaction]:
    """All interactions of a record, oldest first."""
    return [
        Interaction(h, tag, traits & 31, traits >> 5 & 31, traits >> 10 & 31, bool(traits >> 15))
        for h, tag, traits in _INTERACTION.iter_unpack(data)
    ]


def last_hashes(interactions: bytes, num: int) -> tuple[int, ...]:
    """Item hashes of the last interactions, newest first, at most `num`, none beyond a reset."""
    found: list[int] = []
    end = len(interactions)
    first = max(0, end - num * INTERACTION_BYTES)
    for at in range(end - INTERACTION_BYTES, first - 1, -INTERACTION_BYTES):
        hash_, _, traits = _INTERACTION.unpack_from(interactions, at)
        found.append(hash_)
        if traits >> 15:
            break
    return tuple(found)


def is_repeat(interactions: bytes, packed: bytes) -> bool:
    """Whether an interaction with the same item and tag is among the kept ones."""
    needle = packed[:12]
    at = interactions.find(needle)
    while at >= 0:
        if at % INTERACTION_BYTES == 0:
            return True
        at = interactions.find(needle, at + 1)
    return False


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How far one partition's log is folded, and under which inputs; JSON in Redis.

    Compared byte by byte by the script, so every field is part of the fence.
    """

    v: int = 1
    topic_id: str = ""
    """Kafka's id of the clicks topic: a re-created topic is another log."""
    next: int = 0
    """Offset of the first record not yet folded."""
    last_offset: int = -1
    """Offset of the last record folded, dead letters included."""
    last_crc: int = 0
    """crc32 over key and value of that record: the log below the head is still the same log."""
    publication: int = 0
    release: str = ""
    sha256: str = ""
    """Of the release's manifest; empty without a release."""
    publication_items: list[int] = []
    """Items offset when this publication came: rebuilds use it, so that it does not matter when
    they run.
    """
    items: list[int] = []
    """Items offset in force."""
    settings: str = ""
    """Digest of the rules in force."""
    clicks: int = 0
    """Interactions counted so far in this partition."""
    watermark_ms: int = 0
    """Latest event time seen: the popularity's clock."""
    batch: str = ""
    """Id of the write that made this head: a script sent twice by the client recognises itself."""
    hold: str = ""
    """Why nobody may fold this partition now, in words for an operator; empty means go on."""


class InputsEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What else entered a partition's fold, from `offset` on; JSON in its inputs list."""

    v: int = 1
    offset: int
    publication: int
    release: str
    sha256: str
    publication_items: list[int]
    items: list[int]
    rules: ListRules


class TopList(msgspec.Struct, frozen=True, kw_only=True):
    """A user's list as it stands in Redis, JSON so that any language reads it.

    A pure function of the user's record and of everything it names; `written_ms` is left out of
    comparisons.
    """

    v: int = 1
    items: list[str]
    """Item ids, best first; up to k + margin."""
    scores: list[float]
    """Scores rounded to 4 decimals, for people; order was decided before rounding, ties by item id.
    Empty under `list_scores=false`.
    """
    source: Literal["model", "popularity"]
    release: str
    publication: int
    items_offset: list[int]
    partition: int
    offset: int
    """Log offset of the event this list answers."""
    event_ms: int
    """Event time of that event."""
    signals: int = 0
    """Records of the signals topic below this offset were known; left out where it is 0, as without
    a memory.
    """
    written_ms: int = 0
    """Wall clock of the worker when it wrote the list."""


_SCORES = b',"scores":['
_WRITTEN = b',"written_ms":'
_WINDOW_BITS = 11
_NO_SIGNALS = b',"signals":0'


def encode_list(top: TopList) -> bytes:
    """JSON of a list without its `written_ms`, which only the store knows."""
    data = msgspec.json.encode(top)
    return data[: data.rindex(_WRITTEN)].removesuffix(_NO_SIGNALS) + b"}"


def list_writer(shell: TopList, *, scores: bool = True) -> Callable[[bytes, int, int], bytes]:
    """`encode_list` of many lists that differ in little.

    Args:
        shell: what they have in common; without items, offset and time 0.
        scores: whether they say scores.

    Returns:
        A function of the JSON of items and scores (`texts.Ranked`), offset and time of the event.
    """
    before, _, rest = encode_list(shell).partition(b'"items":[],"scores":[]')
    middle, _, after = rest.partition(b'"offset":0,"event_ms":0')
    whole = b'%s%%b%s"offset":%%d,"event_ms":%%d%s' % tuple(
        part.replace(b"%", b"%%") for part in (before, middle, after)
    )
    if scores:
        return lambda text, offset, event_ms: whole % (text, offset, event_ms)
    # No id holds these bytes: a quote within one is escaped.
    return lambda text, offset, event_ms: (
        whole % (text[: text.rindex(_SCORES)] + _SCORES + b"]", offset, event_ms)
    )


def stamp_list(body: bytes, written_ms: int) -> bytes:
    """Add the moment of writing to what `encode_list` made."""
    return body[:-1] + _WRITTEN + b"%d}" % written_ms


def without_stamp(data: bytes) -> bytes:
    """A stored list as `encode_list` made it: what comparisons use."""
    at = data.rfind(_WRITTEN)
    return data if at < 0 else data[:at] + b"}"


def compress_list(stamped: bytes) -> bytes:
    """A list as it stands in Redis under `list_compression=zlib`: any inflate reads it."""
    # A window as small as a list: zlib's own of 32 KB takes four times as long to set up.
    packer = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS)
    return packer.compress(stamped) + packer.flush()


def plain_list(stored: bytes, where: str) -> bytes:
    """JSON of a list that stands in Redis, compressed or not.

    Raises:
        ContractError: it is neither; `where` names it.
    """
    if stored[:1] in (b"{", b""):
        return stored
    try:
        return zlib.decompress(stored)
    except zlib.error as error:
        raise ContractError(
            f"{where}: expected JSON or zlib, got {stored[:8]!r}…: {error}", reason="list"
        ) from error


def decode_stored(data: bytes, kind: type[T], where: str) -> T:
    """JSON that stands in Redis.

    Raises:
        ContractError: it is not what we write; `where` names it. Nothing may be guessed for it.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except BAD_JSON as error:
        raise ContractError(
            f"{where}: {error}; something else wrote it: empty the namespace and fold the log anew",
            reason="stored",
        ) from error


def rules_digest(rules: ListRules) -> str:
    """Short name of a set of rules, for heads."""
    return hashlib.sha256(msgspec.json.encode(rules)).hexdigest()[:16]
