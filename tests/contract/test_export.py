"""What the trainer writes is what serving/manifest.py says; the gate refuses everything else."""

import itertools
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import Engine, Past
from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import (
    ENCODER_NAME,
    MANIFEST_NAME,
    SCAN_VECTORS_NAME,
    STEP_NAME,
    ItemRow,
    Manifest,
    Snapshot,
    read_manifest,
    sha256_of,
)
from afterclick.serving.past import past_of
from afterclick.serving.records import (
    INTERACTION_BYTES,
    Interaction,
    UserRecord,
    encode_record,
    item_hash,
    pack_interaction,
)
from afterclick.serving.releases import LoadedRelease, ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.streams.events import Item
from afterclick.streams.inference import rank_states
from afterclick.training.export import (
    Tables,
    advance_stepwise,
    advance_whole,
    build_tables,
    check_release,
    past_of_histories,
    random_histories,
    torch_queries,
    torch_states,
    write_release,
)
from afterclick.training.graphs import state_names
from afterclick.training.model import Recommender
from afterclick.training.settings import TrainingSettings
from afterclick.training.text import content_of
from tests.unit.training.worlds import quick

NUM_ITEMS = 200
HISTORY = 20

ORACLE_TOLERANCE = 1e-5
"""float32 against the same formulas in float64, 20 steps of 16 units."""

CELLS = ("lstm", "gru")
KINDS = list(itertools.product(CELLS, (1, 2), ("cosine", "softmax"), (True, False)))


def make(
    folder: Path,
    *,
    cell: str = "lstm",
    layers: int = 1,
    loss: str = "cosine",
    context: bool = True,
    rows: list[ItemRow] | None = None,
    past: int = 0,
    purchase_weight: float = 0.0,
    state_dtype: str = "fp32",
) -> tuple[Recommender, Tables, Manifest]:
    """A release with random weights; of items that say something, every third was never clicked."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = quick(
        cell=cell,
        layers=layers,
        loss=loss,
        event_vectors=context,
        gap_vectors=context,
        hour_vectors=context,
        past=past,
        purchase_weight=purchase_weight,
        state_dtype=state_dtype,
    )
    content = None if rows is None else content_of(rows, settings.content_buckets)
    model = Recommender(NUM_ITEMS, settings, content)
    torch.nn.init.normal_(model.bias)
    if model.attend is not None:
        for weight in model.attend.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    for table in (model.events, model.gaps, model.hours):
        if table is not None:
            torch.nn.init.normal_(table.weight)
    ids = [f"i{n:05d}" for n in range(NUM_ITEMS)]
    trained_N = np.ones(NUM_ITEMS, bool)
    if rows is not None:
        trained_N[::3] = False
    tables = build_tables(model, ids, trained_N, {row.item_id: row for row in rows or ()})
    folder.mkdir(parents=True, exist_ok=True)
    manifest = write_release(
        folder,
        model,
        tables,
        created_at="2026-01-01T00:00:00Z",
        history=HISTORY,
        snapshot=Snapshot(source="random"),
    )
    return model, tables, manifest


def speaking_rows() -> list[ItemRow]:
    """Titles and texts, Chinese and English, categories, and vectors for every second."""
    rng = np.random.default_rng(6)
    said = "央行 下调 利率 马航 失联 market bank red holder 改革 film".split()  # noqa: SIM905
    return [
        ItemRow(
            item_id=f"i{n:05d}",
            title=" ".join(rng.choice(said, 3)),
            text=" ".join(rng.choice(said, 8)) if n % 4 else "",
            categories=[f"c{n % 5}"],
            domain="example.org" if n % 2 else "",
            vector=None if n % 2 else rng.standard_normal(6).tolist(),
        )
        for n in range(NUM_ITEMS)
    ]


def reseal(folder: Path, manifest: Manifest) -> None:
    """Make checksums fit again, so that only the gate's own comparisons can object."""
    names = manifest.files
    fitting = msgspec.structs.replace(manifest, files={n: sha256_of(folder / n) for n in names})
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(fitting))


@pytest.mark.parametrize(("cell", "layers", "loss", "context"), KINDS)
def test_every_kind_of_model_passes_the_gate(
    tmp_path: Path, cell: str, layers: int, loss: str, context: bool
) -> None:
    """Every cell, one layer and two, both kinds of scores, with and without event, gap, hour."""
    folder = tmp_path / "r1"
    model, tables, manifest = make(folder, cell=cell, layers=layers, loss=loss, context=context)

    assert "random histories" in check_release(folder, model, tables, None)
    assert manifest.state_floats == layers * 16 * (2 if cell == "lstm" else 1)


@pytest.mark.parametrize("cell", CELLS)
def test_states_of_halves_pass_the_gate_and_are_refused_by_older_workers(
    tmp_path: Path, cell: str
) -> None:
    """The graphs are the same; who does not round would fold to other bits."""
    whole, halves = tmp_path / "r1", tmp_path / "r2"
    _, _, before = make(whole, cell=cell)
    model, tables, manifest = make(halves, cell=cell, state_dtype="fp16")

    assert "random histories" in check_release(halves, model, tables, None)
    assert (before.schema, manifest.schema) == (1, 2)
    assert manifest.state_bytes == before.state_bytes // 2
    assert manifest.files[STEP_NAME] == before.files[STEP_NAME]


def test_a_release_whose_schema_and_states_disagree_is_refused(tmp_path: Path) -> None:
    """Schema 1 is what older workers read, and they do not round."""
    folder = tmp_path / "r1"
    _, _, manifest = make(folder)
    reseal(folder, msgspec.structs.replace(manifest, state_dtype="fp16"))
    with pytest.raises(ContractError, match="schema 1, this worker reads 2"):
        read_manifest(folder)


def test_an_odd_number_of_halves_is_refused(tmp_path: Path) -> None:
    """A record's length counts words of four bytes."""
    folder = tmp_path / "r1"
    _, _, manifest = make(folder, cell="gru", state_dtype="fp16")
    odd = [msgspec.structs.replace(tensor, units=15) for tensor in manifest.state]
    reseal(folder, msgspec.structs.replace(manifest, state=odd))
    with pytest.raises(ContractError, match="even number"):
        read_manifest(folder)


@pytest.mark.parametrize("loss", ["cosine", "softmax"])
def test_a_worker_makes_of_a_new_item_what_the_model_makes_of_it(tmp_path: Path, loss: str) -> None:
    """Never clicked and in the catalogue, or just arrived: the same words, the same vectors."""
    folder = tmp_path / "r1"
    rows = speaking_rows()
    model, tables, manifest = make(folder, loss=loss, rows=rows)

    passed = check_release(folder, model, tables, None)
    catalog = Catalog.from_release(folder, manifest)
    catalog.apply(Item(**msgspec.structs.asdict(rows[3]) | {"item_id": "just arrived"}), 0, 0)
    arrived = catalog.row("just arrived")

    assert "item encoder" in passed
    assert arrived is not None
    assert np.array_equal(catalog.step_vectors_NE[arrived], tables.step_ND[3])
    assert np.array_equal(catalog.scan_vectors_ND[arrived], tables.scan_ND[3])
    assert np.abs(tables.scan_ND[4, :-1] - tables.scan_ND[3, :-1]).max() > 0.01
    assert model.prior.item() == tables.scan_ND[3, -1]


def test_attention_over_the_past_gives_the_same_bits_alone_and_in_company(tmp_path: Path) -> None:
    """Always padded to M: neither the others nor the length of one's own past may move a bit."""
    folder = tmp_path / "r1"
    model, tables, manifest = make(folder, past=7)
    check_release(folder, model, tables, None)
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    histories = random_histories(np.random.default_rng(3), NUM_ITEMS, HISTORY)
    states = advance_whole(engine, tables.step_ND, histories)
    past = past_of_histories(histories, tables.step_ND, 7)
    assert past is not None

    together = engine.query(states, past)

    bare = Past(np.zeros_like(past.x_BME), np.zeros_like(past.has_BM))
    assert np.abs(engine.query(states, bare) - together).max() > 0.1
    for user in range(len(states)):
        one = slice(user, user + 1)
        alone = engine.query(states[one], Past(past.x_BME[one], past.has_BM[one]))
        assert np.array_equal(alone[0], together[user])


def test_a_release_may_be_asked_for_purchases(tmp_path: Path) -> None:
    """A second head on the same state; a release without one is refused by name."""
    store = ReleaseStore(str(tmp_path))
    for name, weight in (("r1", 0.0), ("r2", 1.0)):
        folder = store.staging(name)
        model, tables, manifest = make(folder, purchase_weight=weight, past=3)
        check_release(folder, model, tables, None)
        store.add(folder)
    settings = ServingSettings(provider="cpu", threads=1, head="purchase")

    with pytest.raises(ContractError, match="setting asks for 'purchase'"):
        LoadedRelease(store.publish("r1"), store.fetch("r1"), settings)
    loaded = LoadedRelease(store.publish("r2"), store.fetch("r2"), settings)

    states = np.random.default_rng(0).uniform(-0.5, 0.5, (5, manifest.state_floats))
    states = states.astype(np.float32)
    by_click = rank_states(states, loaded, want=10)
    by_purchase = rank_states(states, loaded, want=10, head="purchase")
    assert [found.items for found in by_click] != [found.items for found in by_purchase]


def test_the_past_of_a_record_is_what_the_histories_say(tmp_path: Path) -> None:
    """Newest first, unknown items passed over, nothing from before a reset."""
    folder = tmp_path / "r1"
    _, tables, manifest = make(folder, past=3)
    catalog = Catalog.from_release(folder, manifest)

    def kept(item_id: str, *, reset: bool = False) -> bytes:
        return pack_interaction(Interaction(item_hash(item_id), 0, 2, 0, 0, reset))

    long = b"".join(map(kept, ["i00009", "i00001", "i00002", "unknown", "i00003"]))
    fresh = kept("i00001") + kept("i00002", reset=True) + kept("i00003")
    past = past_of([long, fresh, b""], catalog, 3)

    assert past is not None
    assert np.array_equal(past.x_BME[0], tables.step_ND[[3, 2, 1]])
    assert np.array_equal(past.x_BME[1, :2], tables.step_ND[[3, 2]])
    assert past.has_BM.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert past_of([long], catalog, 0) is None


@pytest.mark.parametrize("cell", ["rnn", "attention"])
def test_a_cell_for_comparison_makes_no_release(tmp_path: Path, cell: str) -> None:
    """Its lists could not be recomputed to the bit, or not in constant time."""
    with pytest.raises(ContractError, match="for comparison"):
        make(tmp_path / "r1", cell=cell)


def test_a_tampered_encoder_is_refused(tmp_path: Path) -> None:
    """New items would be scored by what nobody trained."""
    folder = tmp_path / "r1"
    model, tables, manifest = make(folder, rows=speaking_rows())
    with np.load(folder / ENCODER_NAME, allow_pickle=False) as data:
        arrays = dict(data)
    arrays["vector"] = arrays["vector"][::-1]
    np.savez(folder / ENCODER_NAME, **arrays)
    reseal(folder, manifest)

    with pytest.raises(ContractError, match="item encoder"):
        check_release(folder, model, tables, None)


def test_an_encoder_of_another_text_function_is_refused(tmp_path: Path) -> None:
    """Its buckets would name other words."""
    folder = tmp_path / "r1"
    _, _, manifest = make(folder, rows=speaking_rows())
    assert manifest.encoder is not None
    newer = msgspec.structs.replace(manifest.encoder, text_version=99)

    with pytest.raises(ContractError, match="text function 99"):
        Catalog.from_release(folder, msgspec.structs.replace(manifest, encoder=newer))


def test_a_record_of_the_default_size_has_less_than_two_kilobytes() -> None:
    """Users times record is the memory of Redis."""
    settings = TrainingSettings()
    model = Recommender(2, settings)
    floats = len(state_names(model)) * settings.layers * settings.units
    record = UserRecord(
        state=b"\0" * 4 * floats, interactions=b"\0" * INTERACTION_BYTES * ServingSettings().history
    )

    assert len(encode_record(record)) <= 2000


@pytest.mark.parametrize(("cell", "layers"), list(itertools.product(CELLS, (1, 2))))
def test_a_sequence_gives_the_bits_of_its_steps(tmp_path: Path, cell: str, layers: int) -> None:
    """The fold may cut the log anywhere; padding and company never move a bit."""
    folder = tmp_path / "r1"
    _, tables, manifest = make(folder, cell=cell, layers=layers)
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    histories = random_histories(np.random.default_rng(3), NUM_ITEMS, HISTORY)

    whole = advance_whole(engine, tables.step_ND, histories)
    query = engine.query(whole)

    assert np.array_equal(whole, advance_stepwise(engine, tables.step_ND, histories))
    for user, length in enumerate(histories.lens_B[:8].tolist()):
        alone = engine.advance(
            engine.zero_state(1),
            tables.step_ND[histories.item_TB[:length, user : user + 1]],
            histories.lens_B[user : user + 1],
            event_TB=histories.event_TB[:length, user : user + 1],
            gap_TB=histories.gap_TB[:length, user : user + 1],
            hour_TB=histories.hour_TB[:length, user : user + 1],
        )
        assert np.array_equal(alone[0], whole[user])
        assert np.array_equal(engine.query(alone)[0], query[user])


def test_the_graph_is_the_lstm_of_the_textbook(tmp_path: Path) -> None:
    """Plain numpy in float64 with the weights that stand in step.onnx, gates i o f c."""
    folder = tmp_path / "r1"
    _, tables, manifest = make(folder)
    weights = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float64)
        for tensor in onnx.load(folder / STEP_NAME).graph.initializer
    }
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    histories = random_histories(np.random.default_rng(4), NUM_ITEMS, HISTORY)

    found = advance_whole(engine, tables.step_ND, histories)

    bias = weights["B0"][0].reshape(2, -1).sum(axis=0)
    for user, length in enumerate(histories.lens_B.tolist()):
        h, c = np.zeros(16), np.zeros(16)
        for step in range(length):
            x = (
                tables.step_ND[histories.item_TB[step, user]]
                + weights["event_vectors"][histories.event_TB[step, user]]
                + weights["gap_vectors"][histories.gap_TB[step, user]]
                + weights["hour_vectors"][histories.hour_TB[step, user]]
            )
            i, o, f, g = np.split(weights["W0"][0] @ x + weights["R0"][0] @ h + bias, 4)
            c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
            h = np.tanh(c) / (1 + np.exp(-o))
        assert np.abs(found[user] - np.concatenate([h, c])).max() < ORACLE_TOLERANCE


def test_scores_are_cosines_times_scale_plus_bias(tmp_path: Path) -> None:
    """The bias travels as the last coordinate."""
    folder = tmp_path / "r1"
    model, tables, manifest = make(folder)
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    histories = random_histories(np.random.default_rng(5), NUM_ITEMS, HISTORY)
    state = torch_states(model, tables, histories)

    query = engine.query(state)
    scores = query @ tables.scan_ND.T

    assert np.all(query[:, -1] == 1)
    assert np.abs(query - torch_queries(model, state)).max() < 1e-4
    cosine = scores - model.bias.detach().numpy()
    assert np.abs(cosine).max() <= model.scale.item() + 1e-4


@pytest.mark.parametrize("name", ["W0", "R0", "B0", "gap_vectors", "hour_vectors"])
def test_a_tampered_weight_is_refused(tmp_path: Path, name: str) -> None:
    """Even with fitting checksums and self-test: torch says otherwise."""
    folder = tmp_path / "r1"
    model, tables, manifest = make(folder)
    graph = onnx.load(folder / STEP_NAME)
    tensor = next(t for t in graph.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[:] = array.ravel()[::-1]
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(graph, folder / STEP_NAME)
    reseal(folder, manifest)

    with pytest.raises(ContractError, match="self-test"):
        check_release(folder, model, tables, None)

    _record_again(folder, manifest)
    with pytest.raises(ContractError, match="ONNX against torch") as refused:
        check_release(folder, model, tables, None)
    assert refused.value.reason == "export-gate"


def _record_again(folder: Path, manifest: Manifest) -> None:
    """A self-test that the tampered graph passes."""
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    with np.load(folder / "self_test.npz", allow_pickle=False) as recorded:
        feed = {key: recorded[key] for key in recorded.files}
    state = engine.run_steps(
        feed["state"],
        feed["x"],
        feed["lens"],
        event_TB=feed["event"],
        gap_TB=feed["gap"],
        hour_TB=feed["hour"],
    )
    np.savez(
        folder / "self_test.npz", **{**feed, "state_next": state, "query": engine.query(state)}
    )
    reseal(folder, manifest)


def test_a_tampered_item_vector_is_refused(tmp_path: Path) -> None:
    """Lists would differ from what was evaluated."""
    folder = tmp_path / "r1"
    model, tables, manifest = make(folder)
    scan = np.load(folder / SCAN_VECTORS_NAME, allow_pickle=False)
    scan[7, 3] += 0.1
    np.save(folder / SCAN_VECTORS_NAME, scan)
    reseal(folder, manifest)

    with pytest.raises(ContractError, match="scan vectors"):
        check_release(folder, model, tables, None)


def test_a_torn_release_is_refused(tmp_path: Path) -> None:
    """One flipped byte without a new checksum."""
    folder = tmp_path / "r1"
    model, tables, _ = make(folder)
    data = bytearray((folder / STEP_NAME).read_bytes())
    data[-1] ^= 1
    (folder / STEP_NAME).write_bytes(data)

    with pytest.raises(ContractError, match="sha256"):
        check_release(folder, model, tables, None)


def test_never_clicked_items_join_with_the_vectors_of_their_kin() -> None:
    """The mean of the clicked items of their categories, zeros without any; the lowest bias."""
    torch.manual_seed(0)
    model = Recommender(3, quick())
    torch.nn.init.normal_(model.bias)
    rows = {
        "a": ItemRow(item_id="a", categories=["x"]),
        "b": ItemRow(item_id="b", categories=["x", "y"]),
        "new": ItemRow(item_id="new", title="新", categories=["x"], available=False),
        "odd": ItemRow(item_id="odd", categories=["z"]),
    }

    tables = build_tables(model, ["a", "b", "c"], np.array([True, True, True]), rows)

    assert [row.item_id for row in tables.rows] == ["a", "b", "c", "new", "odd"]
    assert tables.rows[3].title == "新"
    np.testing.assert_allclose(tables.step_ND[3], tables.step_ND[:2].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(tables.scan_ND[3, :-1], tables.scan_ND[:2, :-1].mean(0), rtol=1e-6)
    assert not tables.step_ND[4].any()
    assert tables.scan_ND[3, -1] == tables.scan_ND[4, -1] == tables.scan_ND[:3, -1].min()
    assert tables.num_cold == 2


def test_a_worker_loads_what_the_trainer_published(tmp_path: Path) -> None:
    """Through the store, with the worker's own loader."""
    store = ReleaseStore(str(tmp_path))
    folder = store.staging("r1")
    make(folder)
    store.add(folder)
    publication = store.publish("r1")

    loaded = LoadedRelease(
        publication, store.fetch("r1"), ServingSettings(provider="cpu", threads=1)
    )

    assert loaded.catalog.num_items == NUM_ITEMS
    assert loaded.publication.number == 1
