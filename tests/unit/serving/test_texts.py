"""Lists written by a compiled loop are the bytes that msgspec writes."""

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.serving.texts import DECIMALS, SCORE_MAX, Texts, ranked_of

scores = st.floats(-SCORE_MAX, SCORE_MAX, width=32) | st.floats(-20, 20, width=32)
ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(ids, min_size=1, max_size=6),
    st.lists(st.lists(st.tuples(scores, st.integers(0, 99)), max_size=9), min_size=1, max_size=4),
    st.integers(0, 6),
)
def test_lists_are_the_bytes_of_msgspec(
    names: list[str], lists: list[list[tuple[float, int]]], first: int
) -> None:
    """What stands in Redis must not tell which code wrote it: verify compares bytes."""
    texts = Texts(names[:first])
    for name in names[first:]:
        texts.extend([name])
    num_B = np.array([len(own) for own in lists])
    score_BK = np.zeros((len(lists), max(1, num_B.max())), np.float32)
    number_BK = np.zeros(score_BK.shape, np.int64)
    for user, own in enumerate(lists):
        for at, (score, number) in enumerate(own):
            score_BK[user, at], number_BK[user, at] = score, number % len(names)
    found = texts.ranked(score_BK, number_BK, num_B)
    for user, ranked in enumerate(found):
        items = [names[number] for number in number_BK[user, : num_B[user]]]
        values = np.round(score_BK[user, : num_B[user]].astype(np.float64), DECIMALS).tolist()
        assert ranked == ranked_of(items, values)
        assert b"{%b}" % ranked.text == msgspec.json.encode({"items": items, "scores": values})
        assert (ranked.items, ranked.scores) == (items, values)
