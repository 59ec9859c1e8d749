"""The fast memory: a fold of moves that does not care how they come."""

from pathlib import Path

import numpy as np
import pytest

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import MEMORY_NAME, Manifest
from afterclick.serving.memory import (
    HALF_LIVES_MS,
    TOUCHED_MOVES,
    Memory,
    Move,
    memory_of,
    moves_of,
)
from afterclick.serving.records import item_hash
from afterclick.serving.trails import WINDOW, Trails
from tests.tiny_release import write_tiny_release

IDS = [f"i{n:03d}" for n in range(40)]


def a_log(num: int = 1500, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of 1 to 9 clicks, item 0 in every third of them, times in and out of order."""
    rng = np.random.default_rng(seed)
    start = np.unique(np.concatenate([[0, num], rng.choice(num, num // 5)]))
    item = np.where(rng.random(num) < 0.3, 0, rng.integers(0, len(IDS), num))
    time = np.sort(rng.integers(0, 40 * 24 * 3600 * 1000, num)) + rng.integers(0, 10**7, num)
    return start, item, time


def as_moves(start: np.ndarray, item: np.ndarray, time: np.ndarray) -> list[Move]:
    moves = zip(*moves_of(start, item, time), strict=True)
    return [
        Move(IDS[code], 2, int(ms), tuple(item_hash(IDS[b]) for b in before if b >= 0))
        for code, ms, before in moves
    ]


@pytest.mark.parametrize("sizes", [[1], [7, 1, 64, 129], [5000]])
def test_a_log_in_bulk_leaves_what_its_moves_leave_in_pieces(sizes: list[int]) -> None:
    """The trainer builds in bulk what workers fold move by move: the same bits, or lists differ."""
    start, item, time = a_log()
    bulk = memory_of(IDS, start, item, time, per_item=20)
    piecewise = Memory(IDS, half_life_moves=bulk.half_life_moves)
    moves = as_moves(start, item, time)
    at = turn = 0
    while at < len(moves):
        size = sizes[turn % len(sizes)]
        piecewise.absorb(moves[at : at + size])
        at, turn = at + size, turn + 1
    expected, found = bulk.dump(), piecewise.dump()
    for name, array in expected.items():
        if not name.startswith("sessions."):  # these come with a release and do not move
            assert np.array_equal(array, found[name]), name


def test_a_restored_memory_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    """A worker that starts from the release's file must not drift from one that never stopped."""
    manifest = write_tiny_release(tmp_path / "r1", num_items=len(IDS), blend=True)
    ids = [f"i{n:05d}" for n in range(len(IDS))]
    start, item, time = a_log(700)
    saved = memory_of(ids, start, item, time, per_item=20)
    saved.save(tmp_path / "r1")
    restored = Memory.from_release(tmp_path / "r1", manifest, ids)
    more = [
        Move(
            ids[n % 40] if n % 9 else f"new{n}",
            2,
            int(time.max()) + n * 60_000,
            (item_hash(ids[n % 7]), item_hash("nobody")),
        )
        for n in range(300)
    ]
    saved.absorb(more)
    for begin in range(0, 300, 11):
        restored.absorb(more[begin : begin + 11])
    found = restored.dump()
    for name, array in saved.dump().items():
        assert np.array_equal(array, found[name]), name
    assert restored.ids[40:] == saved.ids[40:]
    assert restored.clock_ms == saved.clock_ms == more[-1].event_ms


def test_heat_is_a_sum_of_halving_clicks() -> None:
    """Against the definition, within a tick's rounding: 1/64 of a half-life is 1.1%."""
    start, item, time = a_log()
    memory = memory_of(IDS, start, item, time, per_item=20)
    now = memory.clock_ms + 3_600_000
    heat = memory.heat(np.arange(len(IDS)), now)
    for at, half_life in enumerate(HALF_LIVES_MS):
        exact = np.zeros(len(IDS))
        np.add.at(exact, item, 2.0 ** (-(now - time) / half_life))
        assert np.allclose(heat[:, at], exact, rtol=0.025, atol=1e-12)


def test_a_trail_keeps_the_newest_window_of_a_busy_item() -> None:
    """An item clicked a million times must cost no more than one clicked a few hundred times."""
    trails = Trails(2)
    for begin in range(0, 2000, 50):
        value = np.arange(begin, begin + 50)
        trails.push(np.ones(50, np.int64), value, value, value)
    user, at = trails.find(np.array([0, 1, -1]))
    assert user.tolist() == [1] * WINDOW
    assert trails.ms_A[at].tolist() == list(range(2000 - WINDOW, 2000))
    assert trails.total_N.tolist() == [0, 2000]
    assert len(trails.item_A) < 16 * WINDOW


def test_a_memory_of_other_items_is_refused(tmp_path: Path) -> None:
    """Counts under the wrong items would rank, and nobody would notice."""
    manifest: Manifest = write_tiny_release(tmp_path / "r1", num_items=60, blend=True)
    start, item, time = a_log(100)
    memory_of(IDS, start, item, time, per_item=20).save(tmp_path / "r1")
    ids = [f"i{n:05d}" for n in range(60)]
    with pytest.raises(ContractError, match="counts 40 items"):
        Memory.from_release(tmp_path / "r1", manifest, ids)
    (tmp_path / "r1" / MEMORY_NAME).write_bytes(b"PK")
    with pytest.raises(ContractError, match="cannot be read"):
        Memory.from_release(tmp_path / "r1", manifest, ids)


def test_what_was_touched_last_is_known_newest_first() -> None:
    """Distinct items, whoever touched them, as far back as the moves are kept."""
    memory = Memory(["a", "b", "c"])
    memory.absorb([Move(name, 2, 1, ()) for name in "abcab"])

    assert [memory.ids[code] for code in memory.touched(10).tolist()] == ["b", "a", "c"]
    assert len(memory.touched(2)) == 2
    memory.absorb([Move("c", 2, 2, ())] * TOUCHED_MOVES)
    assert memory.touched(10).tolist() == [2]
    assert len(memory.recent) == TOUCHED_MOVES
