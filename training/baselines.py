"""What any model must beat: popularity and first-order Markov chains, ranked by the same rules.

Everything is counted on the training part once. Dense scores of a few hundred predictions at a
time: 1e9 cells take about 2 s. Shape letters: X predictions, N items, P positions.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from afterclick.training.data import I64, UNKNOWN, Held, Sequences
from afterclick.training.evaluate import CELLS_MAX, rank_of
from afterclick.training.metrics import rates

F64 = npt.NDArray[np.float64]

DAY_MS = 24 * 3600 * 1000

SESSION = 1e9
"""Added to a score to put it above every popularity, which is a count of clicks."""

TRANSITION = 1e12
"""Likewise above every session score."""


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
        row, entry = _ranges(known, begin, end)
        # Equal counts stand by popularity, which is below 1 here.
        fine = self.popularity_N[self._next[entry]] / (self.popularity_N.max() + 1)
        score_XN[row, self._next[entry]] = TRANSITION + self._count[entry] + fine


def popularity(sequences: Sequences, num_items: int) -> F64:
    """Clicks per item."""
    known = sequences.item_P[sequences.item_P != UNKNOWN]
    return np.bincount(known, minlength=num_items).astype(np.float64)


def evaluate_baselines(
    train: Sequences, held: Held, num_items: int, *, history: int
) -> dict[str, dict[str, float]]:
    """Rates of every baseline on the held-out targets.

    Args:
        train: what may be counted.
        held: what is predicted; codes below `num_items`, or `UNKNOWN`.
        num_items: N.
        history: how far back `markov_session` looks for the session's own items.

    Returns:
        `popularity`, `popularity_24h` (last day of the training part; only with times), `markov`
        (then popularity) and `markov_session` (then the session's own items, newest first, then
        popularity).
    """
    markov = Markov(train, num_items)
    popular_N = markov.popularity_N
    recent_N = None
    if train.time_P is not None:
        recent_N = popularity(train.select(train.time_P > train.time_P.max() - DAY_MS), num_items)
    ranks: dict[str, list[I64]] = {}
    at_X = np.flatnonzero(held.target_P)
    for at in _chunks(at_X, max(1, CELLS_MAX // num_items)):
        target_X, last_X = held.sequences.item_P[at], held.sequences.item_P[at - 1]
        score_XN = np.tile(popular_N, (len(at), 1))
        ranks.setdefault("popularity", []).append(rank_of(score_XN, target_X))
        if recent_N is not None:
            recent_XN = np.tile(recent_N, (len(at), 1))
            ranks.setdefault("popularity_24h", []).append(rank_of(recent_XN, target_X))
        plain_XN = score_XN.copy()
        markov.add_transitions(plain_XN, last_X)
        ranks.setdefault("markov", []).append(rank_of(plain_XN, target_X))
        _add_session(score_XN, held.sequences, at, history)
        markov.add_transitions(score_XN, last_X)
        ranks.setdefault("markov_session", []).append(rank_of(score_XN, target_X))
    return {name: rates(np.concatenate(parts)) for name, parts in ranks.items()}


def _add_session(score_XN: F64, sequences: Sequences, at_X: I64, history: int) -> None:
    begin = np.maximum(sequences.start_S1[sequences.sequence_numbers()[at_X]], at_X - history)
    row, position = _ranges(np.arange(len(at_X)), begin, at_X)
    known = sequences.item_P[position] != UNKNOWN
    row, position = row[known], position[known]
    # Positions ascend, so an item's newest occurrence is the assignment that stays.
    score_XN[row, sequences.item_P[position]] = SESSION + position


def _ranges(label: I64, begin: I64, end: I64) -> tuple[I64, I64]:
    """All whole numbers from each begin to its end, with the range's label beside each."""
    size = end - begin
    offset = np.repeat(begin - (np.cumsum(size) - size), size)
    return np.repeat(label, size), offset + np.arange(size.sum())


def _chunks(values: I64, size: int) -> Iterator[I64]:
    for begin in range(0, len(values), size):
        yield values[begin : begin + size]
