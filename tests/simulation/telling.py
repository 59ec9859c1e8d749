"""Traces in words: what a call to the simulated Redis said, short enough to read."""

from collections.abc import Sequence
from typing import Any

import msgspec

from afterclick.serving.errors import ContractError
from afterclick.serving.records import Head, InputsEntry, TopList, decode_record


def told(value: object) -> str:
    """One value of a note."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return " ".join(told(part) for part in value)
    if isinstance(value, bytes):
        return _bytes(value)
    text = str(value)
    return "script text" if text.startswith("\n") else text


def _bytes(value: bytes) -> str:
    for kind, words in _KINDS:
        try:
            return words(msgspec.json.decode(value, type=kind))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    try:
        record = decode_record(value)
    except ContractError:
        return value.decode(errors="replace") or "''"
    return f"record(publication {record.publication}, {record.clicks} clicks)"


def _head(head: Head) -> str:
    return f"head({head.next}, publication {head.publication} items {head.items} by {head.batch})"


def _entry(entry: InputsEntry) -> str:
    return f"entry(from {entry.offset}: publication {entry.publication} items {entry.items})"


def _list(top: TopList) -> str:
    return f"list(of {top.offset}, publication {top.publication} items {top.items_offset})"


_KINDS: tuple[tuple[Any, Any], ...] = ((InputsEntry, _entry), (TopList, _list), (Head, _head))
