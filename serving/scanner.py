"""The best items of a user: queries against the rows of the item matrix.

On the CPU a product in 8 bits leaves few rows (`bounds.py`), which are scored one by one
(`dots.py`); on CUDA ONNX Runtime multiplies with all rows and sorts where the scores are. Either
way a user's answer depends on the query and on the rows as they are now, on nothing else. Knows no
item id. Shape letters as in `engine.py`.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from afterclick.serving.best import best_of_groups, best_rows
from afterclick.serving.bounds import Bounds
from afterclick.serving.dots import all_scores, scores_of
from afterclick.serving.errors import ConfigError
from afterclick.serving.sessions import choose_provider, graph_of, session_of
from afterclick.serving.together import Together

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

MASKED = np.float32(-1e30)
"""Score of a row that must never be listed; finite, because non-finite values spread."""

SHARED_USERS_MAX = 32
"""Smaller scans that are asked for at the same time, by chunks of several partitions, become one.
"""


USERS_MAX = 256
"""Users scored in one call: more gain nothing."""

SCORES_MAX = 16 << 20
"""Scores of one call that keeps them all, 64 MB: 256 users at 65,000 items, 16 at a million."""


class Look(NamedTuple):
    """The best rows of some users, and a way to the score of any other row."""

    score_BK: F32
    row_BK: I64
    of: Callable[[I64, I64], F32]
    """Scores of pairs of user and row."""

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

    Args:
        scan_vectors_ND: the matrix, C-contiguous and finite.
        provider: `cpu`, `cuda` or `auto`.
        threads: of a call of ONNX Runtime; a scan on the CPU takes one.
        precision: `fp16` halves the matrix on CUDA.
        bounded: keep it in 8 bits beside, on the CPU; without, every row is scored.
    """

    def __init__(
        self,
        scan_vectors_ND: F32,
        *,
        provider: str = "auto",
        threads: int = 0,
        precision: str = "fp32",
        bounded: bool = True,
    ) -> None:
        self.provider = choose_provider(provider)
        if precision == "fp16" and self.provider != "cuda":
            raise ConfigError(
                "precision: 'fp16' scans only on 'cuda', and this engine runs on the CPU; "
                "set precision to 'fp32'"
            )
        self._half = precision == "fp16"
        self._matrix = scan_vectors_ND
        self._together = Together(_tops)  # not a method of self: nothing may wait for the collector
        self._session: ort.InferenceSession | None = None
        self._bound: ort.OrtValue | None = None
        self._bounds: Bounds | None = None
        if self.provider == "cuda":
            graph = scan_graph(scan_vectors_ND.shape[1], half=self._half)
            self._session = session_of(graph, self.provider, threads)
        elif bounded:
            self._bounds = Bounds(scan_vectors_ND)

    @property
    def num_rows(self) -> int:
        """N, rows that are masked or spare included."""
        return len(self._matrix)

    @property
    def users_max(self) -> int:
        """Users that one call should be asked for at most."""
        if self._bounds is not None:
            return USERS_MAX
        return max(2, min(USERS_MAX, SCORES_MAX // self.num_rows))

    def changed(self, scan_vectors_ND: F32, rows: Iterable[int]) -> None:
        """Take a matrix with at least as many rows, of which these differ from before; new ones
        need not be named.
        """
        self._matrix = scan_vectors_ND
        self._bound = None
        if self._bounds is not None:
            self._bounds.changed(scan_vectors_ND, rows)

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
        return self._together.ask((self, q_BD, k))

    def look(self, q_BD: F32, k: int) -> Look:
        """`top`, and beside it the scores of whatever rows are named then."""
        k = min(k, self.num_rows)
        if self.provider == "cuda":
            score_BK, row_BK, score_BN = self._run(q_BD, ["top_scores", "top_rows", "scores"], k)
            flat, num_rows = score_BN.ravel(), score_BN.shape[1]
            return Look(score_BK, row_BK, lambda user_R, row_R: flat[user_R * num_rows + row_R])
        q_BD, matrix_ND = np.ascontiguousarray(q_BD), self._matrix
        score_BK, row_BK = self.top(q_BD, k)
        return Look(
            score_BK, row_BK, lambda user_R, row_R: scores_of(q_BD, matrix_ND, user_R, row_R)
        )

    def scores(self, q_BD: F32) -> F32:
        """(B, N) all scores, for the rare user whose ties reach past the fetched rows."""
        if self.provider == "cuda":
            scores: F32 = self._run(q_BD, ["scores"], 1)[0]
            return scores
        return all_scores(np.ascontiguousarray(q_BD), self._matrix)

    def _top(self, q_BD: F32, k: int) -> tuple[F32, I64]:
        if self.provider == "cuda":
            scores_BK, rows_BK = self._run(q_BD, ["top_scores", "top_rows"], k)
            return scores_BK, rows_BK
        q_BD = np.ascontiguousarray(q_BD)
        if self._bounds is None:
            return best_rows(all_scores(q_BD, self._matrix), k)
        size_B, row_R, edge_B = self._bounds.survivors(q_BD, k)
        missed_B, score_BK = size_B < k, np.empty((len(q_BD), k), np.float32)
        row_BK = np.empty(score_BK.shape, np.int64)
        if not missed_B.all():
            score_R = scores_of(q_BD, self._matrix, np.repeat(np.arange(len(q_BD)), size_B), row_R)
            score_BK, row_BK, _ = best_of_groups(score_R, row_R, size_B, k)
            missed_B |= ~(score_BK[:, -1] >= edge_B)
        for user in np.flatnonzero(missed_B).tolist():
            one = slice(user, user + 1)
            score_BK[one], row_BK[one] = best_rows(all_scores(q_BD[one], self._matrix), k)
        return score_BK, row_BK

    def _run(self, q_BD: F32, outputs: list[str], k: int) -> list[Any]:
        assert len(q_BD) > 0, "an empty call aborts ONNX Runtime"
        assert self._session is not None, "only on CUDA"
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


def _tops(asked: Sequence[tuple[Scanner, F32, int]]) -> list[tuple[F32, I64]]:
    """One scan for everybody who asks by now: reading the matrix is what a small scan costs."""
    scanner = asked[0][0]
    q_BD = np.concatenate([own_BD for _, own_BD, _ in asked])
    scores_BK, rows_BK = scanner._top(q_BD, max(k for _, _, k in asked))
    ends = np.cumsum([len(own_BD) for _, own_BD, _ in asked]).tolist()
    return [
        (scores_BK[end - len(own_BD) : end, :k], rows_BK[end - len(own_BD) : end, :k])
        for (_, own_BD, k), end in zip(asked, ends, strict=True)
    ]


def scan_graph(dim: int, *, half: bool) -> bytes:
    """One Gemm, and a TopK on the device that has the scores: `q (B, D)`, `items (N, D)` and `k` →
    `scores`, `top_scores`, `top_rows`.
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
    nodes.append(helper.make_node("TopK", ["scores", "k"], ["top_scores", "top_rows"]))
    return graph_of(
        nodes,
        [
            info("q", TensorProto.FLOAT, ["B", dim]),
            info("items", kind, ["N", dim]),
            info("k", TensorProto.INT64, [1]),
        ],
        [
            info("scores", TensorProto.FLOAT, ["B", "N"]),
            info("top_scores", TensorProto.FLOAT, ["B", "K"]),
            info("top_rows", TensorProto.INT64, ["B", "K"]),
        ],
    )
