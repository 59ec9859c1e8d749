"""A small release with random weights, made by script: what tests fold with when no training is
needed.

Weights are large enough that states and lists move visibly with every click.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from afterclick.serving.blend import Blend
from afterclick.serving.engine import Engine
from afterclick.serving.features import FEATURES, PUBLICATION_FEATURES
from afterclick.serving.manifest import (
    BLEND_NAME,
    ENCODER_NAME,
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
    BlendSpec,
    EncoderSpec,
    ItemRow,
    ItemTable,
    Manifest,
    Snapshot,
    StateTensor,
    StepInputs,
    schema_of,
    sha256_of,
)
from afterclick.serving.memory import memory_of
from afterclick.serving.text import TEXT_VERSION, bucket, features
from afterclick.training.blend_graph import blend_graph

ENCODER_BUCKETS = 1 << 12


_BLENDED = [name for name in FEATURES if name not in PUBLICATION_FEATURES]
"""These items say nothing of their publication."""


def write_tiny_release(
    folder: Path,
    *,
    num_items: int = 300,
    units: int = 16,
    seed: int = 0,
    categories: int = 5,
    items: list[ItemRow] | None = None,
    blend: bool = False,
    blend_log: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    encoder: bool = False,
    state_dtype: Literal["fp32", "fp16"] = "fp32",
) -> Manifest:
    """Write a complete release into `folder`, whose name is its id.

    With a `blend_log`, starts of sequences, codes and times, the blend is as large as the trainer's
    and knows these clicks.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if items is None:
        items = [
            ItemRow(item_id=f"i{n:05d}", title=f"Item {n}", categories=[f"c{n % categories}"])
            for n in range(num_items)
        ]
    vectors = rng.standard_normal((len(items), units)).astype(np.float32)
    bias = rng.standard_normal((len(items), 1)).astype(np.float32) * np.float32(0.1)
    np.save(folder / STEP_VECTORS_NAME, vectors)
    np.save(folder / SCAN_VECTORS_NAME, np.concatenate([vectors, bias], axis=1))
    (folder / ITEMS_NAME).write_bytes(msgspec.json.encode(ItemTable(items=items)))
    onnx.save(_step_graph(rng, units), folder / STEP_NAME)
    onnx.save(_query_graph(units), folder / QUERY_NAME)
    manifest = Manifest(
        schema=schema_of(state_dtype),
        release=folder.name,
        created_at="2026-01-01T00:00:00Z",
        cell="lstm",
        num_items=len(items),
        step_dim=units,
        scan_dim=units + 1,
        state=[StateTensor(name=name, layers=1, units=units) for name in ("h", "c")],
        state_dtype=state_dtype,
        inputs=StepInputs(gap=True),
        history=50,
        snapshot=Snapshot(source="random"),
        files={},
    )
    files: tuple[str, ...] = FILES
    if blend:
        manifest = msgspec.structs.replace(manifest, blend=BlendSpec(features=_BLENDED))
        _write_blend(folder, [item.item_id for item in items], rng, blend_log)
        files += (BLEND_NAME, MEMORY_NAME)
    if encoder:
        spec = _write_encoder(folder, items, rng, units)
        manifest = msgspec.structs.replace(manifest, encoder=spec)
        files += (ENCODER_NAME,)
    _write_self_test(folder, manifest, rng)
    manifest = msgspec.structs.replace(
        manifest, files={name: sha256_of(folder / name) for name in files}
    )
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
    return manifest


def _write_encoder(
    folder: Path, items: list[ItemRow], rng: np.random.Generator, units: int
) -> EncoderSpec:
    """Knows every word and category of the items; not normalised, as their vectors are not."""
    names = {name for item in items for field in features(item) for name in field}
    number_K = np.array(sorted({bucket(name, ENCODER_BUCKETS) for name in names}), np.int64)
    vector_KD = rng.standard_normal((len(number_K), units)).astype(np.float32)
    np.savez(
        folder / ENCODER_NAME,
        bucket=number_K,
        vector=vector_KD,
        given=np.zeros((0, units), np.float32),
    )
    return EncoderSpec(text_version=TEXT_VERSION, num_buckets=ENCODER_BUCKETS)


def digest_of(folder: Path) -> str:
    """sha256 of a release's manifest, as a publication names it."""
    return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()


def _write_self_test(folder: Path, manifest: Manifest, rng: np.random.Generator) -> None:
    engine = Engine(folder, manifest, provider="cpu", threads=1)
    num_users, steps = 4, 3
    feed = {
        "x": rng.standard_normal((steps, num_users, manifest.step_dim)).astype(np.float32),
        "lens": np.array([1, 2, 3, 3], np.int32),
        "gap": rng.integers(0, GAP_BUCKETS, (steps, num_users)),
        "state": rng.standard_normal((num_users, manifest.state_floats)).astype(np.float32) * 0.1,
    }
    feed["state"] = feed["state"].astype(np.float32)
    after = engine.run_steps(feed["state"], feed["x"], feed["lens"], gap_TB=feed["gap"])
    if manifest.blend is not None:
        feed["blend_features"] = rng.standard_normal((8, len(FEATURES))).astype(np.float32)
        feed["blend_score"] = Blend(folder, manifest).scores(feed["blend_features"])
    np.savez(folder / SELF_TEST_NAME, **feed, state_next=after, query=engine.query(after))


def _write_blend(
    folder: Path,
    ids: list[str],
    rng: np.random.Generator,
    log: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
) -> None:
    """Random weights, and the memory of a log: if none, a thousand random moves of twenty users."""
    width = len(_BLENDED)
    units = (8, 1) if log is None else (64, 32, 1)
    layers = [
        (rng.standard_normal(shape).astype(np.float32), np.zeros(shape[1], np.float32))
        for shape in itertools.pairwise((width, *units))
    ]
    graph = blend_graph(np.zeros(width, np.float32), np.full(width, 0.3, np.float32), layers)
    onnx.save(graph, folder / BLEND_NAME)
    if log is not None:
        memory_of(ids, *log, per_item=256).save(folder)
        return
    start_S1 = np.arange(0, 1001, 50)
    time_P = rng.integers(1, 1 << 40, 1000)
    memory_of(ids, start_S1, rng.integers(0, len(ids), 1000), time_P, per_item=50).save(folder)


def _step_graph(rng: np.random.Generator, units: int) -> onnx.ModelProto:
    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape).astype(np.float32) * np.float32(1.5 / units**0.5)

    weights = [
        numpy_helper.from_array(uniform(1, 4 * units, units), "W"),
        numpy_helper.from_array(uniform(1, 4 * units, units), "R"),
        numpy_helper.from_array(uniform(1, 8 * units), "B"),
        numpy_helper.from_array(uniform(GAP_BUCKETS, units), "gap_vectors"),
    ]
    nodes = [
        helper.make_node("Gather", ["gap_vectors", "gap"], ["gap_x"]),
        helper.make_node("Add", ["x", "gap_x"], ["x_in"]),
        helper.make_node(
            "LSTM",
            ["x_in", "W", "R", "B", "lens", "h", "c"],
            ["", "h_next", "c_next"],
            hidden_size=units,
        ),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "step",
        [
            info("x", TensorProto.FLOAT, ["T", "B", units]),
            info("gap", TensorProto.INT64, ["T", "B"]),
            info("lens", TensorProto.INT32, ["B"]),
            info("h", TensorProto.FLOAT, [1, "B", units]),
            info("c", TensorProto.FLOAT, [1, "B", units]),
        ],
        [
            info("h_next", TensorProto.FLOAT, [1, "B", units]),
            info("c_next", TensorProto.FLOAT, [1, "B", units]),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _query_graph(units: int) -> onnx.ModelProto:
    """query = [h, 1]; `c` is named so that both graphs take the same state, and adds exactly 0."""
    weights = [
        numpy_helper.from_array(np.zeros((1,), np.float32), "zero"),
        numpy_helper.from_array(np.ones((1,), np.float32), "one"),
        numpy_helper.from_array(np.array([0], np.int64), "axis"),
        numpy_helper.from_array(np.array([1], np.int64), "last"),
        numpy_helper.from_array(np.array([0], np.int64), "start"),
        numpy_helper.from_array(np.array([1], np.int64), "stop"),
    ]
    nodes = [
        helper.make_node("Squeeze", ["h", "axis"], ["h_BH"]),
        helper.make_node("Squeeze", ["c", "axis"], ["c_BH"]),
        helper.make_node("Slice", ["c_BH", "start", "stop", "last"], ["c_B1"]),
        helper.make_node("Mul", ["c_B1", "zero"], ["zero_B1"]),
        helper.make_node("Add", ["zero_B1", "one"], ["one_B1"]),
        helper.make_node("Concat", ["h_BH", "one_B1"], ["query"], axis=1),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "query",
        [
            info("h", TensorProto.FLOAT, [1, "B", units]),
            info("c", TensorProto.FLOAT, [1, "B", units]),
        ],
        [info("query", TensorProto.FLOAT, ["B", units + 1])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
