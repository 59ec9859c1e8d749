"""Small worlds for the blend's loops: a memory with a past, a catalogue, and users who ask."""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from afterclick.serving.blend import Candidates, Context, gather
from afterclick.serving.manifest import BlendSpec
from afterclick.serving.memory import HOUR_MS, Memory
from afterclick.serving.records import Interaction, item_hash, pack_interaction
from afterclick.serving.rows import Published, Rows
from afterclick.serving.scanner import MASKED, Look

START_MS = 1 << 40
FEATURES_TIMED = ["next_day", "reach"]
FEATURES_UNTIMED = ["next"]


class World(NamedTuple):
    """What `gather` is asked with, and what it was made of."""

    memory: Memory
    rows: Rows
    spec: BlendSpec
    score_BN: np.ndarray
    contexts: list[Context]
    past: list[list[int]]
    """Codes since the last reset, newest first."""
    drops: list[frozenset[int]]
    want: int

    def asked(self, begin: int = 0, end: int | None = None) -> Candidates:
        """Some users' candidates."""
        own = slice(begin, end)
        return gather(
            self.spec,
            self.score_BN[own],
            self.contexts[own],
            self.memory,
            self.rows,
            Exact(),  # type: ignore[arg-type]
            self.want,
            self.drops[own],
        )


class Exact:
    """A scanner whose queries are the scores."""

    num_rows = 0

    def look(self, q_BD: np.ndarray, k: int) -> Look:
        self.num_rows = q_BD.shape[1]
        row_BK = np.argsort(-q_BD, axis=1, kind="stable")[:, :k]
        score_BK = np.take_along_axis(q_BD, row_BK, axis=1)
        return Look(score_BK, row_BK, lambda user_R, row_R: q_BD[user_R, row_R])


def a_world(seed: int, num_items: int, num_moves: int, num_users: int, sizes: Any) -> World:
    """The same for the same numbers."""
    rng = np.random.default_rng(seed)
    memory = Memory([f"i{code}" for code in range(num_items)], half_life_moves=64)
    item_M = np.minimum(rng.geometric(0.15, num_moves) - 1, num_items - 1)
    ms_M = START_MS + np.cumsum(rng.integers(0, HOUR_MS, num_moves))
    memory.take(item_M, ms_M, rng.integers(-1, num_items, (num_moves, 3)))
    start = np.append(0, np.cumsum(rng.integers(1, 50, 12)))
    item_P = np.minimum(rng.geometric(0.1, start[-1]) - 2, num_items - 1)
    memory.index(start, item_P, None, per_item=6)
    published_ms = rng.integers(0, 5, num_items) * HOUR_MS
    published_ms[published_ms > 0] += START_MS
    order = np.lexsort((memory.hash_N, published_ms))
    order = order[published_ms[order] > 0]
    row_N = rng.permutation(num_items)
    row_N[rng.random(num_items) < 0.1] = -1
    code_of_row = np.full(num_items + 2, -1)
    code_of_row[row_N[row_N >= 0]] = np.flatnonzero(row_N >= 0)
    hidden_N = rng.random(num_items) < 0.1
    published = Published(published_ms, published_ms[order], order)
    score_BN = rng.integers(-6, 3, (num_users, num_items + 2)).astype(np.float32) / 2  # with ties
    code_N = np.maximum(code_of_row, 0)
    score_BN[:, (code_of_row < 0) | hidden_N[code_N]] = MASKED
    contexts, past, drops = [], [], []
    for _ in range(num_users):
        codes = rng.integers(-1, num_items, rng.integers(0, 40)).tolist()
        resets = rng.random(len(codes)) < 0.05
        names = [f"i{code}" if code >= 0 else "stranger" for code in codes]
        packed = [
            pack_interaction(Interaction(item_hash(name), 1, 2, 3, 4, bool(reset)))
            for name, reset in zip(names, resets, strict=True)
        ]
        now_ms = int(memory.clock_ms + rng.integers(-HOUR_MS, 40 * HOUR_MS))
        last_ms = now_ms - int(rng.integers(-1000, 1_000_000))
        contexts.append(Context(b"".join(packed), len(codes), last_ms, now_ms))
        since = int(np.flatnonzero(resets)[-1]) if resets.any() else 0
        past.append(codes[max(since, len(codes) - 32) :][::-1])
        left = rng.integers(0, num_items, rng.integers(0, 3)).tolist()
        drops.append(frozenset(item_hash(f"i{code}") for code in left) | {1})
    return World(
        memory,
        Rows(row_N, code_of_row, hidden_N, published),
        BlendSpec(**sizes),
        score_BN,
        contexts,
        past,
        drops,
        want=3,
    )


worlds = st.builds(
    a_world,
    seed=st.integers(0, 10_000),
    num_items=st.integers(4, 60),
    num_moves=st.integers(1, 600),
    num_users=st.integers(1, 5),
    sizes=st.fixed_dictionaries(
        {
            "features": st.sampled_from([FEATURES_TIMED, FEATURES_UNTIMED]),
            "model": st.integers(0, 8),
            "neighbours": st.integers(0, 8),
            "sessions": st.integers(0, 6),
            "nearest": st.integers(0, 6),
            "followers": st.sampled_from([0, 3, 256]),
            "own": st.sampled_from([0, 3, 32]),
            "popular": st.booleans(),
            "older": st.sampled_from([0, 3]),
            "touched": st.sampled_from([0, 4]),
            "newest": st.integers(0, 5),
        }
    ),
)
