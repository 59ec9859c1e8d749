"""The scan in two stages: what it may miss, and what it may not depend on."""

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from afterclick.serving.best import best_first, best_rows
from afterclick.serving.blend import Context
from afterclick.serving.engine import F32
from afterclick.serving.errors import ConfigError
from afterclick.serving.index import SURVIVORS, WANT_MAX, TwoStageScanner
from afterclick.serving.manifest import Publication
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.scanner import MASKED, Scanner
from afterclick.serving.settings import ListRules, ServingSettings
from tests.tiny_release import digest_of, write_tiny_release

DIM = 33
NUM_ROWS = 12_000


def world(seed: int = 0, apart: float = 1.0, num: int = NUM_ROWS) -> tuple[F32, F32]:
    """Rows in clusters, a bias last; queries near them."""
    rng = np.random.default_rng(seed)
    centre_CD = apart * rng.standard_normal((200, DIM))
    rows_ND = centre_CD[rng.integers(0, 200, num)] + rng.standard_normal((num, DIM))
    rows_ND[:, -1] *= 0.3
    q_BD = centre_CD[rng.integers(0, 200, 70)] + 0.5 * rng.standard_normal((70, DIM))
    q_BD[:, -1] = 1.0
    return rows_ND.astype(np.float32), q_BD.astype(np.float32)


def masked(vectors: F32, rows: object) -> F32:
    hidden = vectors.copy()
    hidden[rows] = 0.0
    hidden[rows, -1] = MASKED
    return hidden


@pytest.mark.parametrize(("apart", "num"), [(1.0, NUM_ROWS), (4.0, 10 * NUM_ROWS)])
def test_it_finds_what_the_exact_scan_finds(apart: float, num: int) -> None:
    """0.99 is the promise; where groups lie apart most of the lists need not be read for it."""
    vectors, q_BD = world(apart=apart, num=num)
    exact, exact_rows = Scanner(vectors, provider="cpu").top(q_BD, 50)
    two = TwoStageScanner(vectors)
    found, found_rows = two.top(q_BD, 50)

    assert (two.lists_read < 0.4) == (apart > 1)
    recall = np.mean([np.isin(*pair).mean() for pair in zip(exact_rows, found_rows, strict=True)])
    assert recall >= 0.99
    same = exact_rows == found_rows
    # Sums of 33 products of about 1, in another order.
    assert np.allclose(found[same], exact[same], rtol=1e-5, atol=1e-5)


def test_where_nothing_stands_in_groups_all_lists_are_read() -> None:
    """Else half of the best would be missed; it is slower then, not worse."""
    vectors = np.random.default_rng(5).standard_normal((NUM_ROWS, DIM)).astype(np.float32)
    two = TwoStageScanner(vectors)
    assert two.lists_read > 0.9
    q_BD = vectors[:50].copy()
    q_BD[:, -1] = 1
    exact_rows = Scanner(vectors, provider="cpu").top(q_BD, 50)[1]
    pairs = zip(exact_rows, two.top(q_BD, 50)[1], strict=True)
    assert np.mean([np.isin(*pair).mean() for pair in pairs]) >= 0.97


def test_bits_do_not_depend_on_who_shares_the_batch() -> None:
    """A replay cuts the log elsewhere, and its lists must be the same."""
    vectors, q_BD = world()
    scanner = TwoStageScanner(vectors)
    scores, rows = scanner.top(q_BD, 70)
    for size in (1, 2, 33):
        for start in range(0, len(q_BD), size):
            part = slice(start, start + size)
            found = scanner.top(q_BD[part], 70)
            assert np.array_equal(found[0], scores[part])
            assert np.array_equal(found[1], rows[part])


def test_bits_do_not_depend_on_the_order_in_which_rows_came() -> None:
    """Workers read the items topic's partitions in different order, and in other pieces."""
    vectors, q_BD = world()
    release, late = NUM_ROWS - 100, np.arange(NUM_ROWS - 100, NUM_ROWS)
    one, other = (TwoStageScanner(masked(vectors, late)) for _ in range(2))
    one.changed(vectors, range(NUM_ROWS))
    for row in reversed(late.tolist()):
        other.changed(masked(vectors, np.arange(release, row)), range(NUM_ROWS))
    other.changed(vectors, range(NUM_ROWS))

    for found, expected in zip(other.top(q_BD, 70), one.top(q_BD, 70), strict=True):
        assert np.array_equal(found, expected)


def test_the_score_of_any_row_can_be_asked_for_beside_the_best() -> None:
    """The blend's candidates come from elsewhere: only their rows are read, and no bit depends on
    who else asks.
    """
    vectors, q_BD = world()
    scanner = TwoStageScanner(vectors)
    exact = Scanner(vectors, provider="cpu")
    rng = np.random.default_rng(2)
    user, row = rng.integers(0, len(q_BD), 9000), rng.integers(0, NUM_ROWS, 9000)
    look = scanner.look(q_BD, 70)
    for found, expected in zip(look[:2], scanner.top(q_BD, 70), strict=True):
        assert np.array_equal(found, expected)
    scores = look.of(user, row)
    # Sums of 33 products of about 1, in another order.
    assert np.allclose(scores, exact.look(q_BD, 70).of(user, row), rtol=1e-5, atol=1e-5)
    for at in (0, 3, 69):
        own = user == at
        alone = scanner.look(q_BD[at : at + 1], 70)
        assert np.array_equal(alone.of(np.zeros(own.sum(), np.int64), row[own]), scores[own])


def test_the_blend_lists_the_same_over_either_scan(tmp_path: Path) -> None:
    """A row in a hundred may be missed by the model; the other sources bring most of these."""
    write_tiny_release(tmp_path / "r1", num_items=3000, units=32, blend=True)
    publication = Publication(number=1, release="r1", sha256=digest_of(tmp_path / "r1"))
    lists = []
    for scan in ("exact", "two-stage"):
        settings = ServingSettings(provider="cpu", scan=scan)
        loaded = LoadedRelease(publication, tmp_path / "r1", settings)
        assert loaded.blend is not None
        assert loaded.memory is not None
        state_BS = np.random.default_rng(4).standard_normal((40, loaded.manifest.state_floats))
        query_BD = loaded.engine.query(state_BS.astype(np.float32))
        ranked = loaded.blend.rank(
            query_BD,
            [Context(now_ms=1 << 40)] * 40,
            loaded.memory,
            loaded.catalog,
            loaded.scanner,
            want=50,
        )
        lists.append([one.items for one in ranked])
    same = [len({*one} & {*other}) / 50 for one, other in zip(*lists, strict=True)]
    assert np.mean(same) >= 0.99


def test_a_new_row_is_found_at_once_and_a_masked_one_no_more() -> None:
    """Items arrive and leave while a worker runs; no index is built meanwhile."""
    vectors, q_BD = world()
    best = int(TwoStageScanner(vectors).top(q_BD[:1], 1)[1][0, 0])
    scanner = TwoStageScanner(masked(vectors, [best]))
    assert best not in scanner.top(q_BD[:1], 50)[1]

    scanner.changed(vectors, range(NUM_ROWS))
    assert scanner.top(q_BD[:1], 1)[1].item() == best
    grown = np.concatenate([vectors, 2 * q_BD[:1]])
    scanner.changed(grown, range(NUM_ROWS))
    assert scanner.top(q_BD[:1], 2)[1].tolist() == [[NUM_ROWS, best]]
    scanner.changed(masked(grown, [NUM_ROWS]), range(NUM_ROWS))
    assert scanner.top(q_BD[:1], 1)[1].item() == best


def test_masked_rows_in_the_index_change_no_answer() -> None:
    """Whether a row was ever there to be indexed differs between workers."""
    vectors, q_BD = world()
    gone = np.random.default_rng(1).choice(NUM_ROWS, 300, replace=False)
    without = masked(vectors, gone)
    never, once = TwoStageScanner(without), TwoStageScanner(without)
    once.changed(vectors, range(NUM_ROWS))
    once.changed(without, range(NUM_ROWS))

    for found, expected in zip(once.top(q_BD, 70), never.top(q_BD, 70), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("case", ["most-masked", "all-equal", "small", "many-wanted"])
def test_where_it_cannot_decide_the_scan_is_exact(case: str) -> None:
    """Fewer than the rows that there are would be an empty place in a list."""
    vectors, q_BD = world()
    want = 50
    if case == "all-equal":
        vectors[:] = vectors[0]
    if case == "small":
        vectors = vectors[:SURVIVORS]
    if case == "many-wanted":
        want = WANT_MAX + 1
    scanner = TwoStageScanner(vectors)
    if case == "most-masked":
        vectors = masked(vectors, np.arange(NUM_ROWS - 60))
        scanner.changed(vectors, range(NUM_ROWS))

    for found, expected in zip(
        scanner.top(q_BD, want), Scanner(vectors, provider="cpu").top(q_BD, want), strict=True
    ):
        assert np.array_equal(found, expected)


def test_the_best_come_first_and_ties_go_by_row() -> None:
    """Signs, zeros of both kinds and masked scores included."""
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((9, 400)).astype(np.float32).round(1)
    scores[0, :7] = MASKED
    scores[1, ::3] = -0.0
    rows = np.stack([rng.permutation(400) for _ in range(9)])
    found_scores, found_rows = best_first(scores, rows, 60)
    for at in range(9):
        order = np.lexsort((rows[at], -scores[at]))[:60]
        assert np.array_equal(found_scores[at], scores[at][order])
        assert np.array_equal(found_rows[at], rows[at][order])


def test_a_release_takes_the_scan_that_it_is_told(tmp_path: Path) -> None:
    """The rules that decide lists name it, so that a replay takes the same; old entries none."""
    write_tiny_release(tmp_path / "r1", num_items=200)
    publication = Publication(number=1, release="r1", sha256=digest_of(tmp_path / "r1"))
    told = ServingSettings(provider="cpu", scan="two-stage")

    assert isinstance(LoadedRelease(publication, tmp_path / "r1", told).scanner, TwoStageScanner)
    assert ListRules.of(told).scan == "two-stage"
    assert b"scan" not in msgspec.json.encode(ListRules.of(ServingSettings()))
    with pytest.raises(ConfigError, match="set scan to 'exact'"):
        LoadedRelease(publication, tmp_path / "r1", msgspec.structs.replace(told, precision="fp16"))


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra that is missing is the operator's to bring, before anything is served."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"afterclick\[index\]"):
        TwoStageScanner(world()[0])


def test_the_best_are_those_of_a_stable_sort() -> None:
    """Found by an edge: with ties, masked rows, hardly any rows, and a crowd of equal ones."""
    rng = np.random.default_rng(9)
    for num_rows, k in ((4000, 7), (4000, 120), (90, 90), (5000, 1), (3001, 40)):
        scores = rng.standard_normal((6, num_rows)).astype(np.float32)
        scores[1] = np.round(scores[1], 1)
        scores[2] = 0.0
        scores[2, ::3] = -0.0
        scores[3, 5:] = MASKED
        scores[4] = MASKED
        found, rows = best_rows(scores, k)
        for own, best, at in zip(scores, found, rows, strict=True):
            expected = np.argsort(-own, kind="stable")[:k]
            assert np.array_equal(at, expected)
            assert np.array_equal(best, own[expected])
