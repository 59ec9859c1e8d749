"""Features from compiled loops are those of their formulas, one candidate at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterclick.serving.describing import halved
from afterclick.serving.features import FEATURES, REACH_FEATURES, TIMED
from afterclick.serving.memory import HALF_LIVES_MS, HOUR_MS, TICKS, Memory
from afterclick.serving.scanner import MASKED
from afterclick.serving.trails import WINDOW, Trails
from tests.unit.serving.blend_worlds import World, worlds
from tests.unit.serving.test_candidates import model_slowly, near_slowly, now_of

FAR = 12.0
DAY_MS = 24 * HOUR_MS
STEP = [0.0, 1.0, 0.6, 0.36, 0.216]


def entries(trails: Trails, code: int, newest: int = WINDOW) -> list[tuple[int, int, int]]:
    """(item, mark, ms) of what came next to a code, oldest first."""
    at = trails.find(np.array([code]), newest)[1]
    columns = trails.item_A[at], trails.mark_A[at], trails.ms_A[at]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def described_slowly(world: World, user: int, code: int, codes: list[int]) -> dict[str, float]:
    """All features of one candidate, by their formulas."""
    memory, context, spec = world.memory, world.contexts[user], world.spec
    now_ms, past = now_of(world, user), world.past[user]
    last, second, *_ = [*past, -1, -1]
    log, share = math.log, int(memory.count_N[code]) / max(memory.moves, 1)
    known = [own for own in past if own >= 0]

    best = model_slowly(world, user)
    num_model = max(spec.model, 1)
    mass = sum(math.exp(score) for _, score in best[:num_model])
    places = {own: [s for _, s in best].index(score) for own, score in best[:num_model]}
    row = world.rows.row_N[code]
    score = float(world.score_BN[user, row]) if row >= 0 else float(MASKED)
    model = score - log(mass) if best else score - float(MASKED)

    near = near_slowly(memory.neighbours, past, spec.sessions, spec.nearest)
    most = max([1e-9, *(near.get(own, 0.0) for own in codes)])

    def fresh(ms: int) -> float:
        return 0.5 ** (max(now_ms - ms, 0) / DAY_MS)

    def times(trail: list[tuple[int, int, int]]) -> int:
        return sum(item == code for item, _, _ in trail)

    next_, back = entries(memory.next, last), entries(memory.back, last)
    later = entries(memory.later, last)
    days = sum(fresh(ms) for _, _, ms in next_)
    day = sum(fresh(ms) for item, _, ms in next_ if item == code)
    pairs = [item for item, mark, _ in next_ if mark == second >= 0]
    skipped = sum(STEP[mark] for _, mark, _ in later)
    skip = times(next_) + sum(STEP[mark] for item, mark, _ in later if item == code)
    older = [entries(memory.next, own, 128) for own in [*past, -1, -1, -1, -1][1:4]]
    weights = [1.0, 0.6, 0.36]
    reach, reach_day = 0.0, 0.0
    for place, own in enumerate(past[:6]):
        all_ = [(item, 1.0, ms) for item, _, ms in entries(memory.next, own, 96)]
        all_ += [(item, STEP[mark], ms) for item, mark, ms in entries(memory.later, own, 96)]
        plain = sum(weight for _, weight, _ in all_) + 1.0
        recent = sum(weight * fresh(ms) for _, weight, ms in all_) + 0.3
        for item, weight, ms in all_:
            if item == code:
                reach += 0.6**place * weight / plain
                reach_day += 0.6**place * weight * fresh(ms) / recent

    ago = past.index(code) if code in past else -1
    never = memory.count_N[code] == 0
    ms, last_ms = (int(world.rows.published.ms_N[own]) if own >= 0 else 0 for own in (code, last))
    sorted_ms = world.rows.published.sorted_ms
    gap_h = (ms - last_ms) / HOUR_MS if ms > 0 and last_ms > 0 else 0.0
    newer = int((sorted_ms <= now_ms).sum()) - int((sorted_ms <= ms).sum())
    return {
        "model": min(max(model, -14.0), 0.0),
        "model_rank": log(1 + min(places.get(code, num_model), num_model)),
        "near": log(near.get(code, 0.0) / most + 1e-3),
        "near_share": log(near.get(code, 0.0) / (sum(near.values()) + 1e-9) + 1e-4),
        "next": log((times(next_) + 2 * share) / (len(next_) + 2) + 1e-6),
        "next_new": log((times(next_[-32:]) + share) / (len(next_[-32:]) + 1) + 1e-5),
        "next_day": log((day + share) / (days + 1) + 1e-6),
        "pair": log((pairs.count(code) + 1e-2) / (len(pairs) + 1)),
        "skip": log((skip + 2 * share) / (len(next_) + skipped + 2) + 1e-6),
        "back": log((times(back) + share) / (len(back) + 1) + 1e-5),
        "older": log(
            sum(w * times(own) / (len(own) + 2) for w, own in zip(weights, older, strict=True))
            / sum(weights)
            + 1e-4
        ),
        "reach": log(reach + 1e-3),
        "reach_day": log(reach_day + 1e-3),
        "is_last": float(ago == 0),
        "is_second": float(ago == 1),
        "is_third": float(ago == 2),
        "is_older": 1 / log(ago) if ago > 2 else 0.0,
        "times": log(1 + past.count(code)),
        "popular": log(share + 1e-6),
        **heats_slowly(memory, code, now_ms),
        "untouched": FAR if never else since(now_ms, memory.last_ms_N[code]),
        "age": FAR if never else since(now_ms, memory.first_ms_N[code]),
        "published": log(max(now_ms - ms, 0) / HOUR_MS + 0.1) if ms > 0 else FAR,
        "published_gap": math.copysign(log(1 + abs(gap_h)), gap_h),
        "newer": log(1 + max(newer, 0)) if ms > 0 else FAR,
        "unclicked": float(never),
        "length": log(1 + len(past)),
        "clicks": log(1 + context.clicks),
        "last_count": log(1 + (int(memory.next.total_N[last]) if last >= 0 else 0)),
        "pair_count": log(1 + len(pairs)),
        "repeats": (len(known) - len(set(known))) / max(len(past), 1),
        "idle": log(1 + max(now_ms - context.last_ms, 0) / 1000) if past else 0.0,
    }


def since(now_ms: int, ms: int) -> float:
    return math.log(1 + max(now_ms - int(ms), 0) / 60_000)


def heats_slowly(memory: Memory, code: int, now_ms: int) -> dict[str, float]:
    found = {}
    names = ("heat_30m", "heat_2h", "heat_6h", "heat_24h", "heat_72h", "heat_moves")
    for at, name in enumerate(names):
        if at < len(HALF_LIVES_MS):
            now = now_ms * TICKS // HALF_LIVES_MS[at]
        else:
            now = memory.moves * TICKS // memory.half_life_moves
        own = math.log(memory.heat_NH[code, at] + 1e-9)
        own -= max(now - int(memory.tick_NH[code, at]), 0) * math.log(2) / TICKS
        total = math.log(memory.total_heat_H[at] + 1)
        total -= max(now - int(memory.total_tick_H[at]), 0) * math.log(2) / TICKS
        found[name] = max(own, -7.0) - max(total, 0.0)
    return found


@settings(max_examples=60, deadline=None)
@given(worlds)
def test_features_equal_their_formulas(world: World) -> None:
    """Counted in one walk over the trails; columns that are not wanted say nothing."""
    found = world.asked()
    timed = not TIMED.isdisjoint(world.spec.features)
    unwanted = set() if timed else TIMED - {"idle"}
    unwanted |= set() if set(REACH_FEATURES) & set(world.spec.features) else set(REACH_FEATURES)
    for user in range(len(world.contexts)):
        begin, end = found.pool.begin_B1[user : user + 2].tolist()
        codes = found.pool.code_R[begin:end].tolist()
        for row, code in enumerate(codes, begin):
            expected = described_slowly(world, user, code, codes)
            own = dict(zip(FEATURES, found.feature_RF[row].tolist(), strict=True))
            for name in unwanted:
                assert math.isfinite(own.pop(name))
                del expected[name]
            # Single precision of numbers up to 16, and heats from ticks in single precision.
            assert own == pytest.approx(expected, abs=2e-5, rel=2e-5)


@given(st.integers(-5, 200 * DAY_MS))
def test_halving_equals_a_power(age_ms: int) -> None:
    """Tables and a series instead of the C library's, whose bits differ between machines."""
    assert halved(age_ms) == pytest.approx(0.5 ** (max(age_ms, 0) / DAY_MS), rel=2e-9, abs=1e-30)
