"""What nothing on this machine can beat: the engine alone, and the bare matrix product.

No Kafka, no Redis, no JSON. Each is tried in the layouts that a worker could use, and the fastest
one counts: a ceiling that somebody can walk through is none.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.ground import Ground

BATCH_USERS = 256
"""Users of one call, as the worker's chunks have."""
LAYOUTS = ((1, 0), (2, 1))
"""(callers at a time, threads of a call; 0 is one per core)."""


class Ceiling(NamedTuple):
    """The best layout's rate."""

    clicks_per_s: float
    layout: str


def engine_alone(stage: Ground) -> Ceiling:
    """Step, query and scan of the best K + margin, one click a user, 256 users a call."""
    best = Ceiling(0.0, "")
    want = stage.serving.k + stage.serving.margin + 1
    for callers, threads in LAYOUTS:
        release = stage.load(threads=threads)

        def make(seed: int, release: object = release) -> Callable[[], None]:
            rng = np.random.default_rng(seed)
            engine, scanner = release.engine, release.scanner
            vectors_NE = release.catalog.step_vectors_NE
            rows_1B = rng.integers(0, stage.options.items, (1, BATCH_USERS))
            gap_1B = rng.integers(0, 20, (1, BATCH_USERS))
            lens_B = np.ones(BATCH_USERS, np.int32)
            state = [engine.zero_state(BATCH_USERS)]

            def batch() -> None:
                state[0] = engine.advance(
                    state[0], vectors_NE[rows_1B], lens_B, event_TB=gap_1B, gap_TB=gap_1B
                )
                scanner.top(engine.query(state[0]), want)

            return batch

        rate = BATCH_USERS * _calls_per_s(make, callers, stage.options.ceiling_seconds)
        best = max(best, Ceiling(rate, f"{callers} caller(s), threads={threads}"))
    return best


def matmul_alone(stage: Ground) -> Ceiling:
    """(256, D) × (D, N) in ONNX Runtime into memory that is there already; no TopK."""
    dim = stage.options.units + 1
    rng = np.random.default_rng(stage.options.seed)
    items_DN = rng.standard_normal((dim, stage.options.items)).astype(np.float32)
    best = Ceiling(0.0, "")
    for callers, threads in LAYOUTS:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(
            _matmul_graph(items_DN), options, providers=["CPUExecutionProvider"]
        )

        def make(seed: int, session: ort.InferenceSession = session) -> Callable[[], None]:
            q_BD = np.random.default_rng(seed).standard_normal((BATCH_USERS, dim))
            out_BN = np.empty((BATCH_USERS, stage.options.items), np.float32)
            binding = session.io_binding()
            q = ort.OrtValue.ortvalue_from_numpy(q_BD.astype(np.float32))
            binding.bind_ortvalue_input("q", q)
            binding.bind_output("scores", "cpu", 0, np.float32, out_BN.shape, out_BN.ctypes.data)

            def batch() -> None:
                assert out_BN is not None, "the binding writes into it, so it must outlive it"
                assert q is not None, "likewise"
                session.run_with_iobinding(binding)

            return batch

        rate = BATCH_USERS * _calls_per_s(make, callers, stage.options.ceiling_seconds)
        best = max(best, Ceiling(rate, f"{callers} caller(s), threads={threads}"))
    return best


def _matmul_graph(items_DN: np.ndarray) -> bytes:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["q", "items"], ["scores"])],
        "matmul",
        [info("q", TensorProto.FLOAT, ["B", items_DN.shape[0]])],
        [info("scores", TensorProto.FLOAT, ["B", items_DN.shape[1]])],
        [numpy_helper.from_array(items_DN, "items")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _calls_per_s(make: Callable[[int], Callable[[], None]], callers: int, seconds: float) -> float:
    """Calls a second of so many callers together, after a warm-up of a fifth of the time."""
    calls = [make(seed) for seed in range(callers)]
    counts = [0] * callers
    counting, stop = threading.Event(), threading.Event()

    def caller(at: int) -> None:
        while not stop.is_set():
            calls[at]()
            counts[at] += counting.is_set()

    threads = [threading.Thread(target=caller, args=(at,)) for at in range(callers)]
    for thread in threads:
        thread.start()
    stop.wait(seconds / 5)
    counting.set()
    begun_s = time.perf_counter()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun_s)
