"""Which rows can be among a user's best, by a product in 8 bits that knows how wrong it is.

Every score is first bounded from both sides: by the product of query and row rounded to 8 bits, and
what rounding can have cost (Cauchy-Schwarz). A row whose upper bound lies below the k-th best lower
one is out; one or two hundred of 20,000 are left, and scored exactly by whoever asked. So an answer
does not depend on anything in here, only its price does. The last coordinate of a row, its bias, is
not rounded. Knows no item id. Shape letters as in `engine.py`, W columns of folded bounds, R rows
that are left, P properties of a query.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import math
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from onnx import TensorProto, helper

from afterclick.serving.compiled import compiled
from afterclick.serving.sessions import graph_of, session_of

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

BLOCK_ROWS = 1 << 15
"""Rows of one product at most; a change makes one block anew, not the whole."""

PAIRS_MAX = 1 << 20
"""Products at a time, 4 MiB: more leave the cache before they are read again."""

USERS_MAX = 1 << 12
"""Users at a time; 16 bits number them."""

COLUMNS = 8
"""At least so many columns of folded bounds for each result that is wanted."""

CROWD, CROWD_MIN = 16, 2048
"""Who has so many times more survivors than wanted, and as many, is scored whole."""

FRESH_MAX = 128
"""Changed rows of a block that are scored exactly for everybody, before it is made anew."""

LANES = 16
"""Rows that are compared with the edge at once; a block has at least as many."""

ZERO = 128
"""What a query's whole numbers are counted from."""

BIAS_MAX = 1e20
"""A bias beyond it masks its row."""

_LOWEST = np.float32(-3e38)


class Survivors(NamedTuple):
    """Rows that may be among the best, user after user."""

    size_B: I64
    row_R: I64
    crowded_B: Bools
    """Users with too many, of whom only some are named."""


class _Known(NamedTuple):
    """What bounds are made of beside the products: row n is about `step_N[n]` × whole numbers."""

    step_N: F32
    bias_N: F32
    """NaN for a row that changed since: a bound that is no number neither raises an edge nor
    reaches one.
    """
    norm_N: F32
    """Length without the bias."""
    most_4: F32
    """Of any row: what rounding took from it, in steps; its step, its length, its bias."""


class _Block(NamedTuple):
    begin: int
    session: ort.InferenceSession
    known: _Known
    fresh: frozenset[int]
    """Rows that changed since, counted from the matrix' first one."""


class Bounds:
    """Bounds of all scores over one matrix.

    Args:
        vectors_ND: finite; the caller tells of every change.
        threads: of a product.
    """

    def __init__(self, vectors_ND: F32, *, threads: int = 0) -> None:
        self._threads = threads
        self._blocks: list[_Block] = []
        self._num_rows = 0
        self.changed(vectors_ND, ())

    def changed(self, vectors_ND: F32, rows: Iterable[int]) -> None:
        """Take a matrix with at least as many rows, of which these differ from before; new ones
        need not be named.
        """
        named: dict[int, set[int]] = {}
        for row in rows:
            named.setdefault(row // BLOCK_ROWS, set()).add(row)
        for at, begin in enumerate(range(0, len(vectors_ND), BLOCK_ROWS)):
            end = min(begin + BLOCK_ROWS, len(vectors_ND))
            if at == len(self._blocks):
                self._blocks.append(self._block(vectors_ND, begin, end))
                continue
            block = self._blocks[at]
            fresh = block.fresh | named.get(at, set())
            if end > self._num_rows > begin or len(fresh) > FRESH_MAX:
                self._blocks[at] = self._block(vectors_ND, begin, end)
            elif at in named:
                block.known.bias_N[np.array(sorted(fresh)) - begin] = np.nan
                self._blocks[at] = block._replace(fresh=fresh)
        self._num_rows = len(vectors_ND)

    def survivors(self, q_BD: F32, k: int) -> Survivors:
        """Rows among which are each user's k best.

        Args:
            q_BD: queries, C-contiguous, at least one.
            k: at least 1, at most all rows.
        """
        size = max(1, min(USERS_MAX, PAIRS_MAX // min(self._num_rows, BLOCK_ROWS)))
        parts = [self._survivors(q_BD[at : at + size], k) for at in range(0, len(q_BD), size)]
        if len(parts) == 1:
            return parts[0]
        return Survivors(*(np.concatenate(some) for some in zip(*parts, strict=True)))

    def _survivors(self, q_BD: F32, k: int) -> Survivors:
        num_users = len(q_BD)
        whole_BD, of_BP = _rounded(q_BD)
        edge_B = np.full(num_users, _LOWEST)
        crowded_B = np.zeros(num_users, np.bool_)
        best_BK = np.zeros((num_users, 0), np.float32)  # lower bounds, the lowest first
        room = max(CROWD * k, CROWD_MIN)
        found: list[tuple[I64, I64, F32]] = []
        for begin, session, known, _ in self._blocks:
            num_rows = len(known.step_N)
            dot_BN = _products(session, whole_BD, num_rows)
            folds = num_rows // (COLUMNS * k)
            if folds > 1:
                best_BW = _folded(dot_BN, of_BP, known, num_rows // folds)
                best_BK = np.partition(np.hstack([best_BK, best_BW]), -k, axis=1)[:, -k:]
                edge_B = best_BK[:, 0].copy()
            found.append(_named(dot_BN, of_BP, known, edge_B, begin, room, crowded_B))
        fresh = sorted(row for block in self._blocks for row in block.fresh)
        if fresh:
            row_R = np.tile(np.array(fresh), num_users)
            upper_R = np.full(len(row_R), np.inf, np.float32)
            found.append((np.full(num_users, len(fresh)), row_R, upper_R))
        if len(found) == 1:
            return Survivors(*found[0][:2], crowded_B)
        return Survivors(*_together(found, edge_B), crowded_B)

    def _block(self, vectors_ND: F32, begin: int, end: int) -> _Block:
        vectors_ND, left = vectors_ND[begin:end], max(0, LANES - (end - begin))
        vectors_ND = np.pad(vectors_ND, ((0, left), (0, 0)))
        bias_N, vectors_ND = vectors_ND[:, -1].copy(), vectors_ND[:, :-1]
        bias_N[end - begin :] = np.nan
        step_N = np.abs(vectors_ND).max(axis=1, initial=0) / np.float32(_levels())
        exact_ND = vectors_ND / np.where(step_N > 0, step_N, 1)[:, None]
        whole_ND = np.rint(exact_ND)
        taken_N = np.linalg.norm(exact_ND - whole_ND, axis=1)
        norm_N = np.linalg.norm(vectors_ND, axis=1)
        weighed_N = np.where(np.abs(bias_N) < BIAS_MAX, np.abs(bias_N), 0)
        most_4 = np.array([own_N.max() for own_N in (taken_N, step_N, norm_N, weighed_N)])
        session = session_of(_graph(whole_ND.T.astype(np.int8)), "cpu", self._threads)
        return _Block(begin, session, _Known(step_N, bias_N, norm_N, most_4), frozenset())


def _together(found: Sequence[tuple[I64, I64, F32]], edge_B: F32) -> tuple[I64, I64]:
    """Rows of several blocks user after user, but for those that a later block put out."""
    user_B = np.arange(len(edge_B), dtype=np.uint16)  # 16 bits are sorted by counting
    user_R = np.concatenate([np.repeat(user_B, size_B) for size_B, _, _ in found])
    in_R = np.concatenate([upper_R for _, _, upper_R in found]) >= edge_B[user_R]
    user_R = user_R[in_R]
    row_R = np.concatenate([row_R for _, row_R, _ in found])[in_R]
    return np.bincount(user_R, minlength=len(edge_B)), row_R[np.argsort(user_R, kind="stable")]


@lru_cache(maxsize=1)
def _levels() -> int:
    """The largest whole number of a row: 127, or 63 where this CPU adds pairs of products in 16
    bits, which do not hold two of 255 × 127.
    """
    session = session_of(_graph(np.full((4, 16), 127, np.int8)), "cpu", 1)
    dot_BN = _products(session, np.full((2, 4), 255, np.uint8), 16)
    return 127 if (dot_BN == (255 - ZERO) * 127 * 4).all() else 63


def _graph(whole_DN: npt.NDArray[np.int8]) -> bytes:
    """`q (B, D) -> dots (B, N)`, the rows a constant, queries counted from `ZERO`."""
    info, shape = helper.make_tensor_value_info, whole_DN.shape
    data = np.ascontiguousarray(whole_DN).tobytes()
    return graph_of(
        [helper.make_node("MatMulInteger", ["q", "rows", "zero"], ["dots"])],
        [info("q", TensorProto.UINT8, ["B", shape[0]])],
        [info("dots", TensorProto.INT32, ["B", shape[1]])],
        [
            helper.make_tensor("rows", TensorProto.INT8, shape, data, raw=True),
            helper.make_tensor("zero", TensorProto.UINT8, [], [ZERO]),
        ],
    )


_LOCAL = threading.local()


def _products(session: ort.InferenceSession, whole_BD: U8, num_rows: int) -> I32:
    """(B, N) in memory that this thread's next call takes again: fresh memory costs as much as
    reading it.
    """
    shape, size = (len(whole_BD), num_rows), len(whole_BD) * num_rows
    kept: I32 | None = getattr(_LOCAL, "dots", None)
    if kept is None or len(kept) < size:
        kept = _LOCAL.dots = np.empty(max(size, PAIRS_MAX), np.int32)
    dot_BN = kept[:size].reshape(shape)
    binding = session.io_binding()
    binding.bind_cpu_input("q", whole_BD)
    binding.bind_output("dots", "cpu", 0, np.int32, shape, dot_BN.ctypes.data)
    session.run_with_iobinding(binding)
    return dot_BN


@compiled
def _rounded(q_BD: F32) -> tuple[U8, F32]:
    """Queries as whole numbers, and of each: its step, its last coordinate, the length of what
    rounding took, the length of what it left; and what float32 may take from exact scores and from
    the bounds themselves, for each unit of a row's length, and of its bias.
    """
    num_users, dim = q_BD.shape[0], q_BD.shape[1] - 1
    whole_BD = np.empty((num_users, dim), np.uint8)
    of_BP = np.empty((num_users, 6), np.float32)
    slack = (dim / 16 + 64) * 2.0**-23
    for user in range(num_users):
        most = 0.0
        for at in range(dim):
            most = max(most, abs(np.float64(q_BD[user, at])))
        step = np.float64(np.float32(most / 127)) if most > 0 else 1.0
        taken, left, own = 0.0, 0.0, 0.0
        for at in range(dim):
            exact = np.float64(q_BD[user, at])
            whole = min(127.0, max(-127.0, np.rint(exact / step)))
            whole_BD[user, at] = np.uint8(np.int64(whole) + ZERO)
            taken += (exact - step * whole) ** 2
            left += (step * whole) ** 2
            own += exact**2
        of_BP[user, 0], of_BP[user, 1] = step, q_BD[user, dim]
        of_BP[user, 2] = math.sqrt(taken)
        of_BP[user, 3] = math.sqrt(left)
        of_BP[user, 4] = slack * math.sqrt(own)
        of_BP[user, 5] = slack * abs(q_BD[user, dim])
    return whole_BD, of_BP


@compiled
def _errors(of_P: F32, most_4: F32) -> tuple[np.float32, np.float32, np.float32]:
    """How wrong a product may be: so much of the row's length, so much of its step, and a rest."""
    return of_P[2], of_P[3] * most_4[0], of_P[4] * most_4[2] + of_P[5] * most_4[3]


@compiled
def _folded(dot_BN: I32, of_BP: F32, known: _Known, width: int) -> F32:
    """(B, W) the highest lower bound of rows that are a multiple of W apart; rows behind the last
    whole multiple are left out.
    """
    step_N, bias_N, norm_N, most_4 = known
    best_BW = np.full((len(dot_BN), width), _LOWEST, np.float32)
    for user in range(len(dot_BN)):
        per_step, last = of_BP[user, 0], of_BP[user, 1]
        of_norm, of_step, rest = _errors(of_BP[user], most_4)
        best_W = best_BW[user]
        for begin in range(0, len(step_N) - width + 1, width):
            dot_W, step_W = dot_BN[user, begin : begin + width], step_N[begin : begin + width]
            bias_W, norm_W = bias_N[begin : begin + width], norm_N[begin : begin + width]
            for at in range(width):
                about = np.float32(dot_W[at]) * (step_W[at] * per_step) + bias_W[at] * last
                lower = about - (of_norm * norm_W[at] + of_step * step_W[at] + rest)
                best_W[at] = lower if lower > best_W[at] else best_W[at]
    return best_BW


def _code_of_reached(
    _context: Any,
    dot_BN: Any,
    user: Any,
    row: Any,
    step_N: Any,
    bias_N: Any,
    norm_N: Any,
    of_6: Any,
) -> Any:
    """One bit for each of `LANES` rows from `row` on: whether its upper bound reaches the edge.

    `of_6`: the query's step and last coordinate, its three errors, and the edge.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def lanes_of(at: int, start: Any, kind: Any) -> Any:
            array = context.make_array(signature.args[at])(context, builder, args[at])
            wide = ir.VectorType(kind, LANES)
            place = builder.gep(array.data, [start])
            return builder.load(builder.bitcast(place, wide.as_pointer()), align=4)

        def spread(at: int) -> Any:
            one = builder.extract_value(args[6], at)
            wide = ir.VectorType(ir.FloatType(), LANES)
            first = builder.insert_element(ir.Constant(wide, None), one, ir.Constant(index, 0))
            return builder.shuffle_vector(
                first, first, ir.Constant(ir.VectorType(index, LANES), [0] * LANES)
            )

        index = ir.IntType(32)
        products = context.make_array(signature.args[0])(context, builder, args[0])
        num_rows = builder.extract_value(products.shape, 1)
        start = builder.add(builder.mul(args[1], num_rows), args[2])
        dot = builder.sitofp(lanes_of(0, start, index), ir.VectorType(ir.FloatType(), LANES))
        step, bias, norm = (lanes_of(at, args[2], ir.FloatType()) for at in (3, 4, 5))
        per_step, last, of_norm, of_step, rest, edge = map(spread, range(6))
        about = builder.fadd(
            builder.fmul(dot, builder.fmul(step, per_step)), builder.fmul(bias, last)
        )
        error = builder.fadd(
            builder.fadd(builder.fmul(of_norm, norm), builder.fmul(of_step, step)), rest
        )
        reached = builder.fcmp_ordered(">=", builder.fadd(about, error), edge)
        return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(dot_BN, user, row, step_N, bias_N, norm_N, of_6), code


_reached: Any = intrinsic(_code_of_reached)


def _code_of_lowest_bit(_context: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set, of bits that are not all 0: one instruction, where a
    loop that looks at each is guessed wrong at every second row that is left.
    """

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), code


_lowest_bit: Any = intrinsic(_code_of_lowest_bit)


@compiled
def _named(
    dot_BN: I32,
    of_BP: F32,
    known: _Known,
    edge_B: F32,
    begin: int,
    room: int,
    crowded_B: Bools,
) -> tuple[I64, I64, F32]:
    """How many rows of each user have an upper bound that reaches the edge, which, and it."""
    step_N, bias_N, norm_N, most_4 = known
    num_users, num_rows = dot_BN.shape
    size_B, row_R = np.zeros(num_users, np.int64), np.empty(num_users * room, np.int64)
    upper_R = np.empty(num_users * room, np.float32)
    num = 0
    for user in range(num_users):
        per_step, last, edge = of_BP[user, 0], of_BP[user, 1], edge_B[user]
        of_norm, of_step, rest = _errors(of_BP[user], most_4)
        first = num
        for start in range(0, num_rows, LANES):
            # The last lanes overlap those before them, whose rows are taken already.
            at = min(start, num_rows - LANES)
            of_6 = per_step, last, of_norm, of_step, rest, edge
            bits = _reached(dot_BN, user, at, step_N, bias_N, norm_N, of_6) >> (start - at)
            if bits and num - first > room - LANES:
                crowded_B[user] = True
                break
            while bits:
                row = start + _lowest_bit(bits)
                step = step_N[row]
                about = np.float32(dot_BN[user, row]) * (step * per_step) + bias_N[row] * last
                upper_R[num] = about + (of_norm * norm_N[row] + of_step * step + rest)
                row_R[num] = begin + row
                num += 1
                bits &= bits - 1
        size_B[user] = num - first
    return size_B, row_R[:num].copy(), upper_R[:num].copy()
