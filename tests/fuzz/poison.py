"""Log records that nobody should send: random bytes, broken JSON, strange values, wrong keys.

`good` records are valid clicks of a few users; everything else may be valid by chance. The same
random generator gives the same records.
"""

import json
import random
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from afterclick.streams.record import Record

NOW_MS = 1_700_000_000_000
NUM_USERS = 20

STRANGE = [
    "null", "true", "false", "0", "-1", "1.5", "1e400", "-0.0", "NaN", "Infinity", "1e-320",
    "9007199254740992", "9007199254740993", "18446744073709551616", "-9223372036854775809",
    "1" * 400, '""', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\q"',
    '"\x01"', "[]", "{}", '{"a": 1, "a": 2}', "[" * 300 + "]" * 300, "[" * 20_000,
    '{"a":' * 5_000, '"' + "x" * 64 + '"', '"' + "x" * 65 + '"', '"' + "y" * 256 + '"',
    '"' + "y" * 257 + '"', '"' + "z" * 512 + '"', '"' + "z" * 513 + '"', '"' + "é" * 512 + '"',
    '"\u202e\u0000"', '"用户"', '"forget"', '"visit"', '"click"', '"purchase"',
]  # fmt: skip
"""JSON values, some of them not JSON at all."""

FIELDS = [
    "user_id",
    "item_id",
    "event",
    "timestamp_ms",
    "event_id",
    "context",
    "",
    "user_id\\u0000",
]

TIMES_MS = [NOW_MS, 0, -1, 1, 2**53, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), NOW_MS + 10**9]


class Sent(NamedTuple):
    """A record, and whether it is a valid click; None where only the decoder can tell."""

    record: Record
    good: bool | None


def stream(rng: random.Random, num: int, *, start: int = 0) -> list[Sent]:
    """`num` records from offset `start` on, about half of them good."""
    sent = []
    for offset in range(start, start + num):
        if rng.random() < 0.4:
            sent.append(Sent(_good(rng, offset), True))
        else:
            kind, good = rng.choice(_KINDS)
            sent.append(Sent(kind(rng, offset), good))
    return sent


def _click(rng: random.Random, offset: int) -> dict[str, object]:
    click: dict[str, object] = {"user_id": f"u{rng.randrange(NUM_USERS)}"}
    kind = rng.random()
    if kind < 0.05:
        click["event"] = rng.choice(["visit", "forget"])
    else:
        click["item_id"] = f"i{rng.randrange(400):05d}"
        click["event"] = rng.choice(["click", "view", "purchase", "scroll"])
    if kind < 0.7:
        click["timestamp_ms"] = NOW_MS + 1000 * offset
    if kind < 0.5:
        click["event_id"] = f"e{offset if kind < 0.45 else offset // 2}"
    return click


def _good(rng: random.Random, offset: int) -> Record:
    click = _click(rng, offset)
    key = str(click["user_id"]).encode()
    return Record(offset, NOW_MS + 1000 * offset, key, json.dumps(click).encode())


def _random_bytes(rng: random.Random, offset: int) -> Record:
    value = rng.choice([None, rng.randbytes(rng.randrange(200))])
    return Record(offset, rng.choice(TIMES_MS), _key(rng), value, _headers(rng))


def _mutated(rng: random.Random, offset: int) -> Record:
    """A good value with some bytes flipped, cut, doubled or put in."""
    good = _good(rng, offset)
    value = bytearray(good.value or b"")
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(value) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(value):
            value[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del value[at : at + rng.randrange(1, 20)]
        elif action == 2:
            value[at:at] = value[at : at + rng.randrange(1, 20)]
        else:
            value[at:at] = rng.choice([b"\x00", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"\\u"])
    return msgspec.structs.replace(good, value=bytes(value), headers=_headers(rng))


def _strange(rng: random.Random, offset: int) -> Record:
    """JSON of about the right shape, with values that are not."""
    click = [
        f"{json.dumps(name)}: {json.dumps(value)}" for name, value in _click(rng, offset).items()
    ]
    for _ in range(rng.randrange(1, 4)):
        click.insert(
            rng.randrange(len(click) + 1), f'"{rng.choice(FIELDS)}": {rng.choice(STRANGE)}'
        )
    value = ("{" + ", ".join(click) + "}").encode()
    key = rng.choice([f"u{rng.randrange(NUM_USERS)}".encode(), _key(rng)])
    return Record(offset, rng.choice(TIMES_MS), key, value, _headers(rng))


def _wrong_key(rng: random.Random, offset: int) -> Record:
    good = _good(rng, offset)
    return msgspec.structs.replace(
        good, key=rng.choice([None, b"", (good.key or b"") + b" ", b"\xff" + rng.randbytes(8)])
    )


def _strange_time(rng: random.Random, offset: int) -> Record:
    return msgspec.structs.replace(_good(rng, offset), timestamp_ms=rng.choice(TIMES_MS))


def _bare(rng: random.Random, offset: int) -> Record:
    return Record(offset, NOW_MS, _key(rng), rng.choice(STRANGE).encode("utf-8", "replace"))


def _key(rng: random.Random) -> bytes | None:
    return rng.choice([None, b"", b"u1", b"\xff\xfe", b"\x00", "用户".encode(), rng.randbytes(8)])


def _headers(rng: random.Random) -> tuple[tuple[str, bytes], ...]:
    return rng.choice(
        [(), (), (("", b""),), (("afterclick.reason", b"x"), ("a", rng.randbytes(4)))]
    )


_KINDS: list[tuple[Callable[[random.Random, int], Record], bool | None]] = [
    (_random_bytes, False),
    (_mutated, None),
    (_mutated, None),
    (_strange, None),
    (_strange, None),
    (_wrong_key, False),
    (_strange_time, True),
    (_bare, False),
]
