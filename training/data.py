"""Clicks as arrays: grouped by user, deduplicated, coded, split by time, cut into windows.

Knows no file format, Kafka or torch. Shape letters: P positions (all interactions, one sequence
after the other), S sequences, N items, W windows.

Rules are those of the worker's fold, so that a model learns from what it will be fed: repeats among
the last interactions are dropped, `forget` erases what was before, gaps come from the latest time
seen, and an idle reset starts a new sequence.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import GAP_BUCKETS, event_code
from afterclick.streams.events import NO_ITEM_EVENTS

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

HOUR_MS = 3600 * 1000

TAIL_OF = 3
"""Shorter sequences keep their tail: one click must be left to learn a step from, and one to take.
"""

UNKNOWN = -1
"""Code of an item outside the vocabulary: it is no step, and never predicted."""


class Columns(NamedTuple):
    """Raw clicks, one entry each, every user's in the order in which they count."""

    user: npt.NDArray[np.object_]
    item: npt.NDArray[np.object_]
    event: npt.NDArray[np.object_]
    time_ms: I64 | None
    """None where the source has no times."""
    event_id: npt.NDArray[np.object_] | None
    """None entries where a click has none."""

    def select(self, keep: Any) -> "Columns":
        """Only these clicks: a mask, or a slice."""
        time_ms, event_id = self.time_ms, self.event_id
        return Columns(
            self.user[keep],
            self.item[keep],
            self.event[keep],
            None if time_ms is None else time_ms[keep],
            None if event_id is None else event_id[keep],
        )


class Sequences(NamedTuple):
    """Interactions of S sequences, one after the other; sequences stand in order of their start."""

    start_S1: I64
    """Sequence s holds positions start[s] to start[s + 1]."""
    item_P: I64
    event_P: I64
    gap_P: I64
    time_P: I64 | None

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.start_S1) - 1

    @property
    def num_events(self) -> int:
        """P."""
        return len(self.item_P)

    def hours(self, at: I64 | slice = slice(None)) -> I64:
        """Hour of day UTC of every position, or of these; 0 without times."""
        if self.time_P is None:
            return np.zeros_like(self.item_P[at])
        return self.time_P[at] // HOUR_MS % 24

    def sizes(self) -> I64:
        """Interactions of each sequence."""
        return np.diff(self.start_S1)

    def sequence_numbers(self) -> I64:
        """Number of the sequence that each position belongs to."""
        return np.repeat(np.arange(self.num_sequences), self.sizes())

    def select(self, keep_P: Mask) -> "Sequences":
        """Only these positions; sequences left empty are gone."""
        sizes = np.bincount(self.sequence_numbers()[keep_P], minlength=self.num_sequences)
        return Sequences(
            np.concatenate([[0], np.cumsum(sizes[sizes > 0])]).astype(np.int64),
            self.item_P[keep_P],
            self.event_P[keep_P],
            self.gap_P[keep_P],
            None if self.time_P is None else self.time_P[keep_P],
        )


class Log(NamedTuple):
    """A whole snapshot."""

    item_ids: list[str]
    """Ids of the codes in `sequences.item_P`, sorted."""
    sequences: Sequences
    num_duplicates: int
    num_forgotten: int
    """Interactions dropped by `forget`."""


class Held(NamedTuple):
    """Sequences of which some positions are to be predicted."""

    sequences: Sequences
    target_P: Mask


def joined(parts: Sequence[Columns]) -> Columns:
    """Clicks of several sources, one after the other; times and ids count where all have them."""
    if not parts:
        nothing = np.zeros(0, object)
        return Columns(nothing, nothing, nothing, None, None)

    def column(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    return Columns(*(column(name) for name in Columns._fields))


def build_log(columns: Columns, *, history: int, idle_ttl_s: int = 0) -> Log:
    """Apply the fold's rules to raw clicks.

    Args:
        columns: the clicks.
        history: repeats are looked for among this many last interactions.
        idle_ttl_s: a longer gap starts a new sequence; 0 never does.

    Raises:
        ContractError: no click is left.
    """
    user_X, event_X = _codes(columns.user)[1], columns.event
    order = np.argsort(user_X, kind="stable")
    user_X = user_X[order]
    event_X = event_X[order]
    time_X = None if columns.time_ms is None else columns.time_ms[order]
    forgotten = _before_last_forget(user_X, event_X == "forget")
    keep = ~forgotten & ~np.isin(event_X, sorted(NO_ITEM_EVENTS))
    num_forgotten = int((forgotten & (event_X != "forget")).sum())
    user_P, event_P, order = user_X[keep], event_X[keep], order[keep]
    time_P = None if time_X is None else time_X[keep]
    item_ids, item_P = _codes(columns.item[order])
    tag_P = _tags(columns, order, item_P, event_P)
    fresh = np.ones(len(user_P), bool) if tag_P is None else _fresh(user_P, tag_P, history)
    if not fresh.any():
        raise ContractError(
            "training: no click is left of the snapshot; check the file, its columns, or the topic",
            reason="no-clicks",
        )
    user_P, item_P, event_P = user_P[fresh], item_P[fresh], event_P[fresh]
    names, name_P = _codes(event_P)
    code_P = np.array([event_code(name) for name in names], np.int64)[name_P]
    first_P = np.concatenate([[True], user_P[1:] != user_P[:-1]])
    gap_P = np.zeros(len(user_P), np.int64)
    if time_P is not None:
        time_P = time_P[fresh]
        gap_ms = _gaps_ms(user_P, first_P, time_P)
        if idle_ttl_s:
            first_P = first_P | (gap_ms > idle_ttl_s * 1000)
        gap_P = np.where(first_P, 0, gap_buckets(gap_ms))
    start = np.flatnonzero(first_P)
    sequences = Sequences(
        np.concatenate([start, [len(user_P)]]).astype(np.int64), item_P, code_P, gap_P, time_P
    )
    # Without times, sequences stand in the order in which the file first names them.
    position_P = order[fresh]
    began = position_P[start] if time_P is None else time_P[start]
    log = Log(item_ids, _reorder(sequences, np.argsort(began, kind="stable")), 0, num_forgotten)
    return log._replace(num_duplicates=int((~fresh).sum()))


def gap_buckets(gap_ms: I64) -> I64:
    """`serving.manifest.gap_bucket` of every entry."""
    gap_s = np.maximum(gap_ms, 0) // 1000
    # frexp's exponent of a positive whole number below 2**53 is its bit length.
    return np.minimum(np.frexp(gap_s.astype(np.float64))[1], GAP_BUCKETS - 1).astype(np.int64)


def recode(log: Log, item_ids: Sequence[str]) -> Sequences:
    """The log's sequences with codes of another sorted vocabulary; `UNKNOWN` where it lacks one."""
    code = {item_id: at for at, item_id in enumerate(item_ids)}
    table = np.array([code.get(item_id, UNKNOWN) for item_id in log.item_ids], np.int64)
    return log.sequences._replace(item_P=table[log.sequences.item_P])


def split(sequences: Sequences, share: float, how: str) -> tuple[Sequences, Held | None]:
    """Part to learn from, and the newest part to be predicted.

    Args:
        sequences: in order of their start.
        share: of the events, or of the sequences, that is held out; 0 holds out nothing.
        how: `events`, `sequences`, `tails` or `auto` (see `TrainingSettings.split`).

    Raises:
        ContractError: `events` was asked for and there are no times.
    """
    if share <= 0 or sequences.num_sequences < 2:
        return sequences, None
    if how == "events" and sequences.time_P is None:
        raise ContractError(
            "split: 'events' needs timestamps, and this log has none; use 'sequences' or 'auto'",
            reason="no-times",
        )
    if how == "tails":
        size_S = sequences.sizes()
        kept_S = np.where(size_S < TAIL_OF, size_S, size_S - np.maximum(1, size_S * share // 1))
        place_P = np.arange(sequences.num_events) - np.repeat(sequences.start_S1[:-1], size_S)
        tail_P = place_P >= np.repeat(kept_S, size_S)
        asked_P = np.repeat(kept_S < size_S, size_S)
        held = sequences.select(asked_P)
        return sequences.select(~tail_P), held_out(held, tail_P[asked_P])
    if how != "sequences" and sequences.time_P is not None:
        cut_ms = np.quantile(sequences.time_P, 1 - share, method="higher")
        newest_P = sequences.time_P >= cut_ms
        begun_S = ~newest_P[sequences.start_S1[:-1]]
        known_before = begun_S[sequences.sequence_numbers()][newest_P].mean()
        if (how == "events" or known_before > 0.5) and not newest_P.all():
            active_S = np.logical_or.reduceat(newest_P, sequences.start_S1[:-1])
            held = sequences.select(active_S[sequences.sequence_numbers()])
            assert held.time_P is not None
            return sequences.select(~newest_P), held_out(held, held.time_P >= cut_ms)
    first_held = sequences.num_sequences - max(1, round(sequences.num_sequences * share))
    held_P = sequences.sequence_numbers() >= first_held
    return sequences.select(~held_P), held_out(sequences.select(held_P), None)


def held_out(sequences: Sequences, target_P: Mask | None) -> Held:
    """Predict these positions, or all; never the first of a sequence, which has no past."""
    target_P = np.ones(sequences.num_events, bool) if target_P is None else target_P.copy()
    target_P[sequences.start_S1[:-1]] = False
    return Held(sequences, target_P)


def newest(held: Held, limit: int) -> Held:
    """At most `limit` targets: those of the sequences that end last, or of the last in order."""
    sequences = held.sequences
    targets_S = np.add.reduceat(held.target_P.astype(np.int64), sequences.start_S1[:-1])
    if sequences.time_P is None:
        order = np.arange(sequences.num_sequences)
    else:
        order = np.argsort(sequences.time_P[sequences.start_S1[1:] - 1], kind="stable")
    from_last_S = np.empty(sequences.num_sequences, np.int64)
    from_last_S[order[::-1]] = np.cumsum(targets_S[order[::-1]])
    keep_S = (from_last_S <= limit) | (from_last_S == targets_S)
    keep_P = (keep_S & (targets_S > 0))[sequences.sequence_numbers()]
    return Held(sequences.select(keep_P), held.target_P[keep_P])


def windows(sequences: Sequences, length: int) -> tuple[I64, I64]:
    """Cut sequences so that every transition lies in exactly one window.

    Returns:
        First position and number of positions, 2 to `length` + 1, of every window; the last
        position of one window is the first of the next.
    """
    steps_S = sequences.sizes() - 1
    num_S = -(-steps_S // length)
    within_W = np.arange(num_S.sum()) - np.repeat(np.cumsum(num_S) - num_S, num_S)
    begin_W = np.repeat(sequences.start_S1[:-1], num_S) + within_W * length
    size_W = np.minimum(np.repeat(steps_S, num_S) - within_W * length, length) + 1
    return begin_W, size_W


def batches(cost_W: I64, budget: int, rng: np.random.Generator) -> list[I64]:
    """Shuffled groups of windows of about equal cost, each costing about `budget` in all."""
    # Noise below one step mixes windows of equal length, and a little beyond, between epochs.
    order = np.argsort(cost_W * rng.uniform(0.9, 1.1, len(cost_W)), kind="stable")
    group = (np.cumsum(cost_W[order]) - 1) // budget
    parts = np.split(order, np.flatnonzero(np.diff(group)) + 1)
    return [parts[at] for at in rng.permutation(len(parts))]


def _codes(values: npt.NDArray[np.object_]) -> tuple[list[str], I64]:
    """Sorted distinct strings, and every entry's place among them."""
    code: dict[str, int] = {}
    first_seen = np.fromiter(
        (code.setdefault(value, len(code)) for value in values), np.int64, len(values)
    )
    names = sorted(code)
    place = np.empty(len(code), np.int64)
    place[[code[name] for name in names]] = np.arange(len(code))
    return names, place[first_seen]


def _before_last_forget(user_X: I64, forget_X: Mask) -> Mask:
    """Positions at or before their user's last `forget`."""
    last = np.full(int(user_X.max(initial=-1)) + 1, -1, np.int64)
    last[user_X[forget_X]] = np.flatnonzero(forget_X)  # the last assignment of a user stays
    return np.arange(len(user_X)) <= last[user_X]


def _tags(
    columns: Columns, order: I64, item_P: I64, event_P: npt.NDArray[np.object_]
) -> I64 | None:
    """Equal where `is_repeat` would find item and tag equal; None where nothing can repeat."""
    position_P = np.arange(len(item_P))
    time_P = position_P if columns.time_ms is None else columns.time_ms[order]
    parts = [item_P, _codes(event_P)[1]]
    if columns.event_id is None:
        if columns.time_ms is None:
            return None
        parts.append(time_P)
    else:
        named = columns.event_id[order]
        has_id = np.array([name is not None for name in named], bool)
        id_P = _codes(np.array([name or "" for name in named], object))[1]
        parts += [np.where(has_id, -1, time_P), np.where(has_id, id_P, -1)]
    tag_P = np.zeros(len(item_P), np.int64)
    for part in parts:
        values, code_P = np.unique(part, return_inverse=True)
        tag_P = np.unique(tag_P * len(values) + code_P, return_inverse=True)[1]
    return tag_P


def _fresh(user_P: I64, tag_P: I64, history: int) -> Mask:
    """Whether the fold would take a click: not among the last `history` taken ones of its user."""
    fresh = np.ones(len(user_P), bool)
    order = np.lexsort((tag_P, user_P))
    same = (user_P[order][1:] == user_P[order][:-1]) & (tag_P[order][1:] == tag_P[order][:-1])
    # Only users who repeat anything are walked through one by one.
    for user in np.unique(user_P[order][1:][same]).tolist():
        begin, end = np.searchsorted(user_P, [user, user + 1])
        taken: list[int] = []
        for at, tag in enumerate(tag_P[begin:end].tolist(), begin):
            if tag in taken[-history:]:
                fresh[at] = False
            else:
                taken.append(tag)
    return fresh


def _gaps_ms(user_P: I64, first_P: Mask, time_P: I64) -> I64:
    """Time since the latest time the user's interactions had before; 0 for the first."""
    latest_P = time_P.copy()
    backward = (time_P[1:] < time_P[:-1]) & ~first_P[1:]
    for user in np.unique(user_P[1:][backward]).tolist():
        begin, end = np.searchsorted(user_P, [user, user + 1])
        latest_P[begin:end] = np.maximum.accumulate(time_P[begin:end])
    gap = np.zeros(len(time_P), np.int64)
    gap[1:] = np.where(first_P[1:], 0, np.maximum(time_P[1:] - latest_P[:-1], 0))
    return gap


def _reorder(sequences: Sequences, order: I64) -> Sequences:
    sizes = sequences.sizes()[order]
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    at_P = np.repeat(sequences.start_S1[:-1][order] - start[:-1], sizes) + np.arange(start[-1])
    return Sequences(
        start,
        sequences.item_P[at_P],
        sequences.event_P[at_P],
        sequences.gap_P[at_P],
        None if sequences.time_P is None else sequences.time_P[at_P],
    )
