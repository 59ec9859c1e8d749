"""The fast memory: what counts without training, folded from moves.

What followed what, who is popular at several half-lives, when an item was last touched; and the
release's index of past sessions, which a new release renews. A pure fold: what is read depends on
the release and on the moves since, in order, and not on how they were cut into calls. Pure numpy;
knows no Kafka, ONNX, user or list. Shape letters: N items, M moves, H half-lives, E entries.

Everything is bounded: an item keeps `trails.WINDOW` entries of each kind and a few numbers.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import math
import threading
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from afterclick.serving.candidates import Sessions
from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import MEMORY_NAME, Manifest
from afterclick.serving.neighbours import index_sessions
from afterclick.serving.records import item_hash
from afterclick.serving.texts import Texts
from afterclick.serving.trails import Spare, Trails, ranges

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

BEFORE = 3
"""Interactions before a move that it names."""

HOUR_MS = 3600 * 1000

HALF_LIVES_MS = tuple(int(hours * HOUR_MS) for hours in (0.5, 2, 6, 24, 72))
"""Of decayed popularity. A last one is counted in moves, not in time: see `Memory.half_life_moves`.
"""

TICKS = 64
"""Ticks of a half-life: time is counted in whole ticks, so that decay is exact everywhere."""

POPULAR = 24
"""Items that are popular by one measure."""

TOUCHED_MOVES = 512
"""Newest moves whose items are known as touched last."""

POPULAR_EVERY = 64
"""The popular are looked for again after so many moves, or one 256th of the items: a look costs
about as much as reading all items once.
"""

HALF_LIFE_SHARE = 1 / 16
"""Half-life in moves, as a share of the moves that a release was made from."""

UNKNOWN = -1

_FALL = np.array([2.0 ** (-tick / TICKS) for tick in range(TICKS)])
_FOREVER = TICKS * 1000
"""More ticks leave nothing of a count."""


class Move(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True):
    """One counted interaction, as the memory sees it."""

    item_id: str
    event: int
    """Code of its kind (`manifest.EVENTS`)."""
    event_ms: int
    before: tuple[int, ...]
    """Hashes of up to `BEFORE` interactions of the user before it, newest first; a reset empties
    it.
    """


class Items(NamedTuple):
    """What the memory counts of items, as compiled loops read it."""

    count_N: I64
    first_ms_N: I64
    last_ms_N: I64
    tick_NH: I64
    log_heat_NH: F32
    total_tick_H: I64
    total_heat_H: F64
    half_life_H: I64
    """In ms; the last one in moves."""
    moves: int
    ticks: int
    """Of a half-life."""


class Memory:
    """What the moves have left behind; not safe to change while somebody reads.

    Items are numbered as they come: those of the release first, in its order.
    """

    def __init__(self, ids: Iterable[str], *, half_life_moves: int = 1 << 14) -> None:
        self.ids: list[str] = []
        self.code_of_hash: dict[int, int] = {}
        self.clock_ms = 0
        """Largest event time seen."""
        self.moves = 0
        self.half_life_moves = half_life_moves
        self.next = Trails(0)
        """What came right after an item; marks name the item before it, or are `UNKNOWN`."""
        self.later = Trails(0)
        """What came two or three steps after it; marks are the steps."""
        self.back = Trails(0)
        """What came right before it; marks say nothing."""
        num_heats = len(HALF_LIVES_MS) + 1
        self.ids_N: npt.NDArray[np.object_] = np.zeros(0, object)
        """`ids`, to take many at once."""
        self.texts = Texts(())
        """`ids`, as lists write them."""
        self.hash_N = np.zeros(0, np.uint64)
        self.count_N = np.zeros(0, np.int64)
        self.first_ms_N = np.zeros(0, np.int64)
        self.last_ms_N = np.zeros(0, np.int64)
        self.heat_NH = np.zeros((0, num_heats))
        self.tick_NH = np.zeros((0, num_heats), np.int64)
        self.log_heat_NH = np.zeros((0, num_heats), np.float32)
        """Logarithms of the heats."""
        """When each heat was right."""
        self.popular = np.zeros(0, np.int64)
        """Codes of the popular items, as of the last look."""
        self.recent = np.zeros(0, np.int64)
        """Codes of the last `TOUCHED_MOVES` moves, oldest first."""
        self.total_heat_H = np.zeros(num_heats)
        self.total_tick_H = np.zeros(num_heats, np.int64)
        self.neighbours = index_sessions(np.zeros(1, np.int64), np.zeros(0, np.int64), 0, 0)
        self._growing = threading.Lock()
        self._spare = Spare()
        self.know(ids)
        self._every = max(POPULAR_EVERY, len(self.ids) // 256)

    @classmethod
    def from_release(cls, folder: Path, manifest: Manifest, ids: Sequence[str]) -> "Memory":
        """The memory as of a release's snapshot.

        Args:
            folder: the release.
            manifest: its own.
            ids: the release's items, in order.

        Raises:
            ContractError: the file cannot be read, or does not fit the items.
        """
        where = f"release {folder.name}: {MEMORY_NAME}"
        try:
            with np.load(folder / MEMORY_NAME, allow_pickle=False) as stored:
                data = {name: stored[name] for name in stored.files}
            memory = cls(ids, half_life_moves=int(data["half_life_moves"]))
            memory._restore(data)
        except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
            raise ContractError(f"{where}: cannot be read: {error!r}", reason="memory") from error
        if not memory.count_N.shape == memory.next.total_N.shape == (manifest.num_items,):
            raise ContractError(
                f"{where}: counts {len(memory.count_N)} items, the release has "
                f"{manifest.num_items}; export it anew",
                reason="memory",
            )
        return memory

    @property
    def num_items(self) -> int:
        """N, items that were never touched included."""
        return len(self.ids)

    def know(self, ids: Iterable[str]) -> None:
        """Number items that may be listed though nobody has touched them; others may read
        meanwhile.
        """
        with self._growing:
            fresh: dict[int, str] = {}
            for item_id in ids:
                hash_ = item_hash(item_id)
                if hash_ not in self.code_of_hash:
                    fresh.setdefault(hash_, item_id)
            if not fresh:
                return
            begin, num = len(self.ids), len(self.ids) + len(fresh)
            for name, fill in _OF_ITEMS.items():
                setattr(self, name, self._spare.grown(name, getattr(self, name), num, fill))
            self.ids_N[begin:] = list(fresh.values())
            self.texts.extend(list(fresh.values()))
            self.hash_N[begin:] = list(fresh)
            for trails in (self.next, self.later, self.back):
                trails.grow(num)
            self.ids.extend(fresh.values())
            self.code_of_hash.update({hash_: begin + at for at, hash_ in enumerate(fresh)})

    def absorb(self, moves: Sequence[Move]) -> None:
        """Take moves, in order."""
        if not moves:
            return
        self.know(move.item_id for move in moves)
        code = self.code_of_hash
        before_M3 = np.full((len(moves), BEFORE), UNKNOWN, np.int64)
        for at, move in enumerate(moves):
            for place, hash_ in enumerate(move.before[:BEFORE]):
                before_M3[at, place] = code.get(hash_, UNKNOWN)
        self.take(
            np.array([code[item_hash(move.item_id)] for move in moves], np.int64),
            np.array([move.event_ms for move in moves], np.int64),
            before_M3,
        )

    def take(self, item_M: I64, ms_M: I64, before_M3: I64) -> None:
        """`absorb` by code, for whole logs.

        Args:
            item_M: codes.
            ms_M: event times.
            before_M3: codes of what the user touched before, newest first, or `UNKNOWN`.
        """
        # The popular are those as of a fixed number of moves, wherever the calls end.
        due = max((self.moves + len(item_M)) // self._every * self._every - self.moves, 0)
        if due:
            self._count(item_M[:due], ms_M[:due], before_M3[:due])
            self._look_for_popular()
        if due < len(item_M):
            self._count(item_M[due:], ms_M[due:], before_M3[due:])

    def index(self, start_S1: I64, item_P: I64, time_P: I64 | None, per_item: int) -> None:
        """Take a log's sequences as neighbours (see `index_sessions`), those that ended last as the
        newest ones; without times they stand in order.
        """
        if time_P is not None and len(time_P):
            order = np.argsort(np.maximum.reduceat(time_P, start_S1[:-1]), kind="stable")
            size_S = np.diff(start_S1)[order]
            item_P = item_P[ranges(start_S1[:-1][order], size_S)]
            start_S1 = np.concatenate([[0], np.cumsum(size_S)])
        self.neighbours = index_sessions(start_S1, item_P, self.num_items, per_item)

    def heat(self, code_E: I64, now_ms: int) -> F64:
        """(E, H) decayed clicks of items, as they are at `now_ms`."""
        age_EH = np.maximum(self.ticks(now_ms) - self.tick_NH[code_E], 0)
        return self.heat_NH[code_E] * fall(age_EH)

    def items(self) -> Items:
        """What is there now, not copied: good until the next move."""
        return Items(
            self.count_N,
            self.first_ms_N,
            self.last_ms_N,
            self.tick_NH,
            self.log_heat_NH,
            self.total_tick_H,
            self.total_heat_H,
            np.array([*HALF_LIVES_MS, self.half_life_moves]),
            self.moves,
            TICKS,
        )

    def touched(self, num: int) -> I64:
        """Codes of the items touched last, newest first, as far as the last moves tell."""
        backward = self.recent[::-1]
        codes, first = np.unique(backward, return_index=True)
        last: I64 = codes[np.argsort(first)][:num]
        return last

    def ticks(self, now_ms: int) -> I64:
        """(H,) time in ticks of each half-life."""
        ticks = [now_ms * TICKS // half_life for half_life in HALF_LIVES_MS]
        return np.array([*ticks, self.moves * TICKS // self.half_life_moves], np.int64)

    def save(self, folder: Path) -> None:
        """Write `memory.npz`; equal memories write equal arrays."""
        data: dict[str, Any] = self.dump()
        np.savez(folder / MEMORY_NAME, **data)

    def dump(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, by name: equal memories give equal arrays, if they number items alike."""
        data: dict[str, npt.NDArray[Any]] = {
            name: np.asarray(getattr(self, name)) for name in _PLAIN
        }
        for kind in _TRAILS:
            for name, array in getattr(self, kind).dump().items():
                data[f"{kind}.{name}"] = array
        for name, array in self.neighbours._asdict().items():
            data[f"sessions.{name}"] = array
        return data

    def _restore(self, data: dict[str, npt.NDArray[Any]]) -> None:
        for name in _PLAIN:
            value = data[name]
            setattr(self, name, value if value.ndim else int(value))
        for kind in _TRAILS:
            parts = {
                name.partition(".")[2]: array
                for name, array in data.items()
                if name.startswith(f"{kind}.")
            }
            setattr(self, kind, Trails.restored(parts))
        self.log_heat_NH = _log_of(self.heat_NH)
        self.neighbours = Sessions(*(data[f"sessions.{name}"] for name in Sessions._fields))

    def _count(self, item_M: I64, ms_M: I64, before_M3: I64) -> None:
        fresh = np.flatnonzero(self.count_N[item_M] == 0)
        # Of an item that comes twice, the first time stays: assigned last.
        self.first_ms_N[item_M[fresh[::-1]]] = ms_M[fresh[::-1]]
        np.add.at(self.count_N, item_M, 1)
        np.maximum.at(self.last_ms_N, item_M, ms_M)
        self._warm(item_M, ms_M)
        self.clock_ms = max(self.clock_ms, int(ms_M.max()))
        self.moves += len(item_M)
        self.recent = np.concatenate([self.recent, item_M])[-TOUCHED_MOVES:]
        last_M = before_M3[:, 0]
        known = last_M >= 0
        self.next.push(last_M[known], item_M[known], before_M3[known, 1], ms_M[known])
        self.back.push(item_M[known], last_M[known], item_M[known], ms_M[known])
        # Move by move, then step by step: the order in which moves come one by one.
        row, step = np.nonzero(before_M3[:, 1:] >= 0)
        self.later.push(before_M3[row, step + 1], item_M[row], step + 2, ms_M[row])

    def _warm(self, item_M: I64, ms_M: I64) -> None:
        number_M = self.moves + 1 + np.arange(len(item_M))
        tick_MH = np.stack(
            [ms_M * TICKS // half_life for half_life in HALF_LIVES_MS]
            + [number_M * TICKS // self.half_life_moves],
            axis=1,
        )
        # An item's moves follow each other: first all items' first moves, then the second ones, …
        order = np.argsort(item_M, kind="stable")
        begin_G = np.flatnonzero(np.diff(item_M[order], prepend=-1))
        count_G = np.diff(begin_G, append=len(order))
        longest = np.argsort(-count_G, kind="stable")
        begin_G, count_G = begin_G[longest], count_G[longest]
        num = len(count_G)
        for turn in range(int(count_G[0])):
            while count_G[num - 1] <= turn:
                num -= 1
            at = order[begin_G[:num] + turn]
            item, tick_H = item_M[at], tick_MH[at]
            then = np.maximum(self.tick_NH[item], tick_H)
            self.heat_NH[item] = self.heat_NH[item] * fall(then - self.tick_NH[item]) + fall(
                then - tick_H
            )
            self.tick_NH[item] = then
        touched = item_M[order[begin_G]]
        self.log_heat_NH[touched] = _log_of(self.heat_NH[touched])

    def _look_for_popular(self) -> None:
        now_H = self.ticks(self.clock_ms)
        heat_NH = self.heat_NH * fall(np.maximum(now_H - self.tick_NH, 0))
        self.total_heat_H, self.total_tick_H = heat_NH.sum(axis=0), now_H
        measures = [self.count_N.astype(np.float64), *heat_NH.T]
        best = [_best(measure_N, self.hash_N, POPULAR) for measure_N in measures]
        self.popular = np.array(sorted(set(np.concatenate(best).tolist())), np.int64)


def fall(ticks: I64) -> F64:
    """What is left of a count after so many ticks, none negative: exact on every machine."""
    ticks = np.minimum(ticks, _FOREVER)
    left: F64 = np.ldexp(_FALL[ticks % TICKS], -(ticks // TICKS).astype(np.int32))
    return left


def memory_of(
    ids: Sequence[str],
    start_S1: I64,
    item_P: I64,
    time_P: I64 | None,
    *,
    per_item: int,
) -> Memory:
    """The memory of a whole log, bit for bit that of its moves one by one.

    Args:
        ids: of the codes.
        start_S1: sequence s holds positions start[s] to start[s + 1]; they stand in order of start.
        item_P: codes; a negative one is left out.
        time_P: ms; without, moves count sequence after sequence, at time 0.
        per_item: sessions that the index keeps for an item.
    """
    item_M, ms_M, before_M3 = moves_of(start_S1, item_P, time_P)
    memory = Memory(ids, half_life_moves=max(256, math.ceil(len(item_M) * HALF_LIFE_SHARE)))
    memory.take(item_M, ms_M, before_M3)
    memory.index(start_S1, item_P, time_P, per_item)
    return memory


def moves_of(start_S1: I64, item_P: I64, time_P: I64 | None) -> tuple[I64, I64, I64]:
    """Codes, times and codes before of a log's moves, in order of time.

    Without times, sequence after sequence, at time 0.
    """
    place_P = ranges(np.zeros(len(start_S1) - 1, np.int64), np.diff(start_S1))
    before_P3 = np.full((len(item_P), BEFORE), UNKNOWN, np.int64)
    for step in range(1, BEFORE + 1):
        at = np.flatnonzero(place_P >= step)
        before_P3[at, step - 1] = item_P[at - step]
    ms_P = np.zeros_like(item_P) if time_P is None else time_P
    order = np.flatnonzero(item_P >= 0)
    order = order[np.argsort(ms_P[order], kind="stable")]
    return item_P[order], ms_P[order], before_P3[order]


_PLAIN = (
    "clock_ms",
    "moves",
    "half_life_moves",
    "count_N",
    "first_ms_N",
    "last_ms_N",
    "heat_NH",
    "tick_NH",
    "popular",
    "recent",
    "total_heat_H",
    "total_tick_H",
)
_OF_ITEMS: dict[str, object] = {
    "ids_N": "",
    "hash_N": 0,
    "count_N": 0,
    "first_ms_N": 0,
    "last_ms_N": 0,
    "heat_NH": 0,
    "tick_NH": 0,
    "log_heat_NH": np.log(1e-9).astype(np.float32),
}
"""Arrays with an entry for every item, and what stands there before its first move."""
_TRAILS = ("next", "later", "back")


def _log_of(heat: F64) -> F32:
    return np.log(heat + 1e-9).astype(np.float32)


def _best(measure_N: F64, hash_N: npt.NDArray[np.uint64], num: int) -> I64:
    """The highest positive entries; of equals those with the lower hash, which no code decides."""
    if len(measure_N) > num:
        edge = np.partition(measure_N, -num)[-num]
        near = np.flatnonzero((measure_N >= edge) & (measure_N > 0))
    else:
        near = np.flatnonzero(measure_N > 0)
    order = np.lexsort((hash_N[near], -measure_N[near]))
    return near[order[:num]]
