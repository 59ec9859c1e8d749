"""Poisoned logs, by the thousand; `make fuzz N=1000000` runs more of the same (tests/fuzz)."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterclick.serving.errors import ContractError
from afterclick.serving.releases import LoadedRelease
from afterclick.streams import piece
from afterclick.streams.events import FoldEvent, decode_click, decode_item
from tests.fuzz.poison import STRANGE, stream
from tests.fuzz.run import REASONS, examine, load_release

TEXT = st.text(st.characters(codec=None), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> LoadedRelease:
    return load_release(tmp_path_factory.mktemp("releases") / "r1")


@pytest.mark.parametrize("round_", range(3))
def test_bad_records_cost_themselves_only(release: LoadedRelease, round_: int) -> None:
    """Whatever bytes come: one letter each with a documented reason, and good records give the
    same bytes as if the bad ones were not there.
    """
    rng = random.Random(f"1/{round_}")

    found = examine(stream(rng, 2000), release, rng)

    assert found.wrong == []
    assert set(found.letters) >= REASONS - {"too-large"}


def test_the_examination_notices_what_it_is_for(
    release: LoadedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that lets wrong keys through must not pass."""
    counter = itertools.count()

    def careless(key: bytes | None, value: bytes | None, **place: int) -> FoldEvent:
        try:
            return decode_click(key, value, **place)
        except ContractError as error:
            if error.reason == "wrong-key":
                return FoldEvent(
                    place["offset"], "u1", f"i{next(counter)}", "click", 0, None, False
                )
            raise

    monkeypatch.setattr(piece, "decode_click", careless)
    rng = random.Random("1/0")

    assert any(
        "a bad record was folded" in text for text in examine(stream(rng, 500), release, rng).wrong
    )


def decodes_or_says_why(key: bytes | None, value: bytes | None, record_ms: int) -> None:
    errors: list[ContractError] = []
    try:
        event = decode_click(key, value, offset=0, record_ms=record_ms)
        assert event.user_id.encode() == key
        assert event.event_ms >= 0
    except ContractError as error:
        errors.append(error)
    try:
        assert decode_item(key, value).item_id.encode() == key
    except ContractError as error:
        errors.append(error)
    assert {error.reason for error in errors} <= REASONS
    assert all(str(error).encode() for error in errors), "it goes into a header"


@given(
    st.none() | st.binary(max_size=40),
    st.none() | st.binary(max_size=200),
    st.integers(-(2**63), 2**63 - 1),
)
def test_any_bytes_decode_or_say_why(key: bytes | None, value: bytes | None, ms: int) -> None:
    """An exception of another kind would end the worker, and the next one at the same record."""
    decodes_or_says_why(key, value, ms)


@given(JSON, JSON, JSON, JSON, st.integers(-(2**63), 2**63 - 1))
def test_any_json_decodes_or_says_why(
    user: object, item: object, event: object, time_ms: object, record_ms: int
) -> None:
    """The right fields with values of every type, surrogates and huge numbers among them."""

    value = json.dumps(
        {"user_id": user, "item_id": item, "event": event, "timestamp_ms": time_ms}
    ).encode()
    key = user.encode("utf-8", "replace") if isinstance(user, str) else b"u"
    decodes_or_says_why(key, value, record_ms)


@pytest.mark.parametrize("field", ["item_id", "title", "categories", "available", "vector", "x"])
@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
def test_any_field_of_an_item_decodes_or_says_why(field: str, strange: str) -> None:
    """Items are read by every worker before its first click: one that cannot be, stops them all."""
    value = f'{{"item_id": "i1", "{field}": {strange}}}'.encode("utf-8", "surrogatepass")
    decodes_or_says_why(b"i1", value, 0)
