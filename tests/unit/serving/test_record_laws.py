"""Codecs round-trip, refuse what they cannot read, and stay within their bytes."""

import os
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterclick.serving.errors import ContractError
from afterclick.serving.keys import murmur2, partition_of
from afterclick.serving.manifest import GAP_BUCKETS, gap_bucket
from afterclick.serving.records import (
    Interaction,
    TopList,
    UserRecord,
    compress_list,
    decode_record,
    encode_list,
    encode_record,
    is_repeat,
    list_writer,
    pack_interaction,
    plain_list,
    repeat_tag,
    stamp_list,
    unpack_interactions,
    without_stamp,
)
from afterclick.serving.texts import ranked_of

interactions = st.builds(
    Interaction,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 31),
    st.integers(0, 31),
    st.integers(0, 23),
    st.booleans(),
)
records = st.builds(
    UserRecord,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=64).map(lambda b: b[: len(b) // 4 * 4]),
    st.lists(interactions, max_size=9).map(lambda own: b"".join(map(pack_interaction, own))),
)


@given(records)
def test_a_record_round_trips(record: UserRecord) -> None:
    """What is written is what is read."""
    assert decode_record(encode_record(record)) == record


@given(st.lists(interactions, max_size=9))
def test_interactions_round_trip(own: list[Interaction]) -> None:
    """14 bytes hold all of it."""
    assert unpack_interactions(b"".join(map(pack_interaction, own))) == own


@given(records, st.data())
def test_a_torn_record_is_refused(record: UserRecord, data: st.DataObject) -> None:
    """Half a record must never become a state."""
    whole = encode_record(record)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ContractError):
        decode_record(whole[:cut])


def test_a_record_of_another_version_is_refused() -> None:
    """An old worker must not misread a newer format."""
    data = bytearray(encode_record(UserRecord()))
    data[0] = 2
    with pytest.raises(ContractError, match="version 2"):
        decode_record(bytes(data))


@pytest.mark.parametrize(("float_bytes", "expected"), [(4, 1752), (2, 1240)])
def test_a_full_record_at_the_default_size(float_bytes: int, expected: int) -> None:
    """H 128, L 50: the figures in the module's docstring; Redis adds key and overhead (2 KB)."""
    packed = pack_interaction(Interaction(1, 2, 3, 4, 5, False)) * 50
    record = UserRecord(1, 2, 3, 4, os.urandom(float_bytes * 256), packed)
    assert len(encode_record(record)) == expected


def test_a_repeat_is_the_same_item_event_and_id_or_time() -> None:
    """Producers retry with the same event id, and perhaps another timestamp."""

    def packed(event: str, event_id: str | None, at: int, item: int = 1) -> bytes:
        return pack_interaction(Interaction(item, repeat_tag(event, event_id, at), 0, 0, 0, False))

    past = packed("click", "a", 5) + packed("view", None, 6)
    assert is_repeat(past, packed("click", "a", 99))
    assert is_repeat(past, packed("view", None, 6))
    assert not is_repeat(past, packed("view", None, 7))
    assert not is_repeat(past, packed("click", None, 6))
    assert not is_repeat(past, packed("click", "a", 5, item=2))


@given(st.integers(-(10**15), 10**18))
def test_gap_buckets_are_within_their_table(gap_ms: int) -> None:
    """The graph's embedding has exactly this many rows."""
    assert 0 <= gap_bucket(gap_ms) < GAP_BUCKETS


def test_a_lists_stamp_comes_off_again() -> None:
    """Comparisons leave out the moment of writing and nothing else."""
    top = TopList(
        items=["a", ',"written_ms":7'],
        scores=[1.5, -2.0],
        source="model",
        release="r",
        publication=1,
        items_offset=[3],
        partition=0,
        offset=9,
        event_ms=5,
    )
    body = encode_list(top)
    stamped = stamp_list(body, 1234)
    assert without_stamp(stamped) == body
    assert msgspec.json.decode(stamped, type=TopList).written_ms == 1234
    assert msgspec.json.decode(body, type=TopList).items == top.items


@given(st.text(max_size=9), st.lists(st.integers(0, 9)), st.integers(0), st.integers(0, 3))
def test_lists_around_their_text_are_those_encoded_whole(
    release: str, offsets: list[int], offset: int, signals: int
) -> None:
    """Whatever a release is called: what users' lists share is written once a chunk."""
    shell = TopList(
        items=[],
        scores=[],
        source="model",
        release=release,
        publication=1,
        items_offset=offsets,
        partition=0,
        offset=0,
        event_ms=0,
        signals=signals,
    )
    ranked = ranked_of(["a", '"offset":0', "%d"], [3.0, 2.5, -1.0])
    whole = msgspec.structs.replace(
        shell, items=ranked.items, scores=ranked.scores, offset=offset, event_ms=offset + 1
    )
    assert list_writer(shell)(ranked.text, offset, offset + 1) == encode_list(whole)
    bare = msgspec.structs.replace(whole, scores=[])
    assert list_writer(shell, scores=False)(ranked.text, offset, offset + 1) == encode_list(bare)


@given(st.lists(st.text(min_size=1, max_size=9)))
def test_a_compressed_list_reads_as_the_one_that_was_compressed(items: list[str]) -> None:
    """Readers are told nothing of how workers store lists."""
    stamped = msgspec.json.encode({"items": items, "scores": [1.25] * len(items), "written_ms": 7})
    assert plain_list(compress_list(stamped), "t:top:u") == stamped
    assert plain_list(stamped, "t:top:u") == stamped
    assert zlib.decompress(compress_list(stamped)) == stamped


@pytest.mark.parametrize("data", [b"x", b"\x38\x11", compress_list(b"{}" * 40)[:-3]])
def test_what_is_no_list_is_named(data: bytes) -> None:
    """Cut short, or written by something else: nothing may be guessed for it."""
    with pytest.raises(ContractError, match="t:top:u: expected JSON or zlib"):
        plain_list(data, "t:top:u")


@given(st.binary(max_size=40))
def test_murmur2_is_kafkas(data: bytes) -> None:
    """A user must be looked for in the partition that producers send to."""
    from kafka.partitioner.default import murmur2 as reference

    assert murmur2(data) == reference(data) & 0xFFFFFFFF


@given(st.text(max_size=20), st.integers(1, 64))
def test_a_users_partition_exists(user: str, num: int) -> None:
    """Any id, any count."""
    assert 0 <= partition_of(user, num) < num
