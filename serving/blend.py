"""The blend: candidates of several sources, described and scored by a small fitted graph.

Candidates come from the model's own ranking, the session neighbours, what followed the user's last
items, the user's own items and what is popular; `blend.onnx` scores their features; the best K are
the list, ties by item id. Knows no Redis or Kafka. A user's list does not depend on who shares the
batch. Shape letters: B users, D scan vector, R candidates.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from afterclick.serving.best import best_of_groups
from afterclick.serving.candidates import (
    Best,
    Found,
    Left,
    Published,
    Sizes,
    name_candidates,
    scratch,
)
from afterclick.serving.catalog import Catalog
from afterclick.serving.context import Context, past_of
from afterclick.serving.engine import F32
from afterclick.serving.errors import ContractError
from afterclick.serving.features import REACH_FEATURES, TIMED, columns_of, describe
from afterclick.serving.manifest import BLEND_NAME, BlendSpec, Manifest
from afterclick.serving.memory import Memory
from afterclick.serving.ranking import rounded
from afterclick.serving.rows import Rows, rows_after, rows_of
from afterclick.serving.scanner import MASKED, Look, Scanner
from afterclick.serving.sessions import Provider, session_of
from afterclick.serving.texts import SCORE_MAX, Ranked, ranked_of
from afterclick.serving.together import Together

USERS_MAX = 64
"""Users described at once: more gain nothing."""

SHARED_USERS_MAX = 32
"""Smaller batches that are asked for at the same time become one."""


class Candidates(NamedTuple):
    """Candidates of some users and what is known of them."""

    pool: Found
    feature_RF: F32
    """In the order of `features.FEATURES`; column after column in memory."""


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
        # More users read the matrix together than are described together.
        together = scanner.users_max
        size = min(USERS_MAX, together)
        ranked: list[Ranked] = []
        for begin in range(0, len(asked.query_BD), together):
            several = asked.part(begin, begin + together)
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
    look: Look | None = None,
) -> Candidates:
    """Candidates of at most `USERS_MAX` users, and their features; see `Blend.rank`.

    A `look` that was taken before must be as deep as these users want it.
    """
    if look is None:
        look = scanner.look(query_BD, _depth(spec, want, drops))
    past, sessions = past_of(contexts, memory), memory.neighbours
    own = scratch(memory.num_items, len(sessions.start_S1))
    found = name_candidates(
        Sizes(
            model=spec.model,
            want=want,
            neighbours=spec.neighbours,
            sessions=spec.sessions,
            nearest=spec.nearest,
            followers=spec.followers,
            own=spec.own,
            older=spec.older,
            newest=spec.newest,
            popular=spec.popular,
        ),
        past,
        Best(
            np.ascontiguousarray(look.score_BK),
            np.ascontiguousarray(look.row_BK),
            rows.code_of_row,
            scanner.num_rows,
            float(MASKED),
        ),
        _left(drops, len(contexts), rows, memory),
        sessions,
        memory.next.read(),
        memory.popular,
        memory.touched(spec.touched) if spec.touched else memory.popular[:0],
        rows.published,
        memory.hash_N,
        own,
    )
    row_R = rows.row_N[found.code_R]
    user_R = np.repeat(np.arange(len(contexts)), np.diff(found.begin_B1))
    model_R = np.where(row_R < 0, MASKED, found.score_R)
    unknown_R = np.flatnonzero(np.isnan(model_R))
    model_R[unknown_R] = look.of(user_R[unknown_R], row_R[unknown_R])
    timed = not TIMED.isdisjoint(spec.features)
    reach = not set(REACH_FEATURES).isdisjoint(spec.features)
    feature_RF = describe(
        past, found, model_R, memory, rows.published, own.row_N, timed=timed, reach=reach
    )
    return Candidates(found, feature_RF)


def _depth(spec: BlendSpec, want: int, drops: Sequence[frozenset[int]] | None) -> int:
    """Best rows that a scan must bring these users."""
    return max(spec.model, want) + 1 + max((len(own) for own in drops or ()), default=0)


def compile_loops() -> None:
    """Compile what a scan and `gather` run, or read it from where it is kept; a release that is
    loaded does so, too.
    """
    memory, zeros = Memory(["a", "b"]), np.zeros(2, np.int64)
    rows = Rows(zeros, zeros, zeros > 0, Published(zeros, zeros, zeros))
    query_BD = np.zeros((1, 2), np.float32)
    scanner = Scanner(np.zeros((2, 2), np.float32), provider="cpu", threads=1)
    scanner.scores(query_BD)
    gather(BlendSpec(features=["next"]), query_BD, [Context()], memory, rows, scanner, 1)
    memory.texts.ranked(query_BD, np.zeros((1, 2), np.int64), zeros)


def _left(
    drops: Sequence[frozenset[int]] | None, num_users: int, rows: Rows, memory: Memory
) -> Left:
    """What is no candidate."""
    if drops is None:
        nothing = np.zeros(0, np.int64)
        return Left(
            rows.hidden_N, np.zeros(num_users + 1, np.int64), nothing, np.zeros(num_users, np.int64)
        )
    code = memory.code_of_hash
    own_B = [[code[hash_] for hash_ in own if hash_ in code] for own in drops]
    return Left(
        rows.hidden_N,
        np.cumsum([0, *map(len, own_B)]),
        np.array([code for own in own_B for code in own], np.int64),
        np.array([len(own) for own in drops], np.int64),
    )


def _lists(pool: Found, score_R: F32, memory: Memory, want: int) -> list[Ranked]:
    size_B = np.diff(pool.begin_B1)
    if not len(pool.code_R):
        return [ranked_of([], [])] * len(size_B)
    place_R = np.arange(len(score_R)) - np.repeat(pool.begin_B1[:-1], size_B)
    score_BK, place_BK, num_B = best_of_groups(score_R, place_R, size_B, want + 1)
    is_own_BK = np.arange(score_BK.shape[1]) < num_B[:, None]
    again_B = ((score_BK[:, 1:] == score_BK[:, :-1]) & is_own_BK[:, 1:]).any(axis=1)
    again_B |= (is_own_BK & (np.abs(score_BK) > SCORE_MAX)).any(axis=1)
    at_BK = np.where(is_own_BK, place_BK + pool.begin_B1[:-1, None], 0)
    plain_B = np.where(again_B, 0, np.minimum(num_B, want))
    ranked = memory.texts.ranked(score_BK, pool.code_R[at_BK], plain_B)
    for user in np.flatnonzero(again_B).tolist():
        # By item id, which may bring in others than the best by row.
        own = slice(pool.begin_B1[user], pool.begin_B1[user + 1])
        names, scores = memory.ids_N[pool.code_R[own]].tolist(), score_R[own].tolist()
        order = sorted(range(len(names)), key=lambda at: (-scores[at], names[at]))[:want]
        values = rounded(score_R[own].astype(np.float64)[order])
        ranked[user] = ranked_of([names[at] for at in order], values)
    return ranked
