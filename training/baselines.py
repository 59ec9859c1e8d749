"""What any model must beat, ranked by the same rules: always all of it, in every table.

Everything is counted on the training part once. Dense scores of a few hundred predictions at a
time; -inf is an item that is not ranked. Shape letters: X predictions, N items, P positions, D
vector, K places.
"""

from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt
import torch

from afterclick.training.data import I64, UNKNOWN, Held, Sequences
from afterclick.training.evaluate import CELLS_MAX, LIST, ranking_of
from afterclick.training.metrics import MISS, NOTHING, Ranking
from afterclick.training.neighbours import TUNED, Neighbourhood, SessionNeighbours, ranges

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]

BASELINES = (
    "popularity",
    "popularity_24h",
    "session_popularity",
    "markov",
    "markov_session",
    "vmis_knn",
    "ewma",
)

DAY_MS = 24 * 3600 * 1000

SESSION = 1e9
"""Added to a score to put it above every popularity, which is a count of clicks."""

TRANSITION = 1e12
"""Likewise above every session score."""

DECAY = 0.5
"""Weight of an item in the moving average for every item that came after it."""

ROWS_MAX = 1024
"""Predictions at once: neighbours sort some thousand entries for each."""

Scorer = Callable[[I64], npt.NDArray[np.floating]]
"""From positions (X) to scores (X, N), a new array each time."""


class Markov:
    """How often item n came right after item m: rows of a sparse matrix, and popularity."""

    def __init__(self, train: Sequences, num_items: int) -> None:
        self.popularity_N = popularity(train, num_items)
        inner_P = np.ones(train.num_events, bool)
        inner_P[train.start_S1[:-1]] = False
        after = np.flatnonzero(inner_P)
        known = (train.item_P[after] != UNKNOWN) & (train.item_P[after - 1] != UNKNOWN)
        after = after[known]
        pair, self._count = np.unique(
            train.item_P[after - 1] * num_items + train.item_P[after], return_counts=True
        )
        self._next = pair % num_items
        self._row_begin = np.searchsorted(pair // num_items, np.arange(num_items + 1))

    def add_transitions(self, score_XN: F64, last_X: I64) -> None:
        """Put items that followed each prediction's last item before all others, by count."""
        known = np.flatnonzero(last_X != UNKNOWN)
        begin, end = self._row_begin[last_X[known]], self._row_begin[last_X[known] + 1]
        row, entry = ranges(known, begin, end)
        # Equal counts stand by popularity, which is below 1 here.
        fine = self.popularity_N[self._next[entry]] / (self.popularity_N.max() + 1)
        score_XN[row, self._next[entry]] = TRANSITION + self._count[entry] + fine


def popularity(sequences: Sequences, num_items: int) -> F64:
    """Clicks per item."""
    known = sequences.item_P[sequences.item_P != UNKNOWN]
    return np.bincount(known, minlength=num_items).astype(np.float64)


def evaluate_baselines(
    train: Sequences | None,
    held: Held,
    num_items: int,
    *,
    history: int,
    vector_ND: F32 | None = None,
    neighbourhood: Neighbourhood = TUNED,
    methods: Collection[str] = BASELINES,
    filter_seen: bool = False,
) -> dict[str, Ranking]:
    """Rankings of every baseline for the held-out targets, in order of position.

    Args:
        train: what may be counted; without it only what needs no counts is ranked.
        held: what is predicted; codes below `num_items`, or `UNKNOWN`.
        num_items: N.
        history: how far back a session's own items are looked for.
        vector_ND: item vectors; without them there is no `ewma`.
        neighbourhood: settings of `vmis_knn`.
        methods: which to rank, all that can be by default.
        filter_seen: leave items that stand earlier in the sequence out of every list.

    Returns:
        `popularity`, `popularity_24h` (last day of the training part; only with times),
        `session_popularity` (the session's items by their clicks in it, then popularity), `markov`
        (then popularity), `markov_session` (then the session's own items, newest first, then
        popularity), `vmis_knn` (items of neighbours only) and `ewma` (nearest by cosine to the
        moving average of the session's item vectors).
    """
    sequences = held.sequences
    markov = None if train is None else Markov(train, num_items)
    popular_N = np.zeros(num_items) if markov is None else markov.popularity_N
    fixed: dict[str, F64] = {}
    scorers: dict[str, Scorer] = {}
    if train is not None:
        fixed["popularity"] = popular_N
        if train.time_P is not None:
            day = train.select(train.time_P > train.time_P.max() - DAY_MS)
            fixed["popularity_24h"] = popularity(day, num_items)

    def session_popularity(at_X: I64) -> F64:
        row, position = _session(sequences, at_X, history)
        cell = row * num_items + sequences.item_P[position]
        score_XN: F64 = (
            np.bincount(cell, minlength=len(at_X) * num_items)
            .astype(np.float64)
            .reshape(len(at_X), num_items)
        )
        score_XN += popular_N / (popular_N.max(initial=0) + 1)
        return score_XN

    scorers["session_popularity"] = session_popularity
    if markov is not None and train is not None:

        def plain(at_X: I64) -> F64:
            score_XN = np.tile(popular_N, (len(at_X), 1))
            markov.add_transitions(score_XN, sequences.item_P[at_X - 1])
            return score_XN

        def markov_session(at_X: I64) -> F64:
            score_XN = np.tile(popular_N, (len(at_X), 1))
            row, position = _session(sequences, at_X, history)
            # Positions ascend, so an item's newest occurrence is the assignment that stays.
            score_XN[row, sequences.item_P[position]] = SESSION + position
            markov.add_transitions(score_XN, sequences.item_P[at_X - 1])
            return score_XN

        index = SessionNeighbours(train, num_items, neighbourhood)
        scorers["markov"], scorers["markov_session"] = plain, markov_session
        scorers["vmis_knn"] = lambda at_X: index.scores(sequences, at_X)
    if vector_ND is not None:
        unit_ND = _unit(vector_ND)
        scorers["ewma"] = lambda at_X: (
            _unit(_average(sequences, at_X, history, unit_ND)) @ (unit_ND.T)
        )
    at_X = np.flatnonzero(held.target_P)
    found = {}
    for name, score_N in fixed.items():
        if name not in methods:
            continue
        if filter_seen:
            found[name] = _ranking(_constant(score_N), sequences, at_X, num_items, filter_seen=True)
        else:
            found[name] = _ranking_of_all(score_N, sequences.item_P[at_X])
    for name, scorer in scorers.items():
        if name in methods:
            found[name] = _ranking(scorer, sequences, at_X, num_items, filter_seen=filter_seen)
    return found


def drop_seen(score_XN: npt.NDArray[np.floating], sequences: Sequences, at_X: I64) -> None:
    """Leave items that stand earlier in the sequence out of the ranking."""
    row, position = _session(sequences, at_X, sequences.num_events)
    score_XN[row, sequences.item_P[position]] = -np.inf


def _ranking(
    scorer: Scorer, sequences: Sequences, at_X: I64, num_items: int, *, filter_seen: bool
) -> Ranking:
    size = max(1, min(ROWS_MAX, CELLS_MAX // max(num_items, 1)))
    parts = [Ranking(np.zeros(0, np.int64), np.zeros((0, LIST), np.int64))]
    for begin in range(0, len(at_X), size):
        at = at_X[begin : begin + size]
        score_XN = scorer(at)
        if filter_seen:
            drop_seen(score_XN, sequences, at)
        parts.append(ranking_of(torch.from_numpy(score_XN), sequences.item_P[at]))
    return Ranking(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _ranking_of_all(score_N: F64, target_X: I64) -> Ranking:
    """The same scores for every prediction: ranked once."""
    top_K = np.full(LIST, NOTHING, np.int64)
    best = np.argsort(-score_N, kind="stable")[:LIST]
    top_K[: len(best)] = best
    ascending = np.sort(score_N)
    rank_X = len(score_N) - np.searchsorted(ascending, score_N[np.maximum(target_X, 0)])
    return Ranking(np.where(target_X == UNKNOWN, MISS, rank_X), np.tile(top_K, (len(target_X), 1)))


def _constant(score_N: F64) -> Scorer:
    return lambda at_X: np.tile(score_N, (len(at_X), 1))


def _session(sequences: Sequences, at_X: I64, history: int) -> tuple[I64, I64]:
    """Rows and positions of the known items that stand up to `history` before each position."""
    begin = np.maximum(sequences.start_S1[sequences.sequence_numbers()[at_X]], at_X - history)
    row, position = ranges(np.arange(len(at_X)), begin, at_X)
    known = sequences.item_P[position] != UNKNOWN
    return row[known], position[known]


def _average(sequences: Sequences, at_X: I64, history: int, unit_ND: F32) -> F32:
    """(X, D) weighted sum of the vectors of what stands before each position."""
    row, position = _session(sequences, at_X, history)
    weight = DECAY ** (at_X[row] - 1 - position).astype(np.float32)
    sum_XD = np.zeros((len(at_X), unit_ND.shape[1]), np.float32)
    np.add.at(sum_XD, row, weight[:, None] * unit_ND[sequences.item_P[position]])
    return sum_XD


def _unit(vector_XD: F32) -> F32:
    norm_X1 = np.linalg.norm(vector_XD, axis=1, keepdims=True)
    unit_XD: F32 = (vector_XD / np.where(norm_X1 > 0, norm_X1, 1)).astype(np.float32)
    return unit_XD
