"""The blend: lists from candidates, the same for a user whoever shares the batch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from afterclick.serving.blend import Candidates, Context, gather
from afterclick.serving.errors import ContractError
from afterclick.serving.features import FEATURES
from afterclick.serving.manifest import MANIFEST_NAME, Publication, read_manifest
from afterclick.serving.memory import HOUR_MS, Move
from afterclick.serving.records import Interaction, item_hash, pack_interaction
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.rows import rows_of
from afterclick.serving.settings import ServingSettings
from afterclick.serving.texts import Ranked
from afterclick.streams.events import Item
from afterclick.streams.inference import rank_states
from tests.tiny_release import digest_of, write_tiny_release

SETTINGS = ServingSettings(provider="cpu", threads=1)


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRelease:
    write_tiny_release(tmp_path / "r1", blend=True)
    publication = Publication(number=1, release="r1", sha256=digest_of(tmp_path / "r1"))
    return LoadedRelease(publication, tmp_path / "r1", SETTINGS)


def a_context(rng: np.random.Generator, num: int, *, now_ms: int = 1 << 40) -> Context:
    items = [item_hash(f"i{code:05d}") for code in rng.integers(0, 310, num)]
    packed = [pack_interaction(Interaction(i, 1, 2, 3, 4, rng.random() < 0.05)) for i in items]
    return Context(b"".join(packed), num, now_ms - 60_000, now_ms)


def some(loaded: LoadedRelease, num: int = 100) -> tuple[np.ndarray, list[Context]]:
    rng = np.random.default_rng(1)
    state_BS = rng.standard_normal((num, loaded.manifest.state_floats)).astype(np.float32)
    contexts = [a_context(rng, int(rng.integers(0, 50))) for _ in range(num)]
    return loaded.engine.query(state_BS), contexts


def rank(loaded: LoadedRelease, query_BD, contexts, **rest) -> list[Ranked]:
    assert loaded.blend is not None
    assert loaded.memory is not None
    return loaded.blend.rank(
        query_BD, contexts, loaded.memory, loaded.catalog, loaded.scanner, want=30, **rest
    )


def users(found: Candidates) -> np.ndarray:
    """Whose each candidate is."""
    size_B = np.diff(found.pool.begin_B1)
    return np.repeat(np.arange(len(size_B)), size_B)


def test_a_list_does_not_depend_on_who_shares_the_batch(loaded: LoadedRelease) -> None:
    """100 users at once, seven by seven, or each alone: the same items and the same scores."""
    query_BD, contexts = some(loaded)
    whole = rank(loaded, query_BD, contexts)
    for size in (1, 7):
        parts = [
            ranked
            for at in range(0, 100, size)
            for ranked in rank(loaded, query_BD[at : at + size], contexts[at : at + size])
        ]
        assert parts == whole
    assert len({tuple(ranked.items) for ranked in whole}) == 100


def test_a_move_changes_the_next_list(loaded: LoadedRelease) -> None:
    """A new item must come up the moment somebody has clicked it, vectors or not."""
    query_BD, contexts = some(loaded, 2)
    before = rank(loaded, query_BD, contexts)
    assert loaded.memory is not None
    last = int.from_bytes(contexts[0].interactions[-14:-6], "little")
    loaded.memory.absorb([Move("novelty", 2, 1 << 40, (last,))] * 200)
    after = rank(loaded, query_BD, contexts)
    assert "novelty" in after[0].items
    assert before[0].items != after[0].items


def test_what_is_dropped_or_unavailable_is_not_listed(loaded: LoadedRelease) -> None:
    """Lists leave a margin for the reader; an unavailable item may not eat it up."""
    query_BD, contexts = some(loaded, 3)
    first = [ranked.items[0] for ranked in rank(loaded, query_BD, contexts)]
    drops = [frozenset({item_hash(first[0])}), frozenset(), frozenset({item_hash("stranger")})]
    ranked = rank(loaded, query_BD, contexts, drops=drops)
    assert first[0] not in ranked[0].items
    assert ranked[1].items[0] == first[1]
    loaded.catalog.apply(Item(item_id=first[1], available=False), 0, 0)
    loaded.refresh()
    ranked = rank(loaded, query_BD, contexts)
    assert all(first[1] not in one.items for one in ranked)
    assert all(len(one.items) == 30 for one in ranked)


def test_equal_scores_go_by_item_id(loaded: LoadedRelease) -> None:
    """Two items that nothing tells apart: their codes, given as they came, must not decide."""
    query_BD, _ = some(loaded, 1)
    assert loaded.memory is not None
    loaded.memory.half_life_moves = 1 << 40  # or one of them is newer by a tick
    twins = [f"twin{at}" for at in (3, 1, 2)]
    for _ in range(1000):
        loaded.memory.absorb([Move(twin, 2, 1 << 40, ()) for twin in twins])
    items = rank(loaded, query_BD, [Context(now_ms=1 << 40)])[0].items
    assert [item for item in items if item.startswith("twin")] == sorted(twins)


def test_states_are_ranked_by_the_blend_where_there_is_one(loaded: LoadedRelease) -> None:
    """The fold's way in: contexts go through, and a user without one counts as new."""
    contexts = some(loaded, 5)[1]
    state_BS = np.zeros((5, loaded.manifest.state_floats), np.float32)
    zero_BD = loaded.engine.query(state_BS)
    assert rank_states(state_BS, loaded, want=30, contexts=contexts) == rank(
        loaded, zero_BD, contexts
    )
    assert rank_states(state_BS, loaded, want=30) == rank(loaded, zero_BD, [Context()] * 5)


def test_a_release_with_a_blend_travels_whole(tmp_path: Path) -> None:
    """A store that knew six files only would publish a release that no worker can load."""
    store = ReleaseStore(f"memory://blend-{tmp_path.name}", str(tmp_path / "cache"))
    write_tiny_release(store.staging("r1"), blend=True)
    store.add(next((tmp_path / "cache").glob(".staging-*/r1")))
    publication = store.publish("r1")
    fresh = ReleaseStore(store.root, str(tmp_path / "another"))
    loaded = LoadedRelease(publication, fresh.fetch("r1"), SETTINGS)
    assert loaded.blend is not None
    assert loaded.memory is not None
    assert loaded.memory.moves == 1000


def test_a_feature_that_the_worker_does_not_know_is_refused(tmp_path: Path) -> None:
    """A newer trainer's release on an older worker: refused by name, the old one stays."""
    folder = tmp_path / "r1"
    manifest = write_tiny_release(folder, blend=True)
    assert manifest.blend is not None
    newer = msgspec.structs.replace(
        manifest, blend=msgspec.structs.replace(manifest.blend, features=["moon"])
    )
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(newer))
    published = Publication(number=1, release="r1", sha256=digest_of(folder))
    with pytest.raises(ContractError, match="moon"):
        LoadedRelease(published, folder, SETTINGS)


def test_a_manifest_names_the_blends_files_or_none(tmp_path: Path) -> None:
    """A blend without its memory, or a file nobody knows, is a torn or foreign release."""
    folder = tmp_path / "r1"
    manifest = write_tiny_release(folder, blend=True)
    for files in (
        {name: sha for name, sha in manifest.files.items() if name != "memory.npz"},
        {**manifest.files, "extra.bin": "0"},
    ):
        torn = msgspec.structs.replace(manifest, files=files)
        (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(torn))
        with pytest.raises(ContractError, match="manifest names files"):
            read_manifest(folder)


def test_items_published_last_are_candidates_before_anybody_clicks(tmp_path: Path) -> None:
    """Most clicks on news go to what has just come out; what is not out yet is nobody's."""
    write_tiny_release(tmp_path / "r1", blend=True)
    manifest = read_manifest(tmp_path / "r1")
    assert manifest.blend is not None
    publication = Publication(number=1, release="r1", sha256=digest_of(tmp_path / "r1"))
    loaded = LoadedRelease(publication, tmp_path / "r1", SETTINGS)
    assert loaded.memory is not None
    now_ms = 1 << 40
    for offset in range(9):
        ms = now_ms + (offset - 7) * HOUR_MS
        loaded.catalog.apply(Item(item_id=f"n{offset}", published_ms=ms), 0, offset)
    query_BD, contexts = some(loaded, 3)

    def candidates(newest: int) -> list[set[str]]:
        spec = msgspec.structs.replace(manifest.blend, newest=newest, popular=False)
        rows = rows_of(loaded.memory, loaded.catalog)
        found = gather(spec, query_BD, contexts, loaded.memory, rows, loaded.scanner, 30)
        names = [loaded.memory.ids[code] for code in found.pool.code_R.tolist()]
        published = found.feature_RF[:, FEATURES.index("published")]
        out = [set() for _ in contexts]
        for user, name, value in zip(users(found), names, published.tolist(), strict=True):
            if name.startswith("n"):
                out[user].add(name)
                age_h = 7 - int(name[1:])
                assert value == pytest.approx(np.log(age_h + 0.1), abs=1e-5)
        return out

    assert candidates(3) == [{"n5", "n6", "n7"}] * 3
    assert candidates(0) == [set()] * 3


def test_what_the_scan_has_scored_is_not_scored_again(loaded: LoadedRelease) -> None:
    """A candidate that the model names itself comes with its score."""
    query_BD, contexts = some(loaded, 5)
    assert loaded.manifest.blend is not None
    assert loaded.memory is not None
    spec = msgspec.structs.replace(loaded.manifest.blend, model=10)
    rows, look = rows_of(loaded.memory, loaded.catalog), loaded.scanner.look(query_BD, 21)
    asked: set[tuple[int, int]] = set()

    def of(user_R: np.ndarray, row_R: np.ndarray) -> np.ndarray:
        asked.update(zip(user_R.tolist(), row_R.tolist(), strict=True))
        return look.of(user_R, row_R)

    own = look._replace(of=of)
    pool = gather(spec, query_BD, contexts, loaded.memory, rows, loaded.scanner, 20, look=own).pool
    user_R = np.repeat(np.arange(5), np.diff(pool.begin_B1))
    row_R, known_R = rows.row_N[pool.code_R], ~np.isnan(pool.score_R)
    assert known_R.sum() == 5 * 10
    score_R = loaded.scanner.scores(query_BD)[user_R, row_R]
    assert np.array_equal(pool.score_R[known_R], score_R[known_R])
    others = zip(user_R[~known_R].tolist(), row_R[~known_R].tolist(), strict=True)
    assert asked == set(others) != set()


def test_reach_equals_its_definition(loaded: LoadedRelease) -> None:
    """What came within three steps after the last six items, counted one by one."""
    memory = loaded.memory
    assert memory is not None
    rng, start_ms = np.random.default_rng(5), memory.clock_ms
    hashes = [item_hash(item_id) for item_id in memory.ids]
    for at in range(900):
        before = tuple(hashes[code] for code in rng.integers(0, 12, rng.integers(0, 4)))
        item = memory.ids[int(rng.integers(0, 12))]
        memory.absorb([Move(item, 2, start_ms + at * HOUR_MS // 8, before)])
    now_ms = memory.clock_ms + HOUR_MS
    past = rng.integers(0, 12, 9)
    packed = [pack_interaction(Interaction(hashes[code], 1, 2, 3, 4, False)) for code in past]
    context = Context(b"".join(packed), 9, now_ms, now_ms)
    spec = loaded.manifest.blend
    assert spec is not None
    query_BD = loaded.engine.query(loaded.engine.zero_state(1))
    rows = rows_of(memory, loaded.catalog)
    found = gather(spec, query_BD, [context], memory, rows, loaded.scanner, 20)

    plain_N, day_N = np.zeros(memory.num_items), np.zeros(memory.num_items)
    for place, code in enumerate(past[::-1][:6]):
        entries = []
        for trail in (memory.next, memory.later):
            for at in trail.find(np.array([code]), 96)[1]:
                weight = 1.0 if trail is memory.next else 0.6 ** (trail.mark_A[at] - 1.0)
                fresh = weight * 0.5 ** ((now_ms - trail.ms_A[at]) / (24 * HOUR_MS))
                entries.append((trail.item_A[at], weight, fresh))
        for item, weight, fresh in entries:
            plain_N[item] += 0.6**place * weight / (sum(w for _, w, _ in entries) + 1.0)
            day_N[item] += 0.6**place * fresh / (sum(f for _, _, f in entries) + 0.3)
    for name, wanted_N in (("reach", plain_N), ("reach_day", day_N)):
        own_R = found.feature_RF[:, FEATURES.index(name)]
        assert np.allclose(own_R, np.log(wanted_N[found.pool.code_R] + 1e-3), atol=1e-4)
        assert len(set(own_R.tolist())) > 10


def test_rows_after_changes_are_those_of_a_fresh_look(loaded: LoadedRelease) -> None:
    """Items come, hide, move in time, and the memory learns of strangers, in any order."""
    assert loaded.blend is not None
    assert loaded.memory is not None
    rng = np.random.default_rng(5)
    for offset in range(300):
        number = int(rng.integers(0, 400))
        ms = [None, 0, 5000 + int(rng.integers(0, 4))][int(rng.integers(0, 3))]
        categories = ["c1"] if rng.random() < 0.5 else []
        loaded.catalog.apply(
            Item(
                item_id=f"i{number:05d}",
                available=bool(rng.random() < 0.7),
                published_ms=ms,
                categories=categories,
            ),
            0,
            offset,
        )
        if rng.random() < 0.2:
            loaded.memory.absorb([Move(f"s{rng.integers(0, 50)}", 2, 1 << 40, ())])
        if rng.random() < 0.3:
            found = loaded.blend.rows(loaded.memory, loaded.catalog)
            expected = rows_of(loaded.memory, loaded.catalog)
            for name, array in expected._asdict().items():
                pairs = zip(array, getattr(found, name), strict=True) if name == "published" else ()
                for one, other in pairs or [(array, getattr(found, name))]:
                    assert np.array_equal(one, other), name
    found = loaded.blend.rows(loaded.memory, loaded.catalog)
    assert loaded.blend.rows(loaded.memory, loaded.catalog) is found


def test_who_is_far_behind_the_catalogue_looks_at_everything(
    loaded: LoadedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of changes is bounded, so a worker may come too late for it."""
    monkeypatch.setattr("afterclick.serving.catalog.CHANGES_MAX", 10)
    assert loaded.blend is not None
    assert loaded.memory is not None
    loaded.blend.rows(loaded.memory, loaded.catalog)
    for offset in range(25):
        loaded.catalog.apply(Item(item_id=f"i{offset:05d}", available=False), 0, offset)
    found = loaded.blend.rows(loaded.memory, loaded.catalog)
    assert int(found.hidden_N.sum()) == 25


def test_what_others_leave_out_does_not_move_the_cut_of_a_users_best(
    loaded: LoadedRelease,
) -> None:
    """Their scan goes deeper, and a group of equal scores at one's own end came into sight."""
    vectors = loaded.catalog.scan_vectors_ND
    vectors[: loaded.catalog.num_items] = vectors[np.arange(loaded.catalog.num_items) // 3 * 3]
    loaded.scanner.changed(vectors, range(len(vectors)))
    query_BD, contexts = some(loaded, 2)
    alone = rank(loaded, query_BD[:1], contexts[:1])
    drops = [frozenset(), frozenset(item_hash(f"i{code:05d}") for code in range(40))]
    assert loaded.blend is not None
    assert loaded.memory is not None
    rows = loaded.blend.rows(loaded.memory, loaded.catalog)
    both, own = (
        gather(
            loaded.blend.spec,
            query_BD[:num],
            contexts[:num],
            loaded.memory,
            rows,
            loaded.scanner,
            30,
            drops[:num],
        )
        for num in (2, 1)
    )
    mine = users(both) == 0
    assert np.array_equal(both.pool.code_R[mine], own.pool.code_R)
    assert np.array_equal(both.feature_RF[mine], own.feature_RF)
    assert rank(loaded, query_BD, contexts, drops=drops)[0] == alone[0]


def test_lists_asked_for_together_are_those_of_each_alone(loaded: LoadedRelease) -> None:
    """Chunks of several partitions become one batch, with and without items left out."""
    query_BD, contexts = some(loaded, 60)
    alone = [rank(loaded, query_BD[at : at + 1], contexts[at : at + 1])[0] for at in range(60)]
    drops = [frozenset({item_hash(ranked.items[0])}) for ranked in alone]
    without = [
        rank(loaded, query_BD[at : at + 1], contexts[at : at + 1], drops=[drops[at]])[0]
        for at in range(60)
    ]

    def ask(at: int) -> Ranked:
        own = slice(at, at + 1)
        if at % 3:
            return rank(loaded, query_BD[own], contexts[own])[0]
        return rank(loaded, query_BD[own], contexts[own], drops=drops[own])[0]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(60)))
    assert found == [alone[at] if at % 3 else without[at] for at in range(60)]
