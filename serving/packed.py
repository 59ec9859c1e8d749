"""An item matrix in the order in which products read it, and what has changed in it since.

A constant of a graph is packed once, at load; an input at every call, which for a small batch takes
longer than the product. So what a release brings is a constant, and the rows that changed since are
multiplied apart. Which path a row takes is decided by what it holds now and held first, not by what
happened between, because the two paths may differ in a score's last bit. Knows no item id. Shape
letters as in `engine.py`, and R rows that changed.
"""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BYTES_MAX = 1 << 26
"""A larger matrix stays an input: packing takes its size in memory once more, while a release is
loaded four times.
"""

CHANGED_SHARE = 8
"""Where more than one row in so many has changed, all are multiplied as an input."""

ROWS_MIN = 64
"""Fewer rows than that take other kernels; they are filled up."""


class Followed:
    """How far a matrix is what it was first."""

    def __init__(self, first_ND: F32) -> None:
        self._first_2N = _sums(first_ND)
        self.row_R = np.zeros(0, np.int64)
        """Rows that changed."""
        self.changed_RD = first_ND[:0]
        """They, filled up to `ROWS_MIN`."""

    def follow(self, matrix_ND: F32) -> bool:
        """Whether enough is left of the first matrix that its pack is of use; finds the rest."""
        if len(matrix_ND) != self._first_2N.shape[1]:
            return False
        self.row_R = np.flatnonzero((_sums(matrix_ND) != self._first_2N).any(axis=0))
        if len(self.row_R) > len(matrix_ND) // CHANGED_SHARE:
            return False
        self.changed_RD = matrix_ND[:0]
        if len(self.row_R):
            self.changed_RD = matrix_ND[np.resize(self.row_R, max(len(self.row_R), ROWS_MIN))]
        return True


def packed_graph(matrix_ND: F32) -> bytes:
    """`q (B, D) -> scores (B, N)`, the matrix a constant."""
    num_rows, dim = matrix_ND.shape
    info = helper.make_tensor_value_info
    data = np.ascontiguousarray(matrix_ND).tobytes()
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["q", "items"], ["scores"], transB=1)],
        "scan",
        [info("q", TensorProto.FLOAT, ["B", dim])],
        [info("scores", TensorProto.FLOAT, ["B", num_rows])],
        [helper.make_tensor("items", TensorProto.FLOAT, [num_rows, dim], data, raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    whole: bytes = model.SerializeToString()
    return whole


def _sums(matrix_ND: F32) -> F32:
    """(2, N) what tells a row from another: the sum of all entries, and of every other one.

    One sum alone would take one change in some ten million for none.
    """
    return np.stack([matrix_ND.sum(axis=1), matrix_ND[:, ::2].sum(axis=1)])
