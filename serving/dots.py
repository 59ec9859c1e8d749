"""A score: the dot product of a query and a row, with the same bits wherever and with whomever.

Sixteen sums side by side, in an order that is written here and not left to a compiler or a library:
one CPU may add them up in one instruction and another in four, the bits stay. Shape letters: B
users, N rows, D coordinates, R pairs of a user and a row.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from afterclick.serving.compiled import compiled

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

LANES = 16

_variable: Any = cgutils.alloca_once_value


def scores_of(q_BD: F32, vectors_ND: F32, user_R: I64, row_R: I64) -> F32:
    """(R,) scores of pairs of a user and a row; both matrices C-contiguous."""
    _check(q_BD, vectors_ND)
    score_R = np.empty(len(row_R), np.float32)
    _pairs(q_BD, vectors_ND, user_R, row_R, score_R)
    return score_R


def all_scores(q_BD: F32, vectors_ND: F32) -> F32:
    """(B, N) scores of all rows; both matrices C-contiguous."""
    _check(q_BD, vectors_ND)
    score_BN = np.empty((len(q_BD), len(vectors_ND)), np.float32)
    _all(q_BD, vectors_ND, score_BN)
    return score_BN


def _check(q_BD: F32, vectors_ND: F32) -> None:
    for array in (q_BD, vectors_ND):
        assert array.flags.c_contiguous, "machine code reads it row after row"
        assert array.dtype == np.float32, "likewise"
    assert q_BD.shape[1] == vectors_ND.shape[1], "a query and a row have as many coordinates"


def _code_of_dot(_context: Any, q_BD: Any, user: Any, vectors_ND: Any, row: Any) -> Any:
    """`q_BD[user] · vectors_ND[row]`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        query = context.make_array(kinds[0])(context, builder, args[0])
        vectors = context.make_array(kinds[2])(context, builder, args[2])
        dim = builder.extract_value(query.shape, 1)
        one_D = builder.gep(query.data, [builder.mul(args[1], dim)])
        other_D = builder.gep(vectors.data, [builder.mul(args[3], dim)])
        lanes = ir.Constant(dim.type, LANES)
        wide = ir.VectorType(ir.FloatType(), LANES)

        def part(at: Any) -> Any:
            both = [
                builder.load(builder.bitcast(builder.gep(own_D, [at]), wide.as_pointer()), align=4)
                for own_D in (one_D, other_D)
            ]
            return builder.fmul(*both)

        blocks = builder.udiv(dim, lanes)
        sums = _variable(builder, ir.Constant(wide, None))
        with cgutils.for_range(builder, blocks) as loop:
            so_far = builder.load(sums)
            builder.store(builder.fadd(so_far, part(builder.mul(loop.index, lanes))), sums)
        left, width = builder.load(sums), LANES
        while width > 1:
            width //= 2
            index = ir.VectorType(ir.IntType(32), width)
            halves = [
                builder.shuffle_vector(left, left, ir.Constant(index, list(range(at, at + width))))
                for at in (0, width)
            ]
            left = builder.fadd(*halves)
        first = builder.extract_element(left, ir.Constant(ir.IntType(32), 0))
        total = _variable(builder, first)
        rest = builder.sub(dim, builder.mul(blocks, lanes))
        with cgutils.for_range(builder, rest) as loop:
            at = builder.add(builder.mul(blocks, lanes), loop.index)
            pair = [builder.load(builder.gep(own_D, [at])) for own_D in (one_D, other_D)]
            builder.store(builder.fadd(builder.load(total), builder.fmul(*pair)), total)
        return builder.load(total)

    return types.float32(q_BD, user, vectors_ND, row), code


_dot: Any = intrinsic(_code_of_dot)


@compiled
def _pairs(q_BD: F32, vectors_ND: F32, user_R: I64, row_R: I64, score_R: F32) -> None:
    for at in range(len(row_R)):
        score_R[at] = _dot(q_BD, user_R[at], vectors_ND, row_R[at])


@compiled
def _all(q_BD: F32, vectors_ND: F32, score_BN: F32) -> None:
    for row in range(len(vectors_ND)):
        for user in range(len(q_BD)):
            score_BN[user, row] = _dot(q_BD, user, vectors_ND, row)
