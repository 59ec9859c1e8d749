"""ONNX Runtime: advance states, read queries out, scan the catalogue.

Knows no Redis, Kafka, HTTP, nor what an item id is. Shape letters: T steps, B users, S floats of
state in a
record, E step vector, D scan vector, N rows of the item matrix, K results.

What keeps bits equal whatever the batch (measured, see docs/decisions/0002-bit-exactness.md):
constant
weights in the step and query graphs, no user with zero steps in a call, no empty call, and never
fewer
than two rows in a scan, whose item matrix is a constant as far as the release brought it; rows that
changed since are an input (`packed.py`).
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import ctypes
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from afterclick.serving.best import best_rows
from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import QUERY_NAME, STEP_NAME, Manifest
from afterclick.serving.packed import BYTES_MAX, Followed, packed_graph
from afterclick.serving.together import Together

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Provider = Literal["cpu", "cuda"]

MASKED = np.float32(-1e30)
"""Score of a row that must never be listed; finite, because non-finite values spread."""

SHARED_USERS_MAX = 32
"""Smaller scans that are asked for at the same time, by chunks of several partitions, become one.
"""

log = logging.getLogger(__name__)


@lru_cache(maxsize=3)
def choose_provider(wanted: str) -> Provider:
    """Decide where graphs run and say so.

    Args:
        wanted: `cpu`, `cuda`, or `auto` for CUDA where it works and the CPU elsewhere.

    Raises:
        ConfigError: `cuda` was asked for and a session on it does not start.
    """
    if wanted == "cpu":
        return "cpu"
    reason = _why_no_cuda()
    if reason is None:
        log.info("engine: running on CUDA")
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(
            f"provider: asked for 'cuda', but {reason}; "
            "install 'afterclick[gpu]' on a machine with an NVIDIA GPU, or set provider to 'cpu'"
        )
    log.info("engine: running on the CPU (%s)", reason)
    return "cpu"


class Past(NamedTuple):
    """What B users touched last, newest first, padded to the manifest's M: always the same shape,
    so that a user's bits do not depend on how long somebody else's past is.
    """

    x_BME: F32
    """Step vectors, zeros where there is none."""
    has_BM: F32
    """1 where there is one, else 0."""


class Engine:
    """The two graphs of one release; safe to call from several threads."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, provider: str = "auto", threads: int = 0
    ) -> None:
        self.manifest = manifest
        self._kept = np.float16 if manifest.state_dtype == "fp16" else np.float32
        self.provider = choose_provider(provider)
        self._step = session_of(folder / STEP_NAME, self.provider, threads, unpack=True)
        self._query = session_of(folder / QUERY_NAME, self.provider, threads)
        state_names = {tensor.name for tensor in manifest.state}
        _check_names(folder.name, STEP_NAME, self._step, state_names | _step_names(manifest))
        past = {"past", "has_past"} if manifest.inputs.past else set()
        _check_names(folder.name, QUERY_NAME, self._query, state_names | past)
        outputs = {tensor.name for tensor in self._query.get_outputs()}
        if missing := {output_of(head) for head in manifest.heads} - outputs:
            raise ContractError(
                f"release {folder.name}: {QUERY_NAME} has no output {sorted(missing)}",
                reason="graph",
            )

    def zero_state(self, num_users: int) -> F32:
        """(B, S) zeros: the state of a user without a step."""
        return np.zeros((num_users, self.manifest.state_floats), np.float32)

    def unpacked(self, states: Sequence[bytes]) -> F32:
        """(B, S) states of some records; an empty one is the zero state."""
        zero = bytes(self.manifest.state_bytes)
        joined = np.frombuffer(b"".join(state or zero for state in states), self._kept)
        return joined.reshape(len(states), -1).astype(np.float32, copy=False)

    def packed(self, state_BS: F32) -> list[bytes]:
        """What records hold of these states: exactly them, as `advance` has rounded them."""
        return [state_S.tobytes() for state_S in state_BS.astype(self._kept, copy=False)]

    def advance(
        self,
        state_BS: F32,
        x_TBE: F32,
        lens_B: I32,
        *,
        event_TB: I64 | None = None,
        gap_TB: I64 | None = None,
        hour_TB: I64 | None = None,
    ) -> F32:
        """Advance every user by `lens_B` steps, and round as the release says after each of them:
        so it does not matter whether a state was in a record or in memory in between.

        Arguments and result are those of `run_steps`.
        """
        if self.manifest.state_dtype == "fp32":
            return self.run_steps(
                state_BS, x_TBE, lens_B, event_TB=event_TB, gap_TB=gap_TB, hour_TB=hour_TB
            )
        state_BS = state_BS.copy()
        for step in range(int(lens_B.max())):
            user_B = np.flatnonzero(lens_B > step)
            event_1B, gap_1B, hour_1B = (
                None if codes_TB is None else codes_TB[step : step + 1, user_B]
                for codes_TB in (event_TB, gap_TB, hour_TB)
            )
            after_BS = self.run_steps(
                state_BS[user_B],
                x_TBE[step : step + 1, user_B],
                np.ones(len(user_B), np.int32),
                event_TB=event_1B,
                gap_TB=gap_1B,
                hour_TB=hour_1B,
            )
            state_BS[user_B] = after_BS.astype(self._kept)
        return state_BS

    def run_steps(
        self,
        state_BS: F32,
        x_TBE: F32,
        lens_B: I32,
        *,
        event_TB: I64 | None = None,
        gap_TB: I64 | None = None,
        hour_TB: I64 | None = None,
    ) -> F32:
        """What the step graph gives for `lens_B` steps of every user in one call, not rounded.

        Args:
            state_BS: states before, as records hold them.
            x_TBE: step vectors, rows beyond a user's length are ignored.
            lens_B: steps of each user, every one ≥ 1.
            event_TB: event codes; needed where the manifest says so.
            gap_TB: gap buckets; likewise.
            hour_TB: hours of day; likewise.

        Returns:
            (B, S) states after, a new array.

        Raises:
            ContractError: the graph gave a non-finite state.
        """
        assert len(lens_B) > 0, "an empty call aborts ONNX Runtime"
        assert int(lens_B.min()) > 0, "sequence_lens 0 returns zeros"
        feed: dict[str, Any] = {"x": x_TBE, "lens": lens_B, **self._split(state_BS)}
        if self.manifest.inputs.event:
            feed["event"] = event_TB
        if self.manifest.inputs.gap:
            feed["gap"] = gap_TB
        if self.manifest.inputs.hour:
            feed["hour"] = hour_TB
        names = [f"{tensor.name}_next" for tensor in self.manifest.state]
        parts = self._step.run(names, feed)
        state = np.concatenate(
            [part.transpose(1, 0, 2).reshape(len(lens_B), -1) for part in parts], axis=1
        )
        if not np.isfinite(state).all():
            raise ContractError(
                f"release {self.manifest.release}: step.onnx gave a non-finite state",
                reason="non-finite",
            )
        return state

    def query(self, state_BS: F32, past: Past | None = None, *, head: str = "click") -> F32:
        """(B, D) queries of states; a user's score for item n is `query · scan_vectors[n]`.

        Args:
            state_BS: states as records hold them.
            past: what the same users touched last; needed where the manifest says so.
            head: one of the manifest's.
        """
        assert len(state_BS) > 0, "an empty call aborts ONNX Runtime"
        assert (past is not None) == (self.manifest.inputs.past > 0), "the graph takes it or not"
        query: F32 = self._query.run([output_of(head)], self.query_feed(state_BS, past))[0]
        return query

    def query_feed(self, state_BS: F32, past: Past | None = None) -> dict[str, Any]:
        """What the query graph is given for these states, by input name."""
        feed: dict[str, Any] = dict(self._split(state_BS))
        if past is not None:
            feed |= {"past": past.x_BME, "has_past": past.has_BM}
        return feed

    def _split(self, state_BS: F32) -> dict[str, F32]:
        parts: dict[str, F32] = {}
        start = 0
        for tensor in self.manifest.state:
            stop = start + tensor.layers * tensor.units
            part = state_BS[:, start:stop].reshape(-1, tensor.layers, tensor.units)
            parts[tensor.name] = np.ascontiguousarray(part.transpose(1, 0, 2))
            start = stop
        return parts


def output_of(head: str) -> str:
    """Name of a head's output in the query graph."""
    return "query" if head == "click" else f"query_{head}"


class Look(NamedTuple):
    """The best rows of some users, and a way to the score of any other row."""

    score_BK: F32
    row_BK: I64
    of: Callable[[I64, I64], F32]
    """Scores of pairs of user and row; no longer once this thread has asked for another scan."""

    def part(self, begin: int, end: int) -> "Look":
        """Some of the users, counted from 0."""
        return Look(
            self.score_BK[begin:end],
            self.row_BK[begin:end],
            lambda user_R, row_R: self.of(user_R + begin, row_R),
        )


class Scanner:
    """Exact top-K over an item matrix that its owner may change between calls.

    On CUDA the matrix stays on the device and is sent again after `changed()`; on the CPU it is
    shared with its owner, not copied.
    """

    def __init__(
        self,
        scan_vectors_ND: F32,
        *,
        provider: str = "auto",
        threads: int = 0,
        precision: str = "fp32",
        packed: bool = True,
    ) -> None:
        """Over this matrix; `packed` takes its size in memory once more, on the CPU."""
        self.provider = choose_provider(provider)
        if precision == "fp16" and self.provider != "cuda":
            raise ConfigError(
                "precision: 'fp16' scans only on 'cuda', and this engine runs on the CPU; "
                "set precision to 'fp32'"
            )
        self._half = precision == "fp16"
        graph = _scan_graph(
            scan_vectors_ND.shape[1], half=self._half, with_top=self.provider == "cuda"
        )
        self._session = session_of(graph, self.provider, threads)
        self._matrix = scan_vectors_ND
        self._bound: ort.OrtValue | None = None
        self._together = Together(self._top_of_all)
        self._packed: ort.InferenceSession | None = None
        self._followed: Followed | None = None
        if packed and self.provider == "cpu" and 0 < scan_vectors_ND.nbytes <= BYTES_MAX:
            self._packed = session_of(packed_graph(scan_vectors_ND), "cpu", threads)
            self._followed = Followed(scan_vectors_ND)
        self._is_packed = self._packed is not None
        self._changed: ort.OrtValue | None = None

    @property
    def num_rows(self) -> int:
        """N, rows that are masked or spare included."""
        return len(self._matrix)

    def changed(self, scan_vectors_ND: F32) -> None:
        """Take a matrix whose rows changed, or a larger one."""
        self._matrix = scan_vectors_ND
        self._bound = None
        if self._followed is not None:
            self._is_packed = self._followed.follow(scan_vectors_ND)
            changed_RD = self._followed.changed_RD
            self._changed = (
                ort.OrtValue.ortvalue_from_numpy(changed_RD) if len(changed_RD) else None
            )

    def top(self, q_BD: F32, k: int) -> tuple[F32, I64]:
        """Best rows of every user, best first, equal scores by row number.

        Args:
            q_BD: queries, at least one.
            k: rows wanted; more than N is cut to N.

        Returns:
            scores (B, K) and rows (B, K); masked and spare rows come last, scored ≤ `MASKED` / 2.
        """
        k = min(k, self.num_rows)
        if len(q_BD) >= SHARED_USERS_MAX:
            return self._top(q_BD, k)
        return self._together.ask((q_BD, k))

    def _top_of_all(self, asked: Sequence[tuple[F32, int]]) -> list[tuple[F32, I64]]:
        """One scan for everybody who asks by now: reading the matrix is what a small scan costs."""
        q_BD = np.concatenate([own_BD for own_BD, _ in asked])
        scores_BK, rows_BK = self._top(q_BD, max(k for _, k in asked))
        ends = np.cumsum([len(own_BD) for own_BD, _ in asked]).tolist()
        return [
            (scores_BK[end - len(own_BD) : end, :k], rows_BK[end - len(own_BD) : end, :k])
            for (own_BD, k), end in zip(asked, ends, strict=True)
        ]

    def look(self, q_BD: F32, k: int) -> Look:
        """`top`, and beside it the scores of whatever rows are named then."""
        k = min(k, self.num_rows)
        if self.provider == "cuda":
            score_BK, row_BK, score_BN = self._run(q_BD, ["top_scores", "top_rows", "scores"], k)
        else:
            score_BN = self._scores_here(q_BD)
            score_BK, row_BK = best_rows(score_BN, k)
        flat, num_rows = score_BN.ravel(), score_BN.shape[1]
        return Look(score_BK, row_BK, lambda user_R, row_R: flat.take(user_R * num_rows + row_R))

    def scores(self, q_BD: F32) -> F32:
        """(B, N) all scores, for the rare user whose ties reach past the fetched rows."""
        if self.provider == "cpu":
            return self._scores_here(q_BD).copy()
        scores: F32 = self._run(q_BD, ["scores"], 1)[0]
        return scores

    def _top(self, q_BD: F32, k: int) -> tuple[F32, I64]:
        if self.provider == "cpu":
            return best_rows(self._scores_here(q_BD), k)
        scores_BK, rows_BK = self._run(q_BD, ["top_scores", "top_rows"], k)
        return scores_BK, rows_BK

    def _scores_here(self, q_BD: F32) -> F32:
        """(B, N) all scores, in memory that this thread's next scan takes again."""
        assert len(q_BD) > 0, "an empty call aborts ONNX Runtime"
        if len(q_BD) == 1:  # one row takes another kernel, whose bits differ
            return self._scores_here(np.concatenate([q_BD, q_BD]))[:1]
        q_BD = np.ascontiguousarray(q_BD)
        score_BN = _scratch((len(q_BD), self.num_rows))
        if not self._is_packed or self._packed is None or self._followed is None:
            _multiply(self._session, q_BD, score_BN, self._on_device())
            return score_BN
        _multiply(self._packed, q_BD, score_BN)
        if self._changed is not None:
            row_R = self._followed.row_R
            changed_BR = np.empty((len(q_BD), self._changed.shape()[0]), np.float32)
            _multiply(self._session, q_BD, changed_BR, self._changed)
            score_BN[:, row_R] = changed_BR[:, : len(row_R)]
        return score_BN

    def _run(self, q_BD: F32, outputs: list[str], k: int) -> list[Any]:
        assert len(q_BD) > 0, "an empty call aborts ONNX Runtime"
        num_users = len(q_BD)
        if num_users == 1:  # one row takes another kernel, whose bits differ
            q_BD = np.concatenate([q_BD, q_BD])
        binding = self._session.io_binding()
        binding.bind_cpu_input("q", np.ascontiguousarray(q_BD))
        binding.bind_ortvalue_input("items", self._on_device())
        binding.bind_cpu_input("k", np.array([k], np.int64))
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return [array[:num_users] for array in binding.copy_outputs_to_cpu()]

    def _on_device(self) -> ort.OrtValue:
        bound = self._bound
        if bound is None:
            matrix = self._matrix.astype(np.float16) if self._half else self._matrix
            bound = ort.OrtValue.ortvalue_from_numpy(matrix, self.provider, 0)
            self._bound = bound
        return bound


def _multiply(
    session: ort.InferenceSession, q_BD: F32, score_BN: F32, items: ort.OrtValue | None = None
) -> None:
    """Write the scores where they are wanted."""
    binding = session.io_binding()
    binding.bind_cpu_input("q", q_BD)
    if items is not None:
        binding.bind_ortvalue_input("items", items)
    binding.bind_output("scores", "cpu", 0, np.float32, score_BN.shape, score_BN.ctypes.data)
    session.run_with_iobinding(binding)


_SCRATCH_MAX = 1 << 24
"""Scores that a thread keeps memory for: 64 MiB; the fold asks for no more at once."""

_LOCAL = threading.local()


def _scratch(shape: tuple[int, int]) -> F32:
    """This thread's own, with anything in it: fresh memory costs as much as reading it."""
    size = shape[0] * shape[1]
    if size > _SCRATCH_MAX:
        return np.empty(shape, np.float32)
    scratch: F32 | None = getattr(_LOCAL, "scores", None)
    if scratch is None or len(scratch) < size:
        scratch = _LOCAL.scores = np.empty(size, np.float32)
    return scratch[:size].reshape(shape)


def _scan_graph(dim: int, *, half: bool, with_top: bool) -> bytes:
    """One Gemm, and a TopK where it runs on the device that has the scores.

    The matrix is (N, D), so that adding an item writes one row.
    """
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Gemm", ["q", "items"], ["scores"], transB=1)]
    if half:
        nodes = [
            helper.make_node("Cast", ["q"], ["q_cast"], to=kind),
            helper.make_node("Gemm", ["q_cast", "items"], ["raw"], transB=1),
            helper.make_node("Cast", ["raw"], ["scores"], to=TensorProto.FLOAT),
        ]
    inputs = [info("q", TensorProto.FLOAT, ["B", dim]), info("items", kind, ["N", dim])]
    outputs = [info("scores", TensorProto.FLOAT, ["B", "N"])]
    if with_top:
        nodes.append(helper.make_node("TopK", ["scores", "k"], ["top_scores", "top_rows"]))
        inputs.append(info("k", TensorProto.INT64, [1]))
        outputs += [
            info("top_scores", TensorProto.FLOAT, ["B", "K"]),
            info("top_rows", TensorProto.INT64, ["B", "K"]),
        ]
    graph = helper.make_graph(nodes, "scan", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def session_of(
    model: Path | bytes, provider: Provider, threads: int, *, unpack: bool = False
) -> ort.InferenceSession:
    """A graph, ready to run.

    Args:
        model: a file, or its bytes.
        provider: where it runs.
        threads: of one run; 0 means one per core.
        unpack: int8 weights become float32 once, at load, not at every call.

    Raises:
        ContractError: it is refused, or keeps tensors in another file.
    """
    options = ort.SessionOptions()
    if unpack:
        # Else an LSTM whose weights are int8 unpacks them per call: 108 µs instead of 43 for a
        # step, and other bits for another batch (measured; docs/decisions/0002-bit-exactness.md).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Spinning threads take the cores that Redis, Kafka and decoding need: 8.4k -> 10.6k clicks/s
    # (faust.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    where = "the scan graph" if isinstance(model, bytes) else f"{model.parent.name}/{model.name}"
    try:
        if isinstance(model, Path):
            _check_self_contained(model)
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[provider_of(provider)],
        )
    except Exception as error:  # onnxruntime raises its own unrelated exception types
        raise ContractError(f"{where}: the graph is refused: {error}", reason="graph") from error


def provider_of(provider: Provider) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's name of a provider, and its options."""
    if provider == "cuda":
        # Off, or products lose 13 bits of 24, and a GPU's lists are not those of a CPU.
        return "CUDAExecutionProvider", {"use_tf32": "0"}
    return "CPUExecutionProvider", {}


def _check_self_contained(model: Path) -> None:
    """Weights in another file have no checksum in the manifest, and may lie outside the release."""
    graph = onnx.load(model, load_external_data=False)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in _tensors(graph)):
        raise ValueError("it keeps tensors in another file, expected them inside")


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a graph, its subgraphs and functions."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _why_no_cuda() -> str | None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    try:
        ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return "this machine has no NVIDIA driver"
    preload: Callable[[], None] | None = getattr(ort, "preload_dlls", None)
    if preload is not None:
        preload()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            _scan_graph(2, half=False, with_top=True), options, providers=[provider_of("cuda")]
        )
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's own kinds
        return f"a session on it failed: {error}"
    if "CUDAExecutionProvider" not in session.get_providers():
        return "its libraries do not load (CUDA 13, cuDNN 9)"
    return None


def _step_names(manifest: Manifest) -> set[str]:
    names = {"x", "lens"}
    if manifest.inputs.event:
        names.add("event")
    if manifest.inputs.gap:
        names.add("gap")
    if manifest.inputs.hour:
        names.add("hour")
    return names


def _check_names(
    release: str, file: str, session: ort.InferenceSession, expected: set[str]
) -> None:
    found = {tensor.name for tensor in session.get_inputs()}
    if found != expected:
        raise ContractError(
            f"release {release}: {file} takes inputs {sorted(found)}, "
            f"the manifest says {sorted(expected)}",
            reason="graph",
        )
