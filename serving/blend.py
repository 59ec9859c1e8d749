"""The blend: candidates of several sources, described and scored by a small fitted graph.

Candidates come from the model's own ranking, the session neighbours, what followed the user's last
items, the user's own items and what is popular; `blend.onnx` scores their features; the best K are
the list, ties by item id. Knows no Redis or Kafka. A user's list does not depend on who shares the
batch. Shape letters: B users, D scan vector, C the model's best rows, R candidates, L places.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from afterclick.serving import neighbours
from afterclick.serving.best import best_of_groups
from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import F32, I64, MASKED, Look, Provider, Scanner, session_of
from afterclick.serving.errors import ContractError
from afterclick.serving.features import (
    REACH_FEATURES,
    RECENT,
    TIMED,
    Past,
    Pool,
    Published,
    Scored,
    Sums,
    columns_of,
    describe,
)
from afterclick.serving.manifest import BLEND_NAME, BlendSpec, Manifest
from afterclick.serving.memory import UNKNOWN, Memory
from afterclick.serving.ranking import SCORE_DECIMALS, Ranked
from afterclick.serving.records import INTERACTION_BYTES
from afterclick.serving.rows import Rows, rows_after, rows_of
from afterclick.serving.together import Together
from afterclick.serving.trails import place_in_group, ranges

USERS_MAX = 64
"""Users at once: more gain nothing, and the scratch of user x item pairs leaves the cache."""

SCAN_USERS_MAX = 256
"""Users who share a scan."""

SHARED_USERS_MAX = 32
"""Smaller batches that are asked for at the same time become one."""

PAIRS_MAX = 1 << 24
"""Pairs of user and item at once: a scratch of 128 MB."""

_INTERACTION = np.dtype([("hash", "<u8"), ("tag", "<u4"), ("traits", "<u2")])


SOURCES = ("model", "transitions", "repeats", "popularity", "neighbours", "publication")
"""Where candidates come from."""


class Context(NamedTuple):
    """A user, as the blend sees one; the defaults are somebody without a past."""

    interactions: bytes = b""
    """Packed, as a record keeps them."""
    clicks: int = 0
    last_ms: int = 0
    now_ms: int = 0
    """Time of the event that the list answers, or the memory's clock where that is later."""


class Candidates(NamedTuple):
    """Candidates of some users and what is known of them."""

    pool: Pool
    feature_RF: F32
    """In the order of `features.FEATURES`."""
    source_R: npt.NDArray[np.uint8] | None = None
    """A bit for each of `SOURCES` that named the candidate, the first one lowest."""


class Blend:
    """Candidates, features and the graph of one release; safe to call from several threads."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, provider: Provider = "cpu", threads: int = 1
    ) -> None:
        assert manifest.blend is not None
        self.spec = manifest.blend
        try:
            self._columns = columns_of(self.spec.features)
        except KeyError as error:
            raise ContractError(
                f"release {manifest.release}: its blend wants the feature {error}, which this "
                "worker does not know; upgrade the worker",
                reason="blend",
            ) from error
        self._kept: _Kept | None = None
        self._keeping = threading.Lock()
        self._session = session_of(folder / BLEND_NAME, provider, threads)
        self._mean_F = _means(folder / BLEND_NAME)
        width = self._session.get_inputs()[0].shape[1]
        if width != len(self._columns) or len(self._mean_F) != width:
            raise ContractError(
                f"release {manifest.release}: {BLEND_NAME} takes {width} features, the manifest "
                f"names {len(self._columns)}",
                reason="graph",
            )

    def rank(
        self,
        query_BD: F32,
        contexts: Sequence[Context],
        memory: Memory,
        catalog: Catalog,
        scanner: Scanner,
        *,
        want: int,
        drops: Sequence[frozenset[int]] | None = None,
    ) -> list[Ranked]:
        """Lists of users.

        Args:
            query_BD: the model's queries.
            contexts: of the same users.
            memory: as of the signals offset in force.
            catalog: decides what may be listed.
            scanner: over the catalogue's vectors.
            want: items per list; fewer where there are not so many candidates.
            drops: per user, hashes of items left out.
        """
        asked = _Asked(self, query_BD, contexts, memory, catalog, scanner, want, drops)
        if len(query_BD) >= SHARED_USERS_MAX:
            return self._ranked(asked)
        return _TOGETHER.ask(asked)

    def _ranked(self, asked: "_Asked") -> list[Ranked]:
        memory, scanner, want = asked.memory, asked.scanner, asked.want
        rows = self.rows(memory, asked.catalog)
        size = max(2, min(USERS_MAX, PAIRS_MAX // max(memory.num_items, 1)))
        # More users read the matrix together than are described together.
        groups = max(1, min(SCAN_USERS_MAX, PAIRS_MAX // scanner.num_rows) // size)
        ranked: list[Ranked] = []
        for begin in range(0, len(asked.query_BD), size * groups):
            several = asked.part(begin, begin + size * groups)
            look = scanner.look(several.query_BD, _depth(self.spec, want, several.drops))
            for start in range(0, len(several.query_BD), size):
                one = several.part(start, start + size)
                found = gather(
                    self.spec,
                    one.query_BD,
                    one.contexts,
                    memory,
                    rows,
                    scanner,
                    want,
                    one.drops,
                    look=look.part(start, start + size),
                )
                ranked += _lists(found.pool, self.scores(found.feature_RF), memory, want)
        return ranked

    def scores(self, feature_RF: F32, *, without: Sequence[str] = ()) -> F32:
        """(R,) scores of candidates whose columns are all of `features.FEATURES`.

        Features named by `without` count as missing: as 0 deviations from their mean.
        """
        # Row by row of the transpose: that is how `describe` leaves them.
        own_RF = np.ascontiguousarray(feature_RF.T.take(self._columns, axis=0).T)
        for at, name in enumerate(self.spec.features if without else ()):
            if name in without:
                own_RF[:, at] = self._mean_F[at]
        num_rows = len(own_RF)
        if not num_rows:
            return np.zeros(0, np.float32)
        if num_rows < 2:  # one row takes another kernel, whose bits differ
            own_RF = np.resize(own_RF, (2, len(self._columns)))
        score_R: F32 = self._session.run(["score"], {"features": own_RF})[0]
        return score_R[:num_rows]

    def rows(self, memory: Memory, catalog: Catalog) -> Rows:
        """Where the memory's items stand now; only what has changed is looked up anew."""
        with self._keeping:
            kept = self._kept
            if kept is None or kept.memory is not memory or kept.catalog is not catalog:
                changed = None
            else:
                changed = catalog.changed_since(kept.num_changes)
            num_changes = catalog.num_changes
            if kept is None or changed is None:
                rows = rows_of(memory, catalog)
            elif changed or len(kept.rows.row_N) != memory.num_items:
                rows = rows_after(kept.rows, memory, catalog, changed)
            else:
                return kept.rows
            self._kept = _Kept(memory, catalog, num_changes, rows)
            return rows


class _Asked(NamedTuple):
    """What `Blend.rank` is asked."""

    blend: Blend
    query_BD: F32
    contexts: Sequence[Context]
    memory: Memory
    catalog: Catalog
    scanner: Scanner
    want: int
    drops: Sequence[frozenset[int]] | None

    def part(self, begin: int, end: int) -> "_Asked":
        """Some of the users."""
        drops = None if self.drops is None else self.drops[begin:end]
        return self._replace(
            query_BD=self.query_BD[begin:end], contexts=self.contexts[begin:end], drops=drops
        )

    def fits(self, other: "_Asked") -> bool:
        """Whether both can be one."""
        mine = self.blend, self.memory, self.catalog, self.scanner
        others = other.blend, other.memory, other.catalog, other.scanner
        same = all(one is another for one, another in zip(mine, others, strict=True))
        return same and self.want == other.want

    def all_drops(self) -> Sequence[frozenset[int]]:
        """One set a user."""
        return [frozenset()] * len(self.query_BD) if self.drops is None else self.drops


def _ranked_together(asked: Sequence[_Asked]) -> list[list[Ranked]]:
    """Everybody's lists, from one look where the questions fit each other."""
    first = asked[0]
    if not all(first.fits(other) for other in asked):
        return [one.blend._ranked(one) for one in asked]
    drops = None
    if any(one.drops is not None for one in asked):
        drops = [own for one in asked for own in one.all_drops()]
    whole = first._replace(
        query_BD=np.concatenate([one.query_BD for one in asked]),
        contexts=[context for one in asked for context in one.contexts],
        drops=drops,
    )
    ranked = iter(first.blend._ranked(whole))
    return [[next(ranked) for _ in one.contexts] for one in asked]


_TOGETHER = Together(_ranked_together, turns=max(1, (os.cpu_count() or 1) // 2))
"""A small batch costs as much as twenty users of a large one."""


class _Kept(NamedTuple):
    """Rows as of so many changes of a catalogue."""

    memory: Memory
    catalog: Catalog
    num_changes: int
    rows: Rows


def _means(path: Path) -> F32:
    """What the graph takes from each feature: the constant `mean`."""
    for constant in onnx.load(path, load_external_data=False).graph.initializer:
        if constant.name == "mean":
            mean_F: F32 = numpy_helper.to_array(constant)
            return mean_F
    return np.zeros(0, np.float32)


def gather(
    spec: BlendSpec,
    query_BD: F32,
    contexts: Sequence[Context],
    memory: Memory,
    rows: Rows,
    scanner: Scanner,
    want: int,
    drops: Sequence[frozenset[int]] | None = None,
    *,
    tell_sources: bool = False,
    look: Look | None = None,
) -> Candidates:
    """Candidates of at most `USERS_MAX` users, and their features; see `Blend.rank`.

    A `look` that was taken before must be as deep as these users want it.
    """
    if look is None:
        look = scanner.look(query_BD, _depth(spec, want, drops))
    num_users, num_codes = len(query_BD), memory.num_items
    past = past_of(contexts, memory)
    dropped = _dropped(drops, memory)
    own_drops_B = np.array([len(own) for own in drops or [frozenset()] * num_users], np.int64)
    best_BC, *model_E = _of_model(
        look, scanner.num_rows, rows, max(spec.model, want), dropped, own_drops_B, num_codes
    )
    user_E, code_E, _ = model_E
    entries = neighbours.neighbour_items(
        memory.neighbours, past.item_BL, per_item=spec.sessions, nearest=spec.nearest
    )
    near = Sums(*entries, num_users, num_codes)
    keys = [user_E * num_codes + code_E]
    user_E, at_E = memory.next.find(past.item_BL[:, 0], spec.followers)
    followers = [user_E * num_codes + memory.next.item_A[at_E]]
    for place in (1, 2) if spec.older else ():
        user_E, at_E = memory.next.find(past.item_BL[:, place], spec.older)
        followers.append(user_E * num_codes + memory.next.item_A[at_E])
    keys.append(np.concatenate(followers))
    own_BL = past.item_BL[:, : spec.own]
    user_E, place_E = np.nonzero(own_BL >= 0)
    keys.append(user_E * num_codes + own_BL[user_E, place_E])
    popular = memory.popular if spec.popular else memory.popular[:0]
    if spec.touched:
        popular = np.concatenate([popular, memory.touched(spec.touched)])
    keys.append((np.arange(num_users)[:, None] * num_codes + popular).ravel())
    keys.append(_best_near(near, spec.neighbours, num_users, memory))
    keys.append(_published_last(rows.published, past.now_ms_B, spec.newest, num_codes))
    key_E = np.concatenate(keys)
    pool = Pool(key_E, num_users, num_codes, hidden_N=rows.hidden_N, dropped=dropped)
    row_R = rows.row_N[pool.code_R]
    own_R = np.where(row_R < 0, MASKED, look.of(pool.user_R, np.maximum(row_R, 0)))
    scored = Scored(best_BC[:, : max(spec.model, 1)], own_R, *model_E)
    timed = not TIMED.isdisjoint(spec.features)
    reach = not set(REACH_FEATURES).isdisjoint(spec.features)
    feature_RF = describe(
        pool, past, memory, scored, near, rows.published, timed=timed, reach=reach
    )
    if not tell_sources:
        return Candidates(pool, feature_RF)
    return Candidates(pool, np.ascontiguousarray(feature_RF), _sources(pool, keys))


def past_of(contexts: Sequence[Context], memory: Memory) -> Past:
    """Pasts as codes, from the packed interactions."""
    tails = [context.interactions[-RECENT * INTERACTION_BYTES :] for context in contexts]
    kept_E = np.frombuffer(b"".join(tails), _INTERACTION)
    size_B = np.array([len(tail) // INTERACTION_BYTES for tail in tails], np.int64)
    user_E = np.repeat(np.arange(len(tails)), size_B)
    place_E = np.repeat(np.cumsum(size_B), size_B) - 1 - np.arange(len(kept_E))
    find = memory.code_of_hash.get
    code_E = np.array([find(hash_, UNKNOWN) for hash_ in kept_E["hash"].tolist()], np.int64)
    # A reset stands before the interaction that carries it: what is older is another session.
    length_B = size_B.copy()
    reset = np.flatnonzero(kept_E["traits"] >> 15)
    np.minimum.at(length_B, user_E[reset], place_E[reset] + 1)
    item_BL = np.full((len(tails), RECENT), UNKNOWN, np.int64)
    valid = place_E < length_B[user_E]
    item_BL[user_E[valid], place_E[valid]] = code_E[valid]
    return Past(
        item_BL,
        length_B,
        np.array([context.clicks for context in contexts], np.int64),
        np.array([context.last_ms for context in contexts], np.int64),
        np.array([max(context.now_ms, memory.clock_ms) for context in contexts], np.int64),
    )


def _depth(spec: BlendSpec, want: int, drops: Sequence[frozenset[int]] | None) -> int:
    """Best rows that a scan must bring these users."""
    return max(spec.model, want) + 1 + max((len(own) for own in drops or ()), default=0)


def _of_model(
    look: Look,
    num_rows: int,
    rows: Rows,
    num_best: int,
    dropped: I64,
    own_drops_B: I64,
    num_codes: int,
) -> tuple[F32, I64, I64, I64]:
    """Each user's best scores, and user, code and place of these."""
    depth_B = num_best + own_drops_B + 1
    num_users = len(depth_B)
    score_BK, row_BK = look.score_BK, look.row_BK
    code_BK = rows.code_of_row[row_BK]
    fine_BK = (code_BK >= 0) & (score_BK > MASKED / 2)
    # A cut inside a group of equal scores would go by row: leave that group out. Where the cut is
    # depends on the user alone, however deep others make the scan.
    edge_B = np.take_along_axis(score_BK, np.minimum(depth_B, score_BK.shape[1])[:, None] - 1, 1)
    fine_BK &= (score_BK > edge_B) | (depth_B >= num_rows)[:, None]
    if len(dropped):
        key_BK = np.arange(num_users)[:, None] * num_codes + code_BK
        fine_BK &= ~np.isin(key_BK, dropped)
    place_BK = np.cumsum(fine_BK, axis=1)
    user_E, at_E = np.nonzero(fine_BK & (place_BK <= num_best))
    best_BC = np.full((num_users, num_best), MASKED, np.float32)
    best_BC[user_E, place_BK[user_E, at_E] - 1] = score_BK[user_E, at_E]
    # Equal scores share the best place: the order of rows says nothing.
    fresh_BC = np.diff(best_BC, axis=1, prepend=np.inf) != 0
    shared_BC = np.maximum.accumulate(np.where(fresh_BC, np.arange(num_best), 0), axis=1)
    place_E = shared_BC[user_E, place_BK[user_E, at_E] - 1]
    return best_BC, user_E, code_BK[user_E, at_E], place_E


def _best_near(near: Sums, num_best: int, num_users: int, memory: Memory) -> I64:
    """Keys of each user's best items by the neighbours."""
    key_G, num_codes = near.key_G, memory.num_items
    if not len(key_G):
        return key_G
    begin_B1 = np.searchsorted(key_G // num_codes, np.arange(num_users + 1))
    size_B = np.diff(begin_B1)
    # The best of few groups are at least as many as wanted, and none of them is below the edge.
    folds = max(1, int(size_B.max()) // (2 * num_best))
    width = -(-int(size_B.max()) // folds)
    score_BP = np.zeros((num_users, folds * width))
    offset_B = np.arange(num_users) * (folds * width) - begin_B1[:-1]
    score_BP.ravel()[np.arange(len(key_G)) + np.repeat(offset_B, size_B)] = near.sum_G
    highest_BP = score_BP.reshape(num_users, folds, width).max(axis=1)
    most_B = np.maximum(highest_BP.max(axis=1), 1e-9)
    edge_B = np.zeros(num_users)
    if num_best < width:
        edge_B = np.partition(highest_BP, -num_best, axis=1)[:, -num_best]
    close = np.flatnonzero(near.sum_G >= np.repeat(edge_B - 1e-8 * most_B, size_B))
    key_G, sum_G = key_G.take(close), near.sum_G.take(close)
    user_G = key_G // num_codes
    code_G = key_G - user_G * num_codes
    # Of equal scores those with the lower hash, which no code decides.
    fine_G = (memory.hash_N.take(code_G) >> np.uint64(40)).astype(np.float64) * 2.0**-24
    order = np.argsort(2.0 * user_G - (sum_G / most_B[user_G] - 1e-9 * fine_G))
    best: I64 = key_G[order[place_in_group(user_G[order]) < num_best]]
    return best


def _published_last(published: Published, now_ms_B: I64, num: int, num_codes: int) -> I64:
    """Keys of the last items published by each user's time."""
    end_B = np.searchsorted(published.sorted_ms, now_ms_B, side="right")
    count_B = np.minimum(end_B, num)
    user_E = np.repeat(np.arange(len(now_ms_B)), count_B)
    return user_E * num_codes + published.sorted_code[ranges(end_B - count_B, count_B)]


def _sources(pool: Pool, keys: Sequence[I64]) -> npt.NDArray[np.uint8]:
    source_R = np.zeros(len(pool), np.uint8)
    for bit, key_E in enumerate(keys):
        row = pool.find(*np.divmod(key_E, pool.num_codes))[1]
        source_R[row] |= 1 << bit
    return source_R


def _dropped(drops: Sequence[frozenset[int]] | None, memory: Memory) -> I64:
    """Keys of what is left out."""
    keys = [
        user * memory.num_items + code
        for user, hashes in enumerate(drops or ())
        for code in map(memory.code_of_hash.get, hashes)
        if code is not None
    ]
    return np.array(keys, np.int64)


def _lists(pool: Pool, score_R: F32, memory: Memory, want: int) -> list[Ranked]:
    if not len(pool):
        return [Ranked([], [])] * (len(pool.begin_B1) - 1)
    size_B = np.diff(pool.begin_B1)
    place_R = np.arange(len(pool)) - np.repeat(pool.begin_B1[:-1], size_B)
    score_BK, place_BK, num_B = best_of_groups(score_R, place_R, size_B, want + 1)
    again_BK = score_BK[:, 1:] == score_BK[:, :-1]
    again_BK &= np.arange(1, score_BK.shape[1]) < num_B[:, None]
    last_B = np.maximum(pool.begin_B1[1:] - 1, 0)
    at_BK = np.minimum(place_BK + pool.begin_B1[:-1, None], last_B[:, None])
    items = memory.ids_N[pool.code_R[at_BK[:, :want]]].tolist()
    shown = np.round(score_BK[:, :want].astype(np.float64), SCORE_DECIMALS).tolist()
    ranked = []
    for user, (num, tied) in enumerate(zip(num_B.tolist(), again_BK.any(axis=1), strict=True)):
        if tied:  # by item id, which may bring in others than the best by row
            own = slice(pool.begin_B1[user], pool.begin_B1[user + 1])
            names, scores = memory.ids_N[pool.code_R[own]].tolist(), score_R[own].tolist()
            order = sorted(range(len(names)), key=lambda at: (-scores[at], names[at]))[:want]
            values = np.round(score_R[own].astype(np.float64)[order], SCORE_DECIMALS)
            ranked.append(Ranked([names[at] for at in order], values.tolist()))
        else:
            ranked.append(Ranked(items[user][: min(num, want)], shown[user][: min(num, want)]))
    return ranked
