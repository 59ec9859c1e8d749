"""A scan in 8 bits that knows its error must give what sorting all exact scores gives, always."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from afterclick.serving import bounds, dots
from afterclick.serving.bounds import Bounds
from afterclick.serving.scanner import MASKED, Scanner

F32 = np.ndarray

DIM = 33
"""Of a query with its bias: two times sixteen lanes, and one more."""


def world(kind: str, num: int, *, seed: int = 1) -> tuple[F32, F32]:
    """Rows and queries of 20 users, the last coordinate of a query 1 as the query graph's."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num, DIM)).astype(np.float32)
    q_BD = rng.standard_normal((20, DIM)).astype(np.float32)
    q_BD[:, -1] = 1
    if kind == "unit":
        vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    if kind == "long-tail":
        vectors *= rng.lognormal(0, 2, (num, 1)).astype(np.float32)
    if kind == "spiky":  # one coordinate takes all levels, the others are rounded away
        vectors[np.arange(num), rng.integers(0, DIM - 1, num)] *= 300
    if kind == "close":  # within a rounding of each other
        vectors[:] = vectors[0] + vectors * np.float32(1e-4)
    if kind == "equal":
        vectors[:] = vectors[0]
    if kind == "side by side":  # whatever is best stands in one place
        vectors[num // 2 : num // 2 + 90, -1] += 30
    if kind == "in steps":
        vectors[::256, -1] += 30
    if kind == "ties":
        vectors = vectors[np.arange(num) // 7]
    if kind == "masked":
        vectors[rng.permutation(num)[num // 50 :]] = [0.0] * (DIM - 1) + [MASKED]
    if kind == "biased":
        vectors[:, -1] *= 1000
    if kind in ("slanted rows", "slanted queries"):
        # All that counts is below half a level of one side, and falls away; decoys are whole.
        slanted, whole = (vectors, q_BD) if kind == "slanted rows" else (q_BD, vectors)
        slanted[:] = 0.49 * rng.uniform(0.9, 1, (len(slanted), 1))
        slanted[:, 0], whole[:] = 127, [0, 0, *[1] * (DIM - 2)]
        slanted[:, 1] = 0
        if kind == "slanted rows":
            slanted[::2, 1:], whole[:, 1] = [12, *[0] * (DIM - 2)], 1
        else:
            slanted[:, 1], whole[::2, 1:] = 12, [1, *[0] * (DIM - 2)]
        vectors[:, -1], q_BD[:, -1] = 0, 1
    if kind == "zeros":
        vectors[::2, :-1] = 0
        q_BD[::3, :-1] = 0
    return vectors, q_BD


KINDS = (
    "normal", "unit", "long-tail", "spiky", "close", "equal", "ties", "masked", "biased", "zeros",
    "slanted rows", "slanted queries", "side by side", "in steps",
)  # fmt: skip


def sorted_all(vectors: F32, q_BD: F32, k: int) -> tuple[F32, F32]:
    """Slow and obvious: exact scores, best first, equal ones by row."""
    scores = Scanner(vectors, provider="cpu", bounded=False).scores(q_BD)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def check(scanner: Scanner, vectors: F32, q_BD: F32, k: int) -> None:
    for found, expected in zip(scanner.top(q_BD, k), sorted_all(vectors, q_BD, k), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_are_those_of_a_full_sort(kind: str) -> None:
    """Whatever the vectors are like, for few results and for all."""
    for num in (1, 15, 40, 699, 5000):
        vectors, q_BD = world(kind, num)
        scanner = Scanner(vectors, provider="cpu", threads=1)
        for k in (1, 10, 71, 400, num):
            check(scanner, vectors, q_BD, min(k, num))


@pytest.mark.parametrize("kind", ["unit", "biased", "side by side", "in steps"])
@pytest.mark.parametrize("num", [2000, 20_000, 100_000])
def test_few_rows_are_scored_exactly(kind: str, num: int) -> None:
    """Else nothing would be gained: no guess is too high, none far too low, however a catalogue is
    ordered.
    """
    vectors, q_BD = world(kind, num)
    bounds_ = Bounds(vectors)
    for k in (1, 2, 11, 71):
        size_B, row_R, edge_B = bounds_.survivors(q_BD, k)
        best_BK, _ = sorted_all(vectors, q_BD, k)
        assert (best_BK[:, -1] >= edge_B).all()
        assert len(row_R) == size_B.sum()
        assert size_B.max() < 1000


def test_few_rows_are_scored_where_few_may_be_listed() -> None:
    """Of 5,000 rows 100 are shown: a guess from some vectors would be a masked row."""
    vectors, q_BD = world("masked", 5000)
    size_B, _, edge_B = Bounds(vectors).survivors(q_BD, 71)
    assert size_B.tolist() == [100] * len(q_BD)
    assert (edge_B > MASKED / 2).all()
    check(Scanner(vectors, provider="cpu", threads=1), vectors, q_BD, 71)


def test_who_has_many_close_rows_is_scored_whole() -> None:
    """They are told apart from the others, in one call."""
    vectors, q_BD = world("unit", 20_000)
    vectors[:, -1] = 0
    q_BD[::2, :-1] = 0
    size_B, _, edge_B = Bounds(vectors).survivors(q_BD, 71)
    assert (size_B[::2] == 0).all()
    assert np.isinf(edge_B[::2]).all()
    assert (size_B[1::2] >= 71).all()
    check(Scanner(vectors, provider="cpu", threads=1), vectors, q_BD, 71)


@pytest.mark.parametrize("rank", [1, 18])
def test_a_guess_that_is_too_high_costs_time_only(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For everybody, and for some of those who were asked for."""
    monkeypatch.setattr(bounds, "_sample", lambda _num_vectors, _k: (312, rank))
    vectors, q_BD = world("unit", 20_000)
    best_BK, _ = sorted_all(vectors, q_BD, 71)
    missed_B = best_BK[:, -1] < Bounds(vectors).survivors(q_BD, 71).edge_B
    assert missed_B.all() if rank == 1 else 0 < missed_B.sum() < len(q_BD)
    check(Scanner(vectors, provider="cpu", threads=1), vectors, q_BD, 71)


def whole_numbers() -> tuple[F32, F32]:
    """Rows and queries that rounding takes nothing from, the largest numbers among them."""
    rng = np.random.default_rng(5)
    vectors, q_BD = (rng.choice([-127, -126, -1, 0, 1, 3, 127], (num, DIM)) for num in (5000, 20))
    vectors[:, 0] = q_BD[:, 0] = 127
    vectors[:, -1] = 0
    return vectors.astype(np.float32), q_BD.astype(np.float32)


def test_products_are_those_of_whole_numbers() -> None:
    """So what is named is what reaches the guess, but for what float32 itself may take."""
    vectors, q_BD = whole_numbers()
    size_B, row_R, edge_B = Bounds(vectors).survivors(q_BD, 71)
    for user, own_R in enumerate(np.split(row_R, np.cumsum(size_B)[:-1])):
        score_N = vectors.astype(np.int64) @ q_BD[user].astype(np.int64)
        assert edge_B[user] in score_N
        assert set(np.flatnonzero(score_N >= edge_B[user])) <= set(own_R.tolist())
        assert score_N[own_R].min() >= edge_B[user] - 4


def test_every_cpu_names_the_same_rows(tmp_path: Path) -> None:
    """Without VNNI, as on an older CPU: other instructions, the same whole numbers."""
    vectors, q_BD = whole_numbers()
    np.savez(tmp_path / "world.npz", vectors=vectors, q_BD=q_BD)
    code = (
        "import sys, numpy as np; from afterclick.serving import bounds\n"
        "world = np.load(sys.argv[1] + '/world.npz')\n"
        "found = bounds.Bounds(world['vectors']).survivors(world['q_BD'], 71)\n"
        "assert 'vpdpbusd' not in str(bounds._mark.inspect_llvm())\n"
        "np.savez(sys.argv[1] + '/found.npz', **found._asdict())"
    )
    older = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    environment = os.environ | older | {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True)
    expected = Bounds(vectors).survivors(q_BD, 71)
    with np.load(tmp_path / "found.npz") as found:
        for name, array in expected._asdict().items():
            assert np.array_equal(found[name], array)


def test_rows_that_changed_are_scored_as_they_are_now() -> None:
    """Masked, shown and new rows, in few and in many changes; no answer may depend on what happened
    between.
    """
    first, q_BD = world("unit", 5000)
    now = first.copy()
    scanner = Scanner(now, provider="cpu", threads=1)
    rng = np.random.default_rng(12)
    for num in (1, 3, 120, 5, 20, 700, 0, 2):
        rows = rng.choice(len(now), num, replace=False)
        now[rows] = rng.standard_normal((num, DIM))
        now[rows[::3]] = 0.0
        now[rows[::3], -1] = MASKED
        best = scanner.top(q_BD, 5)[1][:, 0]
        shown = best[: num // 2]  # a row that stood first comes back as it was at the start
        now[shown] = first[shown % len(first)]
        scanner.changed(now, {*rows.tolist(), *shown.tolist()})
        check(scanner, now, q_BD, 71)
        more, _ = world("unit", int(rng.integers(0, 900)), seed=num)
        now = np.concatenate([now, more])
        scanner.changed(now, ())
        check(scanner, now, q_BD, 71)


def test_a_score_does_not_depend_on_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair, all pairs, a user alone, another tile: the same bits."""
    vectors, q_BD = world("normal", 3000)
    scanner = Scanner(vectors, provider="cpu", threads=2)
    whole = scanner.scores(q_BD)
    assert np.allclose(whole, q_BD.astype(np.float64) @ vectors.T.astype(np.float64), atol=1e-4)
    user_R, row_R = np.random.default_rng(3).integers(0, (20, 3000), (500, 2)).T.copy()
    assert np.array_equal(scanner.look(q_BD, 5).of(user_R, row_R), whole[user_R, row_R])
    best = scanner.top(q_BD, 71)
    for words in (1 << 20, 150, 1):
        monkeypatch.setattr(bounds, "WORDS_MAX", words)
        for size in (1, 7):
            parts = [scanner.top(q_BD[at : at + size], 71) for at in range(0, 20, size)]
            for found, expected in zip(zip(*parts, strict=True), best, strict=True):
                assert np.array_equal(np.concatenate(found), expected)


def test_a_score_is_added_up_in_the_order_that_is_written() -> None:
    """Sixteen sums, then halves onto halves, then what is left: so on every CPU."""
    vectors, q_BD = world("normal", 50)
    expected = np.zeros((20, 50), np.float32)
    for user in range(20):
        for row in range(50):
            product = (q_BD[user] * vectors[row]).astype(np.float32)
            sums = np.zeros(16, np.float32)
            for start in range(0, DIM - 15, 16):
                sums = sums + product[start : start + 16]
            while len(sums) > 1:
                sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
            expected[user, row] = sums[0]
            for at in range(DIM // 16 * 16, DIM):
                expected[user, row] += product[at]
    assert np.array_equal(dots.all_scores(q_BD, vectors), expected)
