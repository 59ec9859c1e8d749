"""Candidates from compiled loops are those of the plain words: user by user, source by source."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.serving.candidates import (
    LAST,
    PIECE,
    SOURCES,
    best_near,
    near_items,
    scratch,
)
from afterclick.serving.neighbours import Sessions, index_sessions
from afterclick.serving.scanner import MASKED
from tests.unit.serving.blend_worlds import World, worlds

NUM_ITEMS = 40


def near_slowly(
    sessions: Sessions, past: list[int], per_item: int, nearest: int
) -> dict[int, float]:
    """Scores as the paper tells it: newest sessions, similarity, then items."""
    logs = [sessions.item_P[a:b].tolist() for a, b in pairwise(sessions.start_S1)]
    last, similar = past[:LAST], {}
    for place, code in enumerate(last):
        if 0 <= code < len(sessions.rarity_N) and code not in last[:place]:
            begin, end = sessions.post_start_N1[code : code + 2]
            for session in sessions.post_session_E[begin : min(end, begin + per_item)].tolist():
                similar.setdefault(session, []).append(place)
    weight = {n: sum(np.exp(-place) for place in places) for n, places in similar.items()}
    scores: dict[int, float] = {}
    for n in sorted(weight, key=lambda n: (-weight[n], -n))[:nearest]:
        shared = last[similar[n][0]]
        spot = max(at for at, code in enumerate(logs[n]) if code == shared)
        for at, code in enumerate(logs[n]):
            away = at - spot if at > spot else 1.5 * (spot - at)
            if at != spot and code >= 0:
                own = weight[n] * np.exp(-(away - 1) / 2) * sessions.rarity_N[code]
                scores[code] = scores.get(code, 0.0) + own
    return scores


def near_quickly(
    sessions: Sessions, past: list[int], per_item: int, nearest: int
) -> dict[int, float]:
    _, sum_N, places_S = scratch(len(sessions.rarity_N), len(sessions.start_S1))
    room = [np.empty(LAST * per_item + 1, np.int64) for _ in range(2)]
    code_G = np.empty(nearest * (PIECE - 1) + 1, np.int64)
    last_L = np.array(past, np.int64)
    num = near_items(sessions, last_L, per_item, nearest, sum_N, places_S, *room, code_G)
    found = {code: sum_N[code] * sessions.rarity_N[code] for code in code_G[:num].tolist()}
    sum_N[code_G[:num]] = 0.0
    assert len(found) == num
    assert not sum_N.any()
    assert not places_S.any()
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_logs=st.integers(0, 120),
    per_item=st.integers(1, 20),
    nearest=st.integers(0, 20),
)
def test_neighbours_equal_their_definition(
    seed: int, num_logs: int, per_item: int, nearest: int
) -> None:
    """Levels counted instead of sessions sorted; whatever is asked for, the scratch stays clean."""
    rng = np.random.default_rng(seed)
    start = np.append(0, np.cumsum(rng.integers(1, 40, num_logs)))
    item = rng.integers(-1, NUM_ITEMS, int(start[-1]))
    sessions = index_sessions(start, item, NUM_ITEMS, 12)
    for _ in range(5):
        past = rng.integers(-1, NUM_ITEMS + 3, rng.integers(0, 8)).tolist()
        found = near_quickly(sessions, past, per_item, nearest)
        expected = near_slowly(sessions, past, per_item, nearest)
        assert found == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=400), st.integers(0, 30), st.integers(0, 99))
def test_the_neighbours_best_are_those_of_a_full_sort(
    values: list[int], num: int, seed: int
) -> None:
    """Found by an edge instead of a sort of everything; of equals the hash decides, no code."""
    rng = np.random.default_rng(seed)
    code_G, hash_N = rng.permutation(500)[: len(values)], rng.permutation(500).astype(np.uint64)
    found = best_near(code_G, np.array(values, np.float64), num, hash_N).tolist()
    order = sorted(range(len(values)), key=lambda at: (-values[at], hash_N[code_G[at]]))
    assert sorted(found) == sorted(code_G[order[:num]].tolist())


def named_slowly(world: World, user: int) -> dict[int, set[str]]:
    """A user's candidates and who named each."""
    memory, rows, spec, past = world.memory, world.rows, world.spec, world.past[user]
    dropped = {memory.code_of_hash.get(hash_) for hash_ in world.drops[user]}
    ranked = [code for code, _ in model_slowly(world, user)]
    named: dict[str, list[int]] = {
        "model": ranked[: spec.model],
        "transitions": [],
        "repeats": [code for code in past[: spec.own] if code >= 0],
        "popularity": [],
    }
    if spec.popular or all(code < 0 for code in past):
        named["popularity"] += memory.popular.tolist()
    if spec.touched:
        named["popularity"] += memory.touched(spec.touched).tolist()
    for place, most in enumerate((spec.followers, spec.older, spec.older)):
        if place < len(past) and past[place] >= 0:
            at = memory.next.find(np.array([past[place]]), most)[1]
            named["transitions"] += memory.next.item_A[at].tolist()
    near = near_slowly(memory.neighbours, past, spec.sessions, spec.nearest)
    order = sorted(near, key=lambda code: (-round(near[code], 9), memory.hash_N[code]))
    named["neighbours"] = order[: spec.neighbours]
    out = rows.published
    until = int(np.searchsorted(out.sorted_ms, now_of(world, user), side="right"))
    named["publication"] = out.sorted_code[max(until - spec.newest, 0) : until].tolist()
    found: dict[int, set[str]] = {}
    for source, codes in named.items():
        for code in codes:
            if code not in dropped and not rows.hidden_N[code]:
                found.setdefault(code, set()).add(source)
    for code in ranked[spec.model :]:  # for a list that would be too short
        if len(found) >= world.want:
            break
        found.setdefault(code, set()).add("model")
    return found


def now_of(world: World, user: int) -> int:
    return max(world.contexts[user].now_ms, world.memory.clock_ms)


def model_slowly(world: World, user: int) -> list[tuple[int, float]]:
    """Codes and scores of the model's best that may be listed, best first; of a group of equals
    that the look cuts nobody.
    """
    num_best = max(world.spec.model, world.want)
    depth = num_best + len(world.drops[user]) + 1
    score_N = world.score_BN[user]
    order = np.argsort(-score_N, kind="stable")
    edge = -np.inf if depth >= len(score_N) else score_N[order[depth - 1]]
    dropped = {world.memory.code_of_hash.get(hash_) for hash_ in world.drops[user]}
    found = [
        (int(world.rows.code_of_row[row]), float(score_N[row]))
        for row in order
        if score_N[row] > max(edge, MASKED / 2)
        and world.rows.code_of_row[row] not in {-1, *dropped}
    ]
    return found[:num_best]


@settings(max_examples=100, deadline=None)
@given(worlds)
def test_candidates_are_what_the_sources_name(world: World) -> None:
    """Each once, whoever else is asked for, with everybody who named it and what is known of it."""
    pool = world.asked().pool
    for user in range(len(world.contexts)):
        own = slice(pool.begin_B1[user], pool.begin_B1[user + 1])
        codes = pool.code_R[own].tolist()
        found = {
            code: {source for bit, source in enumerate(SOURCES) if bits >> bit & 1}
            for code, bits in zip(codes, pool.source_R[own].tolist(), strict=True)
        }
        assert len(found) == len(codes)
        assert found == named_slowly(world, user)
        near = near_slowly(
            world.memory.neighbours, world.past[user], world.spec.sessions, world.spec.nearest
        )
        assert pool.near_R[own] == pytest.approx([near.get(code, 0.0) for code in codes])
        assert pool.near_B[user] == pytest.approx(sum(near.values()))


@settings(max_examples=30, deadline=None)
@given(worlds)
def test_a_user_alone_has_the_bits_of_one_in_a_batch(world: World) -> None:
    """Every number of every candidate: a list must not move because somebody else asks, too."""
    whole = world.asked()
    for user in range(len(world.contexts)):
        alone = world.asked(user, user + 1)
        own = slice(whole.pool.begin_B1[user], whole.pool.begin_B1[user + 1])
        assert np.array_equal(alone.pool.code_R, whole.pool.code_R[own])
        assert alone.feature_RF.tobytes() == whole.feature_RF[own].tobytes()


def test_what_a_memory_learns_later_fits_the_scratch() -> None:
    """Items come one by one; a scratch too small would be written behind its end."""
    for num in (10, 11, 5, 300):
        own = scratch(num, 2 * num)
        assert len(own.row_N) >= num
        assert len(own.sum_N) >= num
        assert len(own.places_S) >= 2 * num
    assert scratch(300, 600) is own
