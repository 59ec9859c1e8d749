"""A release's graphs over many users: states after steps, and lists of states.

Whatever is computed in batches gives the bits that it gives alone (serving/engine.py), so nobody's
result depends on who shared a call. Knows no event, partition or record.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from afterclick.serving.blend import Blend
from afterclick.serving.catalog import Catalog
from afterclick.serving.context import Context
from afterclick.serving.engine import F32, Engine
from afterclick.serving.memory import Memory
from afterclick.serving.past import past_of
from afterclick.serving.ranking import pick, pick_plain, rank_all
from afterclick.serving.scanner import Scanner
from afterclick.serving.texts import Ranked

PADDING_MAX = 48
"""Steps that may be computed for nothing where that saves a call: each takes 2.6 µs at H 128, a
call and what is around it 120.
"""


class Release(Protocol):
    """What the fold uses of a loaded release (serving.releases.LoadedRelease has it)."""

    engine: Engine
    catalog: Catalog
    scanner: Scanner
    blend: Blend | None
    memory: Memory | None


class Step(NamedTuple):
    """What the step graph is fed for one interaction."""

    row: int
    event: int
    gap: int
    hour: int


def rank_states(
    states_BS: F32,
    release: Release,
    *,
    want: int,
    seen: Sequence[frozenset[int]] | None = None,
    contexts: Sequence[Context] | None = None,
    head: str = "click",
) -> list[Ranked]:
    """Lists of users from their states, by the release's blend where it has one.

    Args:
        states_BS: states as records hold them.
        release: the engine and the catalogue to score.
        want: items per list.
        seen: per user, item hashes to leave out.
        contexts: what blend and attention must know of the users; None ranks people without a
            past.
        head: what to rank for.
    """
    ranked: list[Ranked] = []
    size = release.scanner.users_max
    for start in range(0, len(states_BS), size):
        own = (contexts or [Context()] * len(states_BS))[start : start + size]
        past = past_of(
            [context.interactions for context in own],
            release.catalog,
            release.engine.manifest.inputs.past,
        )
        q_BD = release.engine.query(states_BS[start : start + size], past, head=head)
        if release.blend is not None and release.memory is not None:
            ranked += release.blend.rank(
                q_BD,
                own,
                release.memory,
                release.catalog,
                release.scanner,
                want=want,
                drops=None if seen is None else seen[start : start + size],
            )
            continue
        drops = [_ids_of(hashes, release.catalog) for hashes in (seen or ())[start : start + size]]
        fetch = want + 1 + max((len(drop) for drop in drops), default=0)
        scores_BK, rows_BK = release.scanner.top(q_BD, fetch)
        complete = scores_BK.shape[1] == release.scanner.num_rows
        plain = pick_plain(scores_BK, rows_BK, release.catalog.texts, want=want)
        for at in range(len(q_BD)):
            drop = drops[at] if drops else frozenset()
            found = plain[at] if not drop else None
            found = found or pick(
                scores_BK[at],
                rows_BK[at],
                release.catalog.ids_N,
                want=want,
                drop=drop,
                complete=complete,
            )
            if found is None:
                scores_N = release.scanner.scores(q_BD[at : at + 1])[0]
                found = rank_all(scores_N, release.catalog.ids_N, want=want, drop=drop)
            ranked.append(found)
    return ranked


def run_steps(steps: list[list[Step]], states: list[bytes], release: Release) -> list[bytes]:
    """States after everybody's steps, in calls of users with about as many steps."""
    after = [b""] * len(steps)
    engine, vectors_NE = release.engine, release.catalog.step_vectors_NE
    for members in about_as_long([len(own) for own in steps]):
        lens_B = np.array([len(steps[at]) for at in members], np.int32)
        step_TB4 = np.zeros((int(lens_B.max()), len(members), len(Step._fields)), np.int64)
        for user, at in enumerate(members):
            step_TB4[: len(steps[at]), user] = steps[at]
        rows_TB, event_TB, gap_TB, hour_TB = np.ascontiguousarray(step_TB4.transpose(2, 0, 1))
        state_BS = engine.advance(
            engine.unpacked([states[at] for at in members]),
            vectors_NE[rows_TB],
            lens_B,
            event_TB=event_TB,
            gap_TB=gap_TB,
            hour_TB=hour_TB,
        )
        for at, state in zip(members, engine.packed(state_BS), strict=True):
            after[at] = state
    return after


def about_as_long(lens: Sequence[int]) -> list[list[int]]:
    """Places in groups that waste little when each is filled up to its longest."""
    groups: list[list[int]] = []
    longest = wasted = 0
    for at in sorted(range(len(lens)), key=lambda at: -lens[at]):
        wasted += longest - lens[at]
        if not groups or wasted > PADDING_MAX:
            groups.append([])
            longest, wasted = lens[at], 0
        groups[-1].append(at)
    return groups


def _ids_of(hashes: frozenset[int], catalog: Catalog) -> frozenset[str]:
    rows = (catalog.row_of_hash(hash_) for hash_ in hashes)
    return frozenset(catalog.ids[row] for row in rows if row is not None)
