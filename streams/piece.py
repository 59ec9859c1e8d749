"""The part of a chunk that one write covers: decoded, bounded, and turned into writes. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from afterclick.serving.errors import ContractError
from afterclick.serving.records import TopList, UserRecord, decode_stored, encode_record
from afterclick.serving.store import Due, Standing, UserWrite
from afterclick.streams.events import FoldEvent, decode_click
from afterclick.streams.fold import Folded, Inputs
from afterclick.streams.record import DeadLetter, Record

Piece = list[tuple[Record, FoldEvent | DeadLetter]]
"""Records in log order, each with what it decodes to."""


class Limits(NamedTuple):
    """Bounds of one write."""

    users_max: int
    records_max: int
    bytes_max: int
    cache_users_max: int = 20_000
    """Records kept decoded between chunks: about 2 KB each."""
    rebuilds_max: int = 64
    """Users of another publication rebuilt in one write, 50 steps each at worst: they come first at
    a swap, and whoever waits behind them waits no longer than that.
    """


def take(records: Sequence[Record], limits: Limits) -> Piece:
    """As many records from the front as one write may cover, decoded; at least one."""
    piece: Piece = []
    users: set[str] = set()
    size = 0
    for record in records:
        size += len(record.value or b"")
        if piece and (len(piece) >= limits.records_max or size > limits.bytes_max):
            break
        try:
            event = decode_click(
                record.key, record.value, offset=record.offset, record_ms=record.timestamp_ms
            )
        except ContractError as error:
            piece.append((record, DeadLetter(record, error.reason, str(error))))
            continue
        if event.user_id not in users and len(users) >= limits.users_max:
            break
        users.add(event.user_id)
        piece.append((record, event))
    return piece


def within_rebuilds(
    piece: Piece, records: Mapping[str, UserRecord | None], publication: int, rebuilds_max: int
) -> Piece:
    """The front of a piece that has at most so many users of another publication."""
    stale: set[str] = set()
    for at, (_, event) in enumerate(piece):
        if isinstance(event, DeadLetter):
            continue
        record = records[event.user_id]
        if record is not None and record.publication != publication:
            stale.add(event.user_id)
            if len(stale) > rebuilds_max:
                return piece[:at]
    return piece


def user_writes(folded: Folded, came_ms: dict[int, int]) -> list[UserWrite]:
    """What a fold's result does to its users.

    Args:
        folded: the result.
        came_ms: timestamp of every record that was folded, by offset.
    """
    writes = []
    for user, record in folded.records.items():
        due = None
        if user in folded.due:
            offset, event_ms = folded.due[user]
            due = Due(offset, event_ms, came_ms[offset])
        packed = encode_record(record) if record else b""
        writes.append(UserWrite(user, packed, folded.lists.get(user, b""), due))
    return writes


def answers(user: Standing, inputs: Inputs) -> tuple[int, int] | None:
    """Offset and time of the event that a user's list must answer, None where it stands so."""
    if user.due is not None:
        return user.due.offset, user.due.event_ms
    if user.list_data is None:
        return None
    top = decode_stored(user.list_data, TopList, "list")
    made_with = (top.publication, top.items_offset, top.signals)
    if made_with == (inputs.publication, list(inputs.items), inputs.signals):
        return None
    return top.offset, top.event_ms
