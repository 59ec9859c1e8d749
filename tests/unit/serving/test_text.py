"""Words of a text are the same everywhere, and a new item's vectors follow from them alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterclick.serving.catalog import Catalog
from afterclick.serving.encoder import ItemEncoder
from afterclick.serving.engine import F32
from afterclick.serving.manifest import EncoderSpec, ItemRow, ItemTable
from afterclick.serving.text import FIELD_CHARS_MAX, TEXT_VERSION, bucket, features, words
from afterclick.streams.events import Item

GOLDEN = Path(__file__).parent / "golden" / "tokens.json"
BUCKETS = 1 << 16


def encoder(*said: Item, step_norm: float = 3.0, given_dim: int = 0) -> ItemEncoder:
    """An encoder that met what these items say, with a vector of its own for every bucket."""
    met = {bucket(name, BUCKETS) for item in said for field in features(item) for name in field}
    rng = np.random.default_rng(0)
    vector = rng.standard_normal((len(met), 8)).astype(np.float32)
    spec = EncoderSpec(
        text_version=TEXT_VERSION,
        num_buckets=BUCKETS,
        given_dim=given_dim,
        step_norm=step_norm,
        bias=-2.5,
    )
    given_VD = rng.standard_normal((given_dim, 8)).astype(np.float32)
    return ItemEncoder(spec, np.array(sorted(met)), vector, given_VD)


def catalog(encoder: ItemEncoder) -> Catalog:
    """One released item."""
    ones: F32 = np.ones((1, 8), np.float32)
    rows = ItemTable(items=[ItemRow(item_id="old")])
    return Catalog(rows, ones, np.ones((1, 9), np.float32), encoder)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["text"][:20])
def test_words_are_those_of_the_golden_file(case: dict[str, list[str]]) -> None:
    """A release's buckets are names of words: cut otherwise, they name nothing."""
    text = case["text"]
    assert isinstance(text, str)
    assert words(text) == case["words"]
    item = Item(item_id="x", title=text)
    assert [bucket(name, 1 << 18) for name in features(item)[0]] == case["buckets"]


@given(st.text(max_size=300))
def test_any_text_gives_words(text: str) -> None:
    """Titles come from anybody: surrogates, control characters, half a word."""
    found = words(text)

    assert all(found)
    assert all(0 <= bucket(name, 7) < 7 for name in features(Item(item_id="x", title=text))[0])


def test_a_long_text_is_read_up_to_its_limit() -> None:
    """A worker reads new items between clicks."""
    assert len(words("ab " * FIELD_CHARS_MAX)) <= FIELD_CHARS_MAX // 3 + 1


def test_a_new_item_has_the_vectors_of_what_it_says() -> None:
    """Length as trained, bias of the unseen; the same for the same words, whatever the id."""
    known = Item(item_id="a", title="央行 rate cut", categories=["finance"])
    found = catalog(encoder(known))
    found.apply(Item(item_id="new", title="Rate cut", categories=["finance", "odd"]), 0, 0)
    found.apply(Item(item_id="twin", title="rate CUT", categories=["finance"]), 0, 1)
    row, twin = found.row("new"), found.row("twin")
    assert row is not None
    assert twin is not None

    assert np.linalg.norm(found.step_vectors_NE[row]) == pytest.approx(3.0)
    assert np.linalg.norm(found.scan_vectors_ND[row, :-1]) == pytest.approx(1.0)
    assert found.scan_vectors_ND[row, -1] == -2.5
    assert np.array_equal(found.step_vectors_NE[row], found.step_vectors_NE[twin])
    assert found.changed_rows == {row, twin}


def test_an_item_that_says_nothing_known_has_no_row() -> None:
    """A vector out of nothing would be listed by chance; histories remember it all the same."""
    found = catalog(encoder(Item(item_id="a", title="央行")))
    for at, item in enumerate(
        (Item(item_id="mute"), Item(item_id="odd", title="火星"), Item(item_id="v", vector=[1.0]))
    ):
        found.apply(item, 0, at)

    assert found.num_items == 1
    assert found.offsets == [3]


def test_a_given_vector_alone_is_enough() -> None:
    """Pictures and sounds come as vectors; only their direction counts."""
    made = encoder(given_dim=3)

    one = made.encode(Item(item_id="a", vector=[1.0, 2.0, 2.0]))
    far = made.encode(Item(item_id="b", vector=[10.0, 20.0, 20.0]))

    assert one is not None
    assert far is not None
    np.testing.assert_allclose(one.step_D, far.step_D, rtol=1e-6)
    assert made.encode(Item(item_id="c", vector=[1.0, 2.0])) is None
    assert made.encode(Item(item_id="d", vector=[0.0, 0.0, 0.0])) is None
    assert made.encode(Item(item_id="e", vector=[1e308, 1e308, 1e308])) is None
