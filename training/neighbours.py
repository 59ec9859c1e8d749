"""Session neighbours: what followed in the newest training sessions that share the last items.

VMIS-kNN of "Serenade: Low-Latency Session-Based Recommendation in e-Commerce at Scale" (Kersbergen,
Sprangers, Schelter; SIGMOD 2022), written anew from its description:

1. of the session, the last few items; an item that occurs twice counts where it is newest;
2. candidates are the `recent` newest sessions among those that share one of them;
3. a candidate's similarity is the sum of the shared items' weights, which fall linearly with the
   distance from the session's end; the `neighbours` most similar stay, the newer of equals first;
4. an item's score is the sum over neighbours that hold it of similarity x (1 - 0.1 x place, from 1,
   of the newest shared item), times a factor for rare items.

Arrays sorted as whole numbers instead of heaps and hash maps: the same result for many predictions
at once. Shape letters: X predictions, N items, S sessions, E entries.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving import trails
from afterclick.serving.trails import place_in_group
from afterclick.training.data import I64, UNKNOWN, Sequences

F64 = npt.NDArray[np.float64]

PLACE_BITS = 4
LAST_MAX = 1 << PLACE_BITS
"""Items of the session looked at, at most: their places share a sort key with the session."""

SIMILARITY_MAX = LAST_MAX * (LAST_MAX + 1) // 2
"""Similarity of a session that shares all of them."""

LONG = 0.995
"""Quantile of the number of distinct items beyond which a training session is not indexed: such
sessions are shops' robots, and neighbours of everybody.
"""

ENTRIES_MAX = 1 << 22
"""Sessions, or items of neighbours, held at once: about 200 MB with their sort keys."""

REPEATS = 0.05
"""Share of immediate repeats in training from which the last item is a likely next one."""


class Neighbourhood(NamedTuple):
    """Settings of the method; the defaults are those tuned for serenade's own data."""

    recent: int = 1502
    """Newest sessions looked at: per item, and then of all that share an item."""
    neighbours: int = 288
    last_items: int = 4
    """At most `LAST_MAX`."""
    idf_weight: float = 2.0
    """An item's score is multiplied by 1 + weight x log(clicks / sessions with the item)."""
    drop_last: Literal["auto", "yes", "no"] = "auto"
    """Leave the session's last item out of the list, as published. `auto` does so unless at least
    `REPEATS` of the training clicks repeat the item before: a shop's next page is another product,
    but yoochoose logs 16% immediate repeats and would lose 13 points of HR@20.
    """


TUNED = Neighbourhood()

PUBLISHED = Neighbourhood(500, 100, 2, 1.0, "yes")
"""The setting that the authors publish for serenade's example data."""


class SessionNeighbours:
    """The index of the training sessions, and scores from it."""

    def __init__(self, train: Sequences, num_items: int, options: Neighbourhood = TUNED) -> None:
        assert 0 < options.last_items <= LAST_MAX
        self._options, self._num_items = options, num_items
        session_E, item_E = _distinct(train)
        size_S = np.bincount(session_E, minlength=train.num_sequences)
        long = np.quantile(size_S[size_S > 0], LONG) if len(session_E) else 0
        kept_E = size_S[session_E] <= long
        session_E, item_E = session_E[kept_E], item_E[kept_E]
        self._num_sessions = train.num_sequences
        self._begin_S1 = np.searchsorted(session_E, np.arange(self._num_sessions + 1))
        self._item_E = item_E
        # Newest session first within an item, `recent` of them at most.
        order = np.lexsort((-session_E, item_E))
        begin_N1 = np.searchsorted(item_E[order], np.arange(num_items + 1))
        self._post_E = session_E[order]
        self._post_begin_N = begin_N1[:-1]
        self._post_end_N = np.minimum(begin_N1[1:], begin_N1[:-1] + options.recent)
        sessions_N = np.maximum(np.diff(begin_N1), 1)
        self._factor_N = 1 + options.idf_weight * np.log(max(len(item_E), 1) / sessions_N)
        looked_at = options.last_items * options.recent
        of_neighbours = options.neighbours * -(-len(item_E) // max(self._num_sessions, 1))
        self._rows_max = max(1, ENTRIES_MAX // max(looked_at, of_neighbours))
        self.drops_last = options.drop_last == "yes" or (
            options.drop_last == "auto" and _repeats(train) < REPEATS
        )
        """Whether the session's last item is left out."""

    def scores(self, sequences: Sequences, at_X: I64) -> F64:
        """Scores (X, N) of what may stand at positions of sequences, from what stands before them.

        An item of no neighbour has -inf: it is not ranked.

        Cost: of the order of `last_items` x `recent` entries sorted per prediction.
        """
        num_rows, num_items = len(at_X), self._num_items
        if num_rows > self._rows_max:
            size = self._rows_max
            parts = [at_X[begin : begin + size] for begin in range(0, num_rows, size)]
            return np.concatenate([self.scores(sequences, part) for part in parts])
        row_E, place_E, length_X, last_X = self._last_items(sequences, at_X)
        row_E, session_E, similarity_E, place_E = self._similar(row_E, place_E, length_X)
        near = self._nearest(row_E, similarity_E, num_rows)
        row_E, session_E = row_E[near], session_E[near]
        weight_E = similarity_E[near] * np.maximum(1 - 0.1 * (place_E[near] + 1), 0)
        entry_E, position = ranges(
            np.arange(len(row_E)), self._begin_S1[session_E], self._begin_S1[session_E + 1]
        )
        score = np.bincount(
            row_E[entry_E] * num_items + self._item_E[position],
            weights=weight_E[entry_E],
            minlength=num_rows * num_items,
        )
        score_XN = score.astype(np.float64).reshape(num_rows, num_items)  # no entry: integers
        score_XN *= self._factor_N
        if self.drops_last:
            known = last_X != UNKNOWN
            score_XN[np.flatnonzero(known), last_X[known]] = 0
        score_XN[score_XN <= 0] = -np.inf
        return score_XN

    def _last_items(self, sequences: Sequences, at_X: I64) -> tuple[I64, I64, I64, I64]:
        """Items to look up: row x items + item, and their places from the session's end.

        Also how many items each row looks at, unknown ones among them, and its last item.
        """
        start_X = sequences.start_S1[sequences.sequence_numbers()[at_X]]
        begin_X = np.maximum(start_X, at_X - self._options.last_items)
        row_E, position = ranges(np.arange(len(at_X)), begin_X, at_X)
        item_E, place_E = sequences.item_P[position], at_X[row_E] - 1 - position
        known = item_E != UNKNOWN
        row_E, item_E, place_E = row_E[known], item_E[known], place_E[known]
        # Places fall with positions: reversed, the first of an item in its row is the newest.
        cell_E = (row_E * self._num_items + item_E)[::-1]
        cell_E, first = np.unique(cell_E, return_index=True)
        return cell_E, place_E[::-1][first], at_X - begin_X, sequences.item_P[at_X - 1]

    def _similar(self, cell_E: I64, place_E: I64, length_X: I64) -> tuple[I64, I64, I64, I64]:
        """Row, session, similarity and newest shared place of the newest sessions that share."""
        row_E, item_E = np.divmod(cell_E, self._num_items)
        entry, position = ranges(
            np.arange(len(row_E)), self._post_begin_N[item_E], self._post_end_N[item_E]
        )
        # One whole number per (row, session, place), newest session first: numpy sorts those fast.
        age_E = self._num_sessions - 1 - self._post_E[position]
        key_E = ((row_E[entry] * self._num_sessions + age_E) << PLACE_BITS) | place_E[entry]
        key_E.sort()
        pair_E, place_E = key_E >> PLACE_BITS, key_E & (LAST_MAX - 1)
        first = np.flatnonzero(np.diff(pair_E, prepend=-1))
        row_E, age_E = np.divmod(pair_E, self._num_sessions)
        # Divided by its length in the paper, which is the same for all candidates of a row.
        weight_E = length_X[row_E] - place_E
        similarity = np.add.reduceat(weight_E, first) if len(first) else weight_E
        row, session, place = row_E[first], self._num_sessions - 1 - age_E[first], place_E[first]
        newest = place_in_group(row) < self._options.recent
        return row[newest], session[newest], similarity[newest], place[newest]

    def _nearest(self, row_E: I64, similarity_E: I64, num_rows: int) -> I64:
        """Entries of the most similar sessions of each row; of equals the newer."""
        key_E = row_E * (SIMILARITY_MAX + 1) + (SIMILARITY_MAX - similarity_E)
        key_E = key_E * max(len(row_E), 1) + np.arange(len(row_E))
        key_E.sort()
        row, entry = np.divmod(key_E, max(len(row_E), 1))
        return entry[place_in_group(row // (SIMILARITY_MAX + 1)) < self._options.neighbours]


def ranges(label: I64, begin: I64, end: I64) -> tuple[I64, I64]:
    """All whole numbers from each begin to its end, with the range's label beside each."""
    return np.repeat(label, end - begin), trails.ranges(begin, end - begin)


def _distinct(train: Sequences) -> tuple[I64, I64]:
    """(session, item) pairs, each once, sessions numbered by the time of their last click."""
    session_P = train.sequence_numbers()
    if train.time_P is not None and train.num_events:
        last_S = np.maximum.reduceat(train.time_P, train.start_S1[:-1])
        number_S = np.empty(train.num_sequences, np.int64)
        number_S[np.argsort(last_S, kind="stable")] = np.arange(train.num_sequences)
        session_P = number_S[session_P]
    known = train.item_P != UNKNOWN
    width = int(train.item_P.max(initial=0)) + 1
    pair = np.unique(session_P[known] * width + train.item_P[known])
    session, item = np.divmod(pair, width)
    return session, item


def _repeats(train: Sequences) -> float:
    inner_P = np.ones(train.num_events, bool)
    inner_P[train.start_S1[:-1]] = False
    after = np.flatnonzero(inner_P)
    return float((train.item_P[after] == train.item_P[after - 1]).mean()) if len(after) else 0.0
