"""Clicks and items as they travel through Kafka: decode, validate, encode; what a dead letter is.

Strict on types, lenient on unknown fields. Knows no broker. A click's key is its user id; a key
that
differs would split a user over two partitions and is refused under its own reason.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from afterclick.serving.errors import ContractError

VALUE_BYTES_MAX = 1 << 20
"""Larger values are dead letters: a click is some hundred bytes, and one chunk may hold 1 MiB."""

CLOCK_SKEW_MS = 5 * 60 * 1000
"""An event time further past its record's own timestamp than this is replaced by it."""

Id = Annotated[str, Meta(min_length=1, max_length=512)]
NO_ITEM_EVENTS = frozenset({"visit", "forget"})


class Click(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One user event. `visit` asks for a fresh list; `forget` empties the user; others name an
    item.
    """

    user_id: Id
    item_id: Annotated[str, Meta(max_length=512)] = ""
    event: Annotated[str, Meta(min_length=1, max_length=64)] = "click"
    timestamp_ms: Annotated[int, Meta(ge=0, le=1 << 53)] | None = None
    event_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    context: dict[str, Any] | None = None


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version of a catalogue item."""

    item_id: Id
    title: Annotated[str, Meta(max_length=4096)] = ""
    text: Annotated[str, Meta(max_length=1 << 16)] = ""
    categories: Annotated[list[Annotated[str, Meta(max_length=512)]], Meta(max_length=256)] = []
    domain: Annotated[str, Meta(max_length=512)] = ""
    available: bool = True
    published_ms: int | None = None
    vector: Annotated[list[float], Meta(max_length=4096)] | None = None


class FoldEvent(msgspec.Struct, frozen=True, gc=False):
    """A valid click with its place in the log; what the fold is fed."""

    offset: int
    user_id: str
    item_id: str
    event: str
    event_ms: int
    """Event time in force: the click's own, or its record's where that is missing or too far ahead.
    """
    event_id: str | None
    clock_replaced: bool


_clicks = msgspec.json.Decoder(Click)
_items = msgspec.json.Decoder(Item)


def decode_click(
    key: bytes | None, value: bytes | None, *, offset: int, record_ms: int
) -> FoldEvent:
    """Turn a record of the clicks topic into an event.

    Args:
        key: the record's key, the user id in UTF-8.
        value: JSON of a `Click`.
        offset: the record's offset.
        record_ms: the record's own timestamp, unix milliseconds.

    Raises:
        ContractError: with reason `null-value`, `too-large`, `json`, `schema`, `missing-item`,
            `null-key` or `wrong-key`; the record becomes a dead letter.
    """
    click = _decode(_clicks, value, "click")
    if key is None:
        raise ContractError("click: the record has no key, expected the user id", reason="null-key")
    if key != click.user_id.encode():
        raise ContractError(
            f"click: key {key[:64]!r} differs from user_id {click.user_id[:64]!r}",
            reason="wrong-key",
        )
    if not click.item_id and click.event not in NO_ITEM_EVENTS:
        raise ContractError(
            f"click: event {click.event!r} needs an item_id, got ''", reason="missing-item"
        )
    event_ms = click.timestamp_ms
    replaced = event_ms is not None and event_ms > record_ms + CLOCK_SKEW_MS
    if event_ms is None or replaced:
        event_ms = max(record_ms, 0)
    return FoldEvent(
        offset, click.user_id, click.item_id, click.event, event_ms, click.event_id, replaced
    )


def decode_item(key: bytes | None, value: bytes | None) -> Item:
    """Turn a record of the items topic into an item version.

    Raises:
        ContractError: as `decode_click`, where the key must equal the item id.
    """
    item: Item = _decode(_items, value, "item")
    if key is None:
        raise ContractError("item: the record has no key, expected the item id", reason="null-key")
    if key != item.item_id.encode():
        raise ContractError(
            f"item: key {key[:64]!r} differs from item_id {item.item_id[:64]!r}", reason="wrong-key"
        )
    return item


def encode(event: Click | Item) -> tuple[bytes, bytes]:
    """Key and value to produce; the key decides the partition (murmur2)."""
    key = event.user_id if isinstance(event, Click) else event.item_id
    return key.encode(), msgspec.json.encode(event)


def _decode(decoder: "msgspec.json.Decoder[Any]", value: bytes | None, what: str) -> Any:
    if value is None:
        raise ContractError(f"{what}: the value is null, expected JSON", reason="null-value")
    if len(value) > VALUE_BYTES_MAX:
        raise ContractError(
            f"{what}: value of {len(value)} bytes, at most {VALUE_BYTES_MAX} are taken",
            reason="too-large",
        )
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        raise ContractError(f"{what}: {error}", reason="schema") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"{what}: not JSON: {error}", reason="json") from error
