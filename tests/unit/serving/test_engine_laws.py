"""Bit-exactness is a promise with rules; each rule is a test on the real graphs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import Engine
from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import Manifest, Publication, read_manifest
from afterclick.serving.ranking import pick, pick_plain, rank_all
from afterclick.serving.releases import LoadedRelease, ReleaseStore, self_test
from afterclick.serving.scanner import MASKED, Scanner
from afterclick.serving.sessions import choose_provider, session_of
from afterclick.serving.settings import ServingSettings
from afterclick.serving.texts import Texts
from tests.doubles import damaged
from tests.tiny_release import digest_of, write_tiny_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "r1"
    write_tiny_release(folder, num_items=3000, units=64, seed=3)
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def random_steps(manifest: Manifest, steps: int, users: int, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    x_TBE = rng.standard_normal((steps, users, manifest.step_dim)).astype(np.float32)
    gap_TB = rng.integers(0, 32, (steps, users))
    return x_TBE, gap_TB


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_users_bits_do_not_depend_on_who_shares_the_call(
    folder: Path, manifest: Manifest, threads: int
) -> None:
    """States, queries and scores of 1 user, of 2, of 300: the same bits, at any thread count."""
    engine = Engine(folder, manifest, provider="cpu", threads=threads)
    one_thread = Engine(folder, manifest, provider="cpu", threads=1)
    catalog = Catalog.from_release(folder, manifest)
    scanner = Scanner(catalog.scan_vectors_ND, provider="cpu", threads=threads)
    x_TBE, gap_TB = random_steps(manifest, 3, 300)
    lens_B = np.array([1 + n % 3 for n in range(300)], np.int32)
    whole = one_thread.advance(one_thread.zero_state(300), x_TBE, lens_B, gap_TB=gap_TB)
    scores = scanner.scores(engine.query(whole))
    for size in (1, 2, 3, 16, 100, 256):
        for start in range(0, 300, size):
            part = slice(start, min(start + size, 300))
            state = engine.advance(
                engine.zero_state(part.stop - part.start),
                x_TBE[:, part],
                lens_B[part],
                gap_TB=gap_TB[:, part],
            )
            assert np.array_equal(state, whole[part])
            assert np.array_equal(scanner.scores(engine.query(state)), scores[part])


def test_one_sequence_and_single_steps_give_the_same_bits(folder: Path, manifest: Manifest) -> None:
    """A rebuild runs a history at once, the stream ran it click by click."""
    engine = Engine(folder, manifest, provider="cpu", threads=2)
    x_TBE, gap_TB = random_steps(manifest, 50, 7, seed=1)
    at_once = engine.advance(engine.zero_state(7), x_TBE, np.full(7, 50, np.int32), gap_TB=gap_TB)
    state = engine.zero_state(7)
    for t in range(50):
        state = engine.advance(
            state, x_TBE[t : t + 1], np.ones(7, np.int32), gap_TB=gap_TB[t : t + 1]
        )
    assert np.array_equal(state, at_once)


def test_halves_are_rounded_after_every_step(folder: Path, manifest: Manifest) -> None:
    """Whatever was one call, or in a record in between: the same halves, and not the rounded end
    of an exact run, which would depend on where the log was cut.
    """
    halves = msgspec.structs.replace(manifest, state_dtype="fp16")
    engine = Engine(folder, halves, provider="cpu", threads=2)
    x_TBE, gap_TB = random_steps(manifest, 50, 7, seed=1)
    lens_B = np.array([50, 50, 1, 17, 50, 3, 49], np.int32)
    at_once = engine.advance(engine.zero_state(7), x_TBE, lens_B, gap_TB=gap_TB)
    exact = engine.run_steps(engine.zero_state(7), x_TBE, lens_B, gap_TB=gap_TB)
    for user, length in enumerate(lens_B):
        kept = b""
        for t in range(length):
            kept = engine.packed(
                engine.advance(
                    engine.unpacked([kept]),
                    x_TBE[t : t + 1, user : user + 1],
                    np.ones(1, np.int32),
                    gap_TB=gap_TB[t : t + 1, user : user + 1],
                )
            )[0]
        assert len(kept) == 2 * manifest.state_floats
        assert np.array_equal(engine.unpacked([kept])[0], at_once[user])
    assert np.array_equal(at_once, at_once.astype(np.float16).astype(np.float32))
    assert not np.array_equal(at_once, exact.astype(np.float16).astype(np.float32))
    # 2^-11 a step, and the cell forgets: far from 50 of them.
    assert np.abs(at_once - exact).max() < 1e-2


@pytest.mark.parametrize("state_dtype", ["fp32", "fp16"])
def test_a_state_that_was_rounded_comes_back_from_a_record(
    folder: Path, manifest: Manifest, state_dtype: str
) -> None:
    """Every half there is, denormals and signed zeros included: packing may not round again."""
    kept = msgspec.structs.replace(manifest, state_dtype=state_dtype)
    engine = Engine(folder, kept, provider="cpu", threads=1)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact_BS = halves[np.isfinite(halves)].astype(np.float32).reshape(-1, manifest.state_floats)
    again_BS = engine.unpacked(engine.packed(exact_BS))
    assert again_BS.dtype == np.float32
    assert again_BS.tobytes() == exact_BS.tobytes()


def test_padding_never_moves_a_bit(folder: Path, manifest: Manifest) -> None:
    """What lies beyond a user's length is not read."""
    engine = Engine(folder, manifest, provider="cpu", threads=2)
    x_TBE, gap_TB = random_steps(manifest, 4, 5, seed=2)
    lens_B = np.array([1, 2, 3, 4, 2], np.int32)
    clean = engine.advance(engine.zero_state(5), x_TBE, lens_B, gap_TB=gap_TB)
    dirty = x_TBE.copy()
    for user, length in enumerate(lens_B):
        dirty[length:, user] = 1e6
    assert np.array_equal(engine.advance(engine.zero_state(5), dirty, lens_B, gap_TB=gap_TB), clean)


def test_items_appended_or_permuted_keep_every_other_score(
    folder: Path, manifest: Manifest
) -> None:
    """Rows carry no meaning: items arrive in any order, and the matrix grows."""
    catalog = Catalog.from_release(folder, manifest)
    q_BD = np.random.default_rng(4).standard_normal((9, manifest.scan_dim)).astype(np.float32)
    matrix = catalog.scan_vectors_ND
    before = Scanner(matrix, provider="cpu", threads=2).scores(q_BD)
    order = np.random.default_rng(5).permutation(len(matrix))
    grown = np.concatenate([matrix[order], matrix[:777]])
    after = Scanner(grown, provider="cpu", threads=2).scores(q_BD)
    assert np.array_equal(after[:, : len(matrix)], before[:, order])


def test_top_k_equals_a_full_sort_ties_by_item_id() -> None:
    """Half the scores are equal: the order must be that of the ids, whatever the rows' order."""
    rng = np.random.default_rng(6)
    for trial in range(60):
        num = int(rng.integers(3, 400))
        ids_N = np.array([f"i{n:04d}" for n in rng.permutation(num)], dtype=object)
        scores_N = rng.integers(0, 4 if trial % 2 else 1000, num).astype(np.float32)
        scores_N[rng.random(num) < 0.1] = MASKED
        drop = set(rng.choice(ids_N, 3).tolist()) if trial % 3 else set()
        want = int(rng.integers(1, 60))
        order = sorted(range(num), key=lambda at: (-scores_N[at], ids_N[at]))
        expected = [
            ids_N[at] for at in order if ids_N[at] not in drop and scores_N[at] > MASKED / 2
        ][:want]
        fetch = min(num, want + 1 + len(drop))
        rows = np.argsort(-scores_N, kind="stable")[:fetch]
        found = pick(scores_N[rows], rows, ids_N, want=want, drop=drop, complete=fetch == num)
        found = found or rank_all(scores_N, ids_N, want=want, drop=drop)
        assert found.items == expected
        plain = pick_plain(scores_N[rows][None], rows[None], Texts(ids_N.tolist()), want=want)[0]
        if plain is not None and not drop:
            assert plain.items == expected


def test_scans_asked_for_together_are_one_and_keep_everybodys_bits(
    folder: Path, manifest: Manifest
) -> None:
    """Chunks of several partitions share a scan; each gets what it would get alone."""
    catalog = Catalog.from_release(folder, manifest)
    scanner = Scanner(catalog.scan_vectors_ND, provider="cpu", threads=1)
    rng = np.random.default_rng(8)
    asks = [
        (rng.standard_normal((1 + n % 5, manifest.scan_dim)).astype(np.float32), 5 + n % 40)
        for n in range(200)
    ]
    alone = [scanner.top(q_BD, k) for q_BD, k in asks]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda ask: scanner.top(*ask), asks))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


def test_a_masked_row_is_never_listed_and_k_beyond_the_catalogue_is_cut(
    folder: Path, manifest: Manifest
) -> None:
    """Spare rows are no items."""
    catalog = Catalog.from_release(folder, manifest)
    scanner = Scanner(catalog.scan_vectors_ND, provider="cpu", threads=1)
    q_BD = np.ones((1, manifest.scan_dim), np.float32)
    scores_BK, rows_BK = scanner.top(q_BD, 10**6)
    assert scores_BK.shape[1] == scanner.num_rows > 3000
    ranked = pick(scores_BK[0], rows_BK[0], catalog.ids_N, want=10**6, complete=True)
    assert ranked is not None
    assert len(ranked.items) == 3000


def test_asking_for_cuda_without_one_is_refused(folder: Path) -> None:
    """Asked for CUDA and got the CPU is a ConfigError, not a warning."""
    if choose_provider("auto") == "cuda":
        assert choose_provider("cuda") == "cuda"
        return
    with pytest.raises(ConfigError, match="asked for 'cuda'"):
        choose_provider("cuda")
    with pytest.raises(ConfigError, match="'fp16' scans only on 'cuda'"):
        Scanner(np.zeros((2, 2), np.float32), provider="cpu", precision="fp16")


@pytest.mark.parametrize("name", ["step.onnx", "items.json", "scan_vectors.npy", "self_test.npz"])
def test_a_torn_or_tampered_release_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Every file counts."""
    folder = tmp_path / "r1"
    write_tiny_release(folder)
    publication = Publication(number=1, release="r1", sha256=digest_of(folder))
    (folder / name).write_bytes(damaged((folder / name).read_bytes()))
    with pytest.raises(ContractError, match=f"sha256 of {name}") as caught:
        LoadedRelease(publication, folder, ServingSettings(provider="cpu"))
    assert caught.value.reason == "checksum"
    (folder / name).unlink()
    with pytest.raises(ContractError, match=f"{name} is missing"):
        LoadedRelease(publication, folder, ServingSettings(provider="cpu"))


def test_a_self_test_that_gives_other_numbers_is_refused(tmp_path: Path) -> None:
    """Checksums fit, the numbers don't: another graph than the one that was recorded."""
    left, right = tmp_path / "left", tmp_path / "right"
    write_tiny_release(left, seed=1)
    manifest = write_tiny_release(right, seed=2)
    (right / "self_test.npz").write_bytes((left / "self_test.npz").read_bytes())
    with pytest.raises(ContractError, match="self-test") as caught:
        self_test(right, Engine(right, manifest, provider="cpu", threads=1))
    assert caught.value.reason == "self-test"


@pytest.mark.parametrize("remote", [False, True])
def test_publications_are_numbered_and_a_rollback_is_one(tmp_path: Path, remote: bool) -> None:
    """A folder and an fsspec URL behave alike."""
    root = tmp_path / "releases"
    root.mkdir()
    store = ReleaseStore(f"file://{root}" if remote else str(root), str(tmp_path / "cache"))
    assert store.current() is None
    for seed in (1, 2):
        staged = store.staging(f"r{seed}")
        write_tiny_release(staged, seed=seed)
        store.add(staged)
        assert store.publish(f"r{seed}").number == seed
    assert store.list() == ["r1", "r2"]
    assert store.publish("r1").number == 3
    current = store.current()
    assert current is not None
    assert (current.number, current.release) == (3, "r1")
    assert read_manifest(store.fetch("r1")).release == "r1"
    with pytest.raises(ContractError, match="no release 'r9'"):
        store.publish("r9")
    staged = store.staging("r1")
    write_tiny_release(staged, seed=1)
    with pytest.raises(ContractError, match="already"):
        store.add(staged)


def test_a_gpu_multiplies_with_all_bits(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32, which ONNX Runtime takes by default, has 10 bits of 23: lists would differ from a
    CPU's.
    """
    asked: list[object] = []

    class Recorder:
        def __init__(self, *_: object, providers: list[object]) -> None:
            asked.extend(providers)

    monkeypatch.setattr("afterclick.serving.sessions.ort.InferenceSession", Recorder)
    session_of(folder / "query.onnx", "cuda", 1)
    session_of(folder / "query.onnx", "cpu", 1)
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]
