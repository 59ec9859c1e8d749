"""A trained model becomes a release folder, and the gate that lets it out.

Writes exactly what serving/manifest.py defines. Knows no training and no place where releases are
published. Shape letters: T steps, B users, S floats of state, N items, D item vector, K results.

The gate compares three ways to the same list on random and on held-out histories: torch, the ONNX
graph fed a whole sequence, and the ONNX graph fed step by step, through the very engine that
workers use.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import torch

from afterclick.serving.blend import Blend
from afterclick.serving.catalog import Catalog
from afterclick.serving.encoder import ItemEncoder
from afterclick.serving.engine import Engine, Past, output_of
from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import (
    BLEND_NAME,
    ENCODER_NAME,
    EVENTS,
    FILES,
    GAP_BUCKETS,
    ITEMS_NAME,
    MANIFEST_NAME,
    MEMORY_NAME,
    QUERY_NAME,
    SCAN_VECTORS_NAME,
    SELF_TEST_NAME,
    STEP_NAME,
    STEP_VECTORS_NAME,
    Compression,
    EncoderSpec,
    ItemRow,
    ItemTable,
    Manifest,
    Snapshot,
    StateTensor,
    StepInputs,
    read_manifest,
    schema_of,
    sha256_of,
    verify_files,
)
from afterclick.serving.memory import Memory
from afterclick.serving.past import past_of_rows
from afterclick.serving.releases import replayed, self_test
from afterclick.serving.scanner import Scanner
from afterclick.serving.text import TEXT_VERSION
from afterclick.training.blending import Fitted as FittedBlend
from afterclick.training.blending import graph_of
from afterclick.training.data import I64, UNKNOWN, Sequences
from afterclick.training.graphs import query_graph, state_names, step_graph
from afterclick.training.model import HOURS, STEP_NORM, Recommender, Steps
from afterclick.training.model import Past as TorchPast

F32 = npt.NDArray[np.float32]

TOLERANCE = 1e-4
"""Largest difference between engines, per unit of the larger magnitude: float32 sums of some
hundred terms near 1 differ by 1e-6, over 50 steps by about 1e-5; a wrong weight by far more.
"""

GATE_USERS = 64
"""Histories of each kind that the gate compares."""

GATE_K = 50
"""Length of the lists that the gate compares."""

SELF_TEST_USERS = 6
SELF_TEST_STEPS = 5


class Tables(NamedTuple):
    """Everything a release holds per item; row i is item i, sorted by id."""

    rows: list[ItemRow]
    step_ND: F32
    scan_ND: F32
    """(N, D + 1): the bias is the last coordinate."""
    num_cold: int
    """Items that training never saw."""
    encoder: "EncoderTables | None" = None
    """None where items say nothing."""


class EncoderTables(NamedTuple):
    """What `item_encoder.npz` holds."""

    spec: EncoderSpec
    bucket_K: I64
    vector_KD: F32
    given_VD: F32


class Histories(NamedTuple):
    """Item rows, event codes, gap buckets and hours of B users, padded with zeros to T steps."""

    item_TB: I64
    event_TB: I64
    gap_TB: I64
    hour_TB: I64
    lens_B: npt.NDArray[np.int32]


def build_tables(
    model: Recommender,
    item_ids: Sequence[str],
    trained_N: npt.NDArray[np.bool_],
    details: Mapping[str, ItemRow],
) -> Tables:
    """Join the model's items with the catalogue's.

    Args:
        model: its item rows are `item_ids`.
        item_ids: sorted.
        trained_N: False for items whose vectors training never moved towards a click.
        details: what the catalogue says, by item id; its further items join the release.

    Returns:
        Tables over all items. An item that was never clicked is given what the encoder makes of
        its content, as a worker would. Without an encoder it is the mean of the vectors of the
        clicked ones that share a category with it. An item of which nothing is known gets zeros;
        these two have the lowest bias of any clicked item.
    """
    ids = sorted({*item_ids, *details})
    row_of = {item_id: row for row, item_id in enumerate(ids)}
    rows = [details.get(item_id) or ItemRow(item_id=item_id) for item_id in ids]
    learned = np.array([row_of[item_id] for item_id in item_ids], np.int64)[trained_N]
    model.eval()
    model.set_trained(trained_N)
    step_ND = np.zeros((len(ids), model.settings.dim), np.float32)
    scan_ND = np.zeros((len(ids), model.settings.dim + 1), np.float32)
    with torch.no_grad():
        code = torch.from_numpy(np.flatnonzero(trained_N)).to(model.bias.device)
        step_ND[learned] = model.step_vectors(code).cpu().numpy()
        scan_ND[learned] = model.scan_vectors()[code].cpu().numpy()
    is_learned = np.zeros(len(ids), bool)
    is_learned[learned] = True
    parts = encoder_tables(model, trained_N)
    encoder = None if parts is None else ItemEncoder(*parts)
    members: dict[str, list[int]] = {}
    for row in learned.tolist() if encoder is None else ():
        for name in rows[row].categories:
            members.setdefault(name, []).append(row)
    lowest = scan_ND[learned, -1].min() if len(learned) else np.float32(0)
    for row in np.flatnonzero(~is_learned).tolist():
        vectors = None if encoder is None else encoder.encode(rows[row])
        if vectors is not None:
            step_ND[row], scan_ND[row] = vectors
            continue
        kin = sorted({near for name in rows[row].categories for near in members.get(name, ())})
        if kin:
            step_ND[row] = step_ND[kin].mean(axis=0, dtype=np.float64)
            scan_ND[row] = scan_ND[kin].mean(axis=0, dtype=np.float64)
        scan_ND[row, -1] = lowest
    return Tables(rows, step_ND, scan_ND, int((~is_learned).sum()), parts)


def encoder_tables(model: Recommender, trained_N: npt.NDArray[np.bool_]) -> EncoderTables | None:
    """What makes vectors of new items: the buckets that the trained items meet."""
    content = model.content
    if content is None:
        return None
    met = np.flatnonzero(content.met(trained_N))
    spec = EncoderSpec(
        text_version=TEXT_VERSION,
        num_buckets=model.settings.content_buckets,
        given_dim=content.given_NV.shape[1],
        step_norm=STEP_NORM if model.is_cosine else 0.0,
        bias=model.prior.item(),
    )
    vector_KD, given_VD = (
        weight.detach().cpu().numpy() for weight in (model.buckets.weight, model.given)
    )
    has_given = content.given(trained_N).any()
    return EncoderTables(
        spec, content.bucket_K[met], vector_KD[met], given_VD if has_given else 0 * given_VD
    )


def write_release(
    folder: Path,
    model: Recommender,
    tables: Tables,
    *,
    created_at: str,
    history: int,
    snapshot: Snapshot,
    items_offset: Sequence[int] = (),
    signals_offset: int = 0,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    compression: Compression | None = None,
    seed: int = 0,
    blend: FittedBlend | None = None,
    memory: Memory | None = None,
) -> Manifest:
    """Write a complete release into a fresh folder whose name is its id; no check is made here.

    Raises:
        ContractError: a weight is not finite, or ONNX Runtime refuses a graph.
    """
    settings = model.settings
    cell = _exported(settings.cell)
    np.save(folder / STEP_VECTORS_NAME, tables.step_ND)
    np.save(folder / SCAN_VECTORS_NAME, tables.scan_ND)
    bare = [msgspec.structs.replace(row, text="", domain="", vector=None) for row in tables.rows]
    (folder / ITEMS_NAME).write_bytes(msgspec.json.encode(ItemTable(items=bare)))
    if tables.encoder is not None:
        _, bucket_K, vector_KD, given_VD = tables.encoder
        np.savez(folder / ENCODER_NAME, bucket=bucket_K, vector=vector_KD, given=given_VD)
    onnx.save(step_graph(model), str(folder / STEP_NAME))
    onnx.save(query_graph(model), str(folder / QUERY_NAME))
    manifest = Manifest(
        schema=schema_of(settings.state_dtype),
        release=folder.name,
        created_at=created_at,
        cell=cell,
        num_items=len(tables.rows),
        step_dim=settings.dim,
        scan_dim=settings.dim + 1,
        state=[
            StateTensor(name=name, layers=settings.layers, units=settings.units)
            for name in state_names(model)
        ],
        state_dtype=settings.state_dtype,
        inputs=StepInputs(
            event=settings.event_vectors,
            gap=settings.gap_vectors,
            hour=settings.hour_vectors,
            past=settings.past,
        ),
        history=history,
        snapshot=snapshot,
        items_offset=list(items_offset),
        signals_offset=signals_offset,
        metrics={name: dict(values) for name, values in (metrics or {}).items()},
        heads=("click",) if model.buy is None else ("click", "purchase"),
        encoder=None if tables.encoder is None else tables.encoder.spec,
        compression=compression,
        files={},
    )
    files = [*FILES, *([] if tables.encoder is None else [ENCODER_NAME])]
    if blend is not None and memory is not None:
        (folder / BLEND_NAME).write_bytes(graph_of(blend.net))
        memory.save(folder)
        manifest = msgspec.structs.replace(manifest, blend=blend.spec)
        files += [BLEND_NAME, MEMORY_NAME]
    _record_self_test(folder, manifest, tables, blend, np.random.default_rng(seed))
    manifest = msgspec.structs.replace(
        manifest, files={name: sha256_of(folder / name) for name in files}
    )
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return manifest


def check_release(
    folder: Path,
    model: Recommender,
    tables: Tables,
    held: Sequences | None,
    *,
    seed: int = 0,
    blend: FittedBlend | None = None,
) -> list[str]:
    """The gate: refuse a release whose files do not do what the model does.

    Args:
        folder: a complete release.
        model: what it was exported from.
        tables: item tables as they were meant to be written.
        held: real histories, codes are rows of the tables or `UNKNOWN`; None leaves them out.
        seed: of the random histories.
        blend: what `blend.onnx` was exported from.

    Returns:
        Names of the checks that passed.

    Raises:
        ContractError: names the first check that failed, and by how much.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    catalog = Catalog.from_release(folder, manifest)
    # torch does not round: the graphs are compared, not what a record keeps of their states.
    unrounded = msgspec.structs.replace(manifest, state_dtype="fp32")
    engine = Engine(folder, unrounded, provider="cpu", threads=1)
    self_test(folder, engine)
    step_NE = np.load(folder / STEP_VECTORS_NAME, allow_pickle=False)
    scan_ND = np.load(folder / SCAN_VECTORS_NAME, allow_pickle=False)
    _close(folder, "step vectors", step_NE, tables.step_ND, 0)
    _close(folder, "scan vectors", scan_ND, tables.scan_ND, 0)
    scanner = Scanner(catalog.scan_vectors_ND, provider="cpu", threads=1)
    passed = ["files", "catalogue", "self-test", "item vectors"]
    if tables.encoder is not None:
        _compare_encoder(folder, manifest, model, tables)
        passed.append("item encoder")
    rng = np.random.default_rng(seed)
    kinds = {"random": random_histories(rng, len(tables.rows), manifest.history)}
    real = None if held is None else real_histories(held, manifest.history)
    if real is not None:
        kinds["held-out"] = real
    for kind, histories in kinds.items():
        _compare(folder, kind, histories, model, tables, engine, scanner)
        passed.append(f"{kind} histories")
    if blend is not None:
        graph = Blend(folder, manifest)
        self_test(folder, engine, graph)
        found_R = graph.scores(blend.sample_RF)
        _close(folder, "blend", found_R, blend.scorers["blend"].scores(blend.sample_RF), TOLERANCE)
        passed.append("blend")
    return passed


def random_histories(rng: np.random.Generator, num_items: int, history: int) -> Histories:
    """Random items, events and gaps of every length up to `history`."""
    lens_B = rng.integers(1, history + 1, GATE_USERS).astype(np.int32)
    lens_B[:2] = 1, history
    shape = (history, GATE_USERS)
    inside_TB = np.arange(history)[:, None] < lens_B
    return Histories(
        np.where(inside_TB, rng.integers(0, num_items, shape), 0),
        np.where(inside_TB, rng.integers(0, len(EVENTS), shape), 0),
        np.where(inside_TB, rng.integers(0, GAP_BUCKETS, shape), 0),
        np.where(inside_TB, rng.integers(0, HOURS, shape), 0),
        lens_B,
    )


def real_histories(held: Sequences, history: int) -> Histories | None:
    """The last known interactions of the last sequences; None where there are none."""
    known = held.select(held.item_P != UNKNOWN)
    if not known.num_sequences:
        return None
    end_B = known.start_S1[1:][-GATE_USERS:]
    lens_B = np.minimum(known.sizes()[-GATE_USERS:], history)
    step_TB = np.arange(int(lens_B.max()))[:, None]
    inside_TB = step_TB < lens_B
    at_TB = np.where(inside_TB, end_B - lens_B + step_TB, 0)
    item_TB, event_TB, gap_TB, hour_TB = (
        np.where(inside_TB, column[at_TB], 0)
        for column in (known.item_P, known.event_P, known.gap_P, known.hours())
    )
    return Histories(item_TB, event_TB, gap_TB, hour_TB, lens_B.astype(np.int32))


@torch.no_grad()
def torch_states(model: Recommender, tables: Tables, histories: Histories) -> F32:
    """(B, S) states by torch, user by user and so without any padding."""
    settings = model.settings
    model.eval()
    device = model.bias.device
    states = []
    for user, length in enumerate(histories.lens_B.tolist()):
        steps = Steps(
            *(
                torch.from_numpy(column[:length, user : user + 1]).to(device)
                for column in histories[:4]
            )
        )
        x_T1D = torch.from_numpy(tables.step_ND).to(device)[steps.item_TB]
        x_T1D = model.add_context(x_T1D, steps)
        zero = torch.zeros(settings.layers, 1, settings.units, device=device)
        state = model.advance(x_T1D, (zero,) * len(state_names(model)))
        states.append(torch.cat([tensor[:, 0].reshape(-1) for tensor in state]))
    result: F32 = torch.stack(states).cpu().numpy()
    return result


@torch.no_grad()
def torch_queries(
    model: Recommender, state_BS: F32, past: Past | None = None, head: str = "click"
) -> F32:
    """(B, D + 1) queries by torch, the 1 for the bias included."""
    settings = model.settings
    end = settings.layers * settings.units
    h_BH = torch.from_numpy(state_BS[:, end - settings.units : end]).to(model.bias.device)
    attended = None
    if past is not None:
        attended = TorchPast(*(torch.from_numpy(array).to(h_BH.device) for array in past))
    q_BD: F32 = model.query(h_BH, attended, head).cpu().numpy()
    return np.concatenate([q_BD, np.ones((len(q_BD), 1), np.float32)], axis=1)


def _exported(cell: Literal["lstm", "gru", "rnn", "attention"]) -> Literal["lstm", "gru"]:
    if cell in ("lstm", "gru"):
        return cell
    raise ContractError(
        f"export: cell {cell!r} is for comparison: it cannot be stepped click by click with equal "
        "bits; train with lstm or gru",
        reason="export-gate",
    )


def _compare(
    folder: Path,
    kind: str,
    histories: Histories,
    model: Recommender,
    tables: Tables,
    engine: Engine,
    scanner: Scanner,
) -> None:
    where = f"{kind} histories"
    whole_BS = advance_whole(engine, tables.step_ND, histories)
    steps_BS = advance_stepwise(engine, tables.step_ND, histories)
    torch_BS = torch_states(model, tables, histories)
    _close(folder, f"{where}: steps against sequence", steps_BS, whole_BS, TOLERANCE)
    _close(folder, f"{where}: ONNX against torch", whole_BS, torch_BS, TOLERANCE)
    past = past_of_histories(histories, tables.step_ND, model.settings.past)
    for head in reversed(engine.manifest.heads):  # the lists below are the first one's
        query_BD = engine.query(whole_BS, past, head=head)
        torch_BD = torch_queries(model, torch_BS, past, head)
        _close(folder, f"{where}: {head} query against torch", query_BD, torch_BD, TOLERANCE)
    _, rows_BK = scanner.top(query_BD, min(GATE_K, len(tables.rows)))
    score_BN = torch_BD @ tables.scan_ND.T
    # Position by position, torch's score of what the engine lists is torch's own score there: the
    # same list, but for items that torch, too, holds equal.
    listed_BK = np.take_along_axis(score_BN, rows_BK, axis=1)
    best_BK = -np.sort(-score_BN, axis=1)[:, : rows_BK.shape[1]]
    hidden = [row for row, item in enumerate(tables.rows) if not item.available]
    if hidden:  # workers mask them, so torch must, too
        score_BN[:, hidden] = -np.inf
        best_BK = -np.sort(-score_BN, axis=1)[:, : rows_BK.shape[1]]
        listed_BK = np.take_along_axis(score_BN, rows_BK, axis=1)
    finite = np.isfinite(best_BK)
    _close(folder, f"{where}: top-{GATE_K}", listed_BK[finite], best_BK[finite], 2 * TOLERANCE)


@torch.no_grad()
def _compare_encoder(folder: Path, manifest: Manifest, model: Recommender, tables: Tables) -> None:
    """A worker's vectors of items as if they were new, against torch's without their own."""
    encoder = ItemEncoder.from_release(folder, manifest)
    assert encoder is not None
    model.eval()
    item_X = torch.arange(min(GATE_USERS, model.num_items), device=model.bias.device)
    speaks_X = model.speaks_N[item_X].cpu().numpy()
    vectors = model.vectors(model.rows(item_X), own=False)
    scan_XD = torch.cat([vectors.item_XD, vectors.bias_X[:, None]], dim=1).cpu().numpy()
    step_XD = vectors.step_XD.cpu().numpy()
    for row in np.flatnonzero(speaks_X).tolist():
        found = encoder.encode(tables.rows[row])
        where = f"item encoder: {tables.rows[row].item_id[:64]!r}"
        if found is None:
            raise ContractError(
                f"release {folder.name}: export gate, {where} has no vector; not published",
                reason="export-gate",
            )
        _close(folder, where, found.step_D, step_XD[row], TOLERANCE)
        _close(folder, where, found.scan_D1, scan_XD[row], TOLERANCE)


def past_of_histories(histories: Histories, step_ND: F32, length: int) -> Past | None:
    """What the query attends to after these histories; None for a length of 0."""
    if not length:
        return None
    ago_BM = histories.lens_B[:, None] - 1 - np.arange(length)
    users_B1 = np.arange(len(ago_BM))[:, None]
    rows_BM = np.where(ago_BM >= 0, histories.item_TB[np.maximum(ago_BM, 0), users_B1], -1)
    return past_of_rows(rows_BM, step_ND)


def advance_whole(engine: Engine, step_ND: F32, histories: Histories) -> F32:
    """(B, S) states after one call with all steps."""
    return engine.advance(
        engine.zero_state(len(histories.lens_B)),
        step_ND[histories.item_TB],
        histories.lens_B,
        event_TB=histories.event_TB,
        gap_TB=histories.gap_TB,
        hour_TB=histories.hour_TB,
    )


def advance_stepwise(engine: Engine, step_ND: F32, histories: Histories) -> F32:
    """(B, S) states after one call per step, each with the users who still have one."""
    state_BS = engine.zero_state(len(histories.lens_B))
    for step in range(int(histories.lens_B.max())):
        users = np.flatnonzero(histories.lens_B > step)
        state_BS[users] = engine.advance(
            state_BS[users],
            step_ND[histories.item_TB[step : step + 1, users]],
            np.ones(len(users), np.int32),
            event_TB=histories.event_TB[step : step + 1, users],
            gap_TB=histories.gap_TB[step : step + 1, users],
            hour_TB=histories.hour_TB[step : step + 1, users],
        )
    return state_BS


def _close(folder: Path, check: str, found: F32, expected: F32, tolerance: float) -> None:
    if found.shape != expected.shape:
        raise ContractError(
            f"release {folder.name}: export gate, {check}: shape {found.shape}, "
            f"expected {expected.shape}; not published",
            reason="export-gate",
        )
    if not found.size:
        return
    allowed = tolerance * np.maximum(1.0, np.abs(expected).max())
    worst = float(np.abs(found - expected).max())
    if not worst <= allowed:  # a NaN fails, too
        raise ContractError(
            f"release {folder.name}: export gate, {check}: differs by {worst:.2e}, "
            f"at most {allowed:.0e} is allowed; not published",
            reason="export-gate",
        )


def _record_self_test(
    folder: Path,
    manifest: Manifest,
    tables: Tables,
    blend: FittedBlend | None,
    rng: np.random.Generator,
) -> None:
    """Inputs of both graphs and, by the engine itself, `state_next` and the queries."""
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    shape = (SELF_TEST_STEPS, SELF_TEST_USERS)
    lens = (np.arange(SELF_TEST_USERS) % SELF_TEST_STEPS + 1).astype(np.int32)
    inside_TB = np.arange(SELF_TEST_STEPS)[:, None] < lens
    item_TB = rng.integers(0, len(tables.rows), shape)
    state_BS = rng.uniform(-0.5, 0.5, (SELF_TEST_USERS, manifest.state_floats))
    feed: dict[str, Any] = {
        "x": np.where(inside_TB[:, :, None], tables.step_ND[item_TB], np.float32(0)),
        "lens": lens,
        "event": np.where(inside_TB, rng.integers(0, len(EVENTS), shape), 0),
        "gap": np.where(inside_TB, rng.integers(0, GAP_BUCKETS, shape), 0),
        "hour": np.where(inside_TB, rng.integers(0, HOURS, shape), 0),
        "state": state_BS.astype(np.float32),
    }
    if length := manifest.inputs.past:
        rows_BM = rng.integers(0, len(tables.rows), (SELF_TEST_USERS, length))
        rows_BM[np.arange(length) >= np.arange(SELF_TEST_USERS)[:, None]] = -1
        past = past_of_rows(rows_BM, tables.step_ND)
        feed |= {"past": past.x_BME, "has_past": past.has_BM}
    if blend is not None:
        feed["blend_features"] = blend.sample_RF
    found: dict[str, Any] = {
        **replayed(feed, engine, Blend(folder, manifest) if blend is not None else None)
    }
    if not all(np.isfinite(found[output_of(head)]).all() for head in manifest.heads):
        raise ContractError(
            f"release {folder.name}: the query graph gives non-finite numbers", reason="non-finite"
        )
    np.savez(folder / SELF_TEST_NAME, **feed, **found)
