"""Which rows can be among a user's best, by a product in 8 bits that knows how wrong it is.

From some rows it is guessed how high a score must be to be among the best; then every row is named
whose upper bound reaches the guess: its product in 8 bits, and what rounding can have cost
(Cauchy-Schwarz). No product is kept: bounds are taken from sums that have not left the nearest
cache. One or two hundred rows of 20,000 are named. Whoever asked scores them exactly, and if the
last one wanted is below the guess, that was too high, and all rows are scored. So an answer does
not depend on anything in here, only its price does. The last coordinate of a row, its bias, is not
rounded. Knows no item id. Shape letters as in `engine.py`, V vectors of `LANES` rows, Q vectors of
`FOUR` coordinates, C columns of which the guess is made, W words of bits, R rows that are named, P
properties of a query.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils as typed_as_any
from numba.extending import intrinsic

from afterclick.serving.compiled import compiled

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

LANES, FOUR = 16, 4
"""Rows of a vector, and of each so many coordinates side by side: 64 bytes, one instruction."""

USERS, SIDE = 6, 4
"""Products of so many users with so many vectors grow at the same time: each row that was read
counts six times, each coordinate of a query 64 times, and all sums stay in registers.
"""

BITS = SIDE * LANES
"""Rows of one word."""

SHARES = (1, 2, 4, 8, 16, 32, 64)
"""One vector in so many makes the guess."""

NAMED = 75
"""A row that is named costs as much as so many that are looked at."""

SAFE = 4
"""Standard deviations of what chance does to a guess that it leaves room for."""

NOISE = 1 / 8
"""What rounding does to it at most, as a share of a result: rows that change places."""

CROWD, CROWD_MIN = 16, 2048
"""For whom so many times more rows are named than wanted, and as many, is scored whole."""

WORDS_MAX = 1 << 22
"""Words of one call, 32 MiB: 1,700 users at 160,000 rows, 26 at ten million."""

LEVELS, ZERO = 127.0, 128
"""The largest whole number of a coordinate, and what a row's are counted from."""

LOWEST = -3e38

BIAS_MAX = 1e20
"""A bias beyond it masks its row."""


class Survivors(NamedTuple):
    """Rows that may be among the best, user after user."""

    size_B: I64
    row_R: I64
    edge_B: F32
    """All rows with at least this score are named; infinite where none is."""


class _Known(NamedTuple):
    """Rows in 8 bits, and what bounds are made of beside: a row is about its step × whole numbers.

    Row n is lane n // V of vector n % V: rows that stand side by side in a catalogue, and may be
    alike, are in different vectors.
    """

    whole_VQL: npt.NDArray[np.uint32]
    """Four coordinates each, counted from `ZERO`."""
    step_N: F32
    bias_N: F32
    """NaN where there is no row: a bound that is no number reaches no edge."""
    norm_N: F32
    """Length without the bias."""
    most_4: F32
    """Of any row so far: what rounding took from it, in steps; its step, its length, its bias."""


class _Asked(NamedTuple):
    """Queries in 8 bits; the first two with as many zeros behind as fill the last `USERS`."""

    whole_BQ: I32
    """Four coordinates each."""
    start_B: I32
    """What the rows' being counted from `ZERO` adds to a product, taken off."""
    of_BP: F32
    """The step, the last coordinate; and how wrong a product may be: so much of a row's length, so
    much of its step, and a rest.
    """


class Bounds:
    """Bounds of all scores over one matrix.

    Args:
        vectors_ND: finite, C-contiguous; the caller tells of every change.
    """

    def __init__(self, vectors_ND: F32) -> None:
        self._num_rows, self._known, self._drawn_V = 0, _room(0, 0), np.arange(0)
        self.changed(vectors_ND, ())

    def changed(self, vectors_ND: F32, rows: Iterable[int]) -> None:
        """Take a matrix with at least as many rows, of which these differ from before; new ones
        need not be named. Not while others look for survivors.
        """
        num_rows, dim = vectors_ND.shape
        if num_rows > len(self._known.step_N):
            self._num_rows, self._known = 0, _room(num_rows, -(-(dim - 1) // FOUR))
            # By chance, because what a catalogue repeats may do so in any step.
            self._drawn_V = np.random.default_rng(0).permutation(len(self._known.whole_VQL))
        new_R = np.arange(self._num_rows, num_rows)
        _take(vectors_ND, np.concatenate([np.array(sorted(rows), np.int64), new_R]), self._known)
        self._num_rows = num_rows

    def survivors(self, q_BD: F32, k: int) -> Survivors:
        """Rows among which each user's k best are likely to be; see `Survivors.edge_B`.

        Args:
            q_BD: queries, C-contiguous, at least one.
            k: at least 1, at most all rows.
        """
        size = max(1, WORDS_MAX // (len(self._drawn_V) // SIDE))
        parts = [self._survivors(q_BD[at : at + size], k) for at in range(0, len(q_BD), size)]
        if len(parts) == 1:
            return parts[0]
        return Survivors(*(np.concatenate(some) for some in zip(*parts, strict=True)))

    def _survivors(self, q_BD: F32, k: int) -> Survivors:
        known, num_users = self._known, len(q_BD)
        asked = _rounded(q_BD, known.whole_VQL.shape[1], known.most_4)
        num_columns, rank = _sample(len(self._drawn_V), k)
        best_BC = np.empty((num_users, num_columns), np.float32)
        _look_at_some(known, asked, self._drawn_V, best_BC)
        edge_B = np.full(num_users, np.inf, np.float32)
        if rank <= num_columns:
            edge_B = np.partition(best_BC, num_columns - rank, axis=1)[:, num_columns - rank]
            # Where few rows may be listed, the guess would be another: all of the few are named.
            edge_B = np.maximum(edge_B, np.float32(-BIAS_MAX))
        word_BW = np.empty((num_users, len(known.whole_VQL) // SIDE), np.uint64)
        _mark(known, asked, np.arange(len(self._drawn_V)), edge_B, word_BW)
        size_B = _sizes(word_BW, max(CROWD * k, CROWD_MIN))
        edge_B[size_B == 0] = np.inf
        return Survivors(size_B, _rows_of(word_BW, size_B), edge_B)


def _room(num_rows: int, num_whole: int) -> _Known:
    num_vectors = -(-num_rows // BITS) * SIDE
    whole_VQL = np.full((num_vectors, num_whole, LANES * FOUR), ZERO, np.uint8)
    shape = num_vectors * LANES
    return _Known(
        whole_VQL.view(np.uint32),
        np.zeros(shape, np.float32),
        np.full(shape, np.nan, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(4, np.float32),
    )


@lru_cache(maxsize=64)
def _sample(num_vectors: int, k: int) -> tuple[int, int]:
    """How many vectors are looked at, and which of them, from the best one on, makes the guess: the
    cheapest way; the rank is beyond all of them where there is none.

    Of the best k rows as many are among those looked at as heads among k throws of a coin: more
    than so many standard deviations above their mean, and what the curve's being no bell adds
    (Cornish & Fisher 1938), are not to be expected, nor more than k.
    """
    ways = []
    for share in SHARES:
        mean, odds = k / share, 1 - 1 / share
        likely = mean + SAFE * math.sqrt(mean * odds) + (SAFE**2 - 1) / 6 * (2 * odds - 1)
        rank = math.ceil(min(max(likely, mean * (1 + NOISE)), k * (1 + NOISE)) + 1)
        num_columns = num_vectors // share // SIDE * SIDE
        price = rank * share * NAMED + num_vectors * LANES / share
        ways.append((price if rank <= num_columns else math.inf, num_columns, rank))
    return min(ways)[1:]


@compiled
def _step_of(vector_D: F32) -> float:
    """What one level of a vector is worth, without its last coordinate; 0 where all else is 0."""
    most = 0.0
    for at in range(len(vector_D) - 1):
        most = max(most, abs(np.float64(vector_D[at])))
    return np.float64(np.float32(most / LEVELS))


@compiled
def _level_of(value: float, step: float) -> float:
    return min(LEVELS, max(-LEVELS, np.rint(value / step))) if step > 0 else 0.0


@compiled
def _take(vectors_ND: F32, row_R: I64, known: _Known) -> None:
    """Round these rows, and what is known of all."""
    whole_VQL, step_N, bias_N, norm_N, most_4 = known
    dim = vectors_ND.shape[1] - 1
    for row in row_R:
        step = _step_of(vectors_ND[row])
        vector, lane = row % len(whole_VQL), row // len(whole_VQL)
        place = vector * LANES + lane
        taken, own = 0.0, 0.0
        for part in range(whole_VQL.shape[1]):
            four = np.uint32(0)
            for of_four in range(FOUR):
                at, whole = part * FOUR + of_four, 0.0
                if at < dim:
                    value = np.float64(vectors_ND[row, at])
                    whole = _level_of(value, step)
                    taken += (value / step - whole) ** 2 if step > 0 else 0.0
                    own += value**2
                four |= np.uint32(np.int64(whole) + ZERO) << np.uint32(8 * of_four)
            whole_VQL[vector, part, lane] = four
        step_N[place], bias_N[place], norm_N[place] = step, vectors_ND[row, dim], math.sqrt(own)
        weighed = abs(np.float64(vectors_ND[row, dim]))
        most_4[0], most_4[1] = max(most_4[0], math.sqrt(taken)), max(most_4[1], step)
        most_4[2] = max(most_4[2], math.sqrt(own))
        most_4[3] = max(most_4[3], weighed if weighed < BIAS_MAX else 0.0)


@compiled
def _rounded(q_BD: F32, num_whole: int, most_4: F32) -> _Asked:
    """Queries in 8 bits; what rounding took from them and from rows, and what float32 may take from
    exact scores and from the bounds themselves, makes them wrong.
    """
    num_users, dim = q_BD.shape[0], q_BD.shape[1] - 1
    num_padded = -(-num_users // USERS) * USERS
    whole_BQ, start_B = np.zeros((num_padded, num_whole), np.int32), np.zeros(num_padded, np.int32)
    of_BP = np.empty((num_users, 5), np.float32)
    slack = (dim / 16 + 64) * 2.0**-23
    for user in range(num_users):
        step = _step_of(q_BD[user])
        taken, left, own = 0.0, 0.0, 0.0
        for at in range(dim):
            exact = np.float64(q_BD[user, at])
            whole = _level_of(exact, step)
            byte = (np.int64(whole) & 255) << (8 * (at % FOUR))
            whole_BQ[user, at // FOUR] |= np.int32(byte)
            start_B[user] -= np.int32(ZERO * whole)
            taken += (exact - step * whole) ** 2
            left += (step * whole) ** 2
            own += exact**2
        of_BP[user, 0], of_BP[user, 1] = step, q_BD[user, dim]
        of_BP[user, 2] = math.sqrt(taken)
        of_BP[user, 3] = math.sqrt(left) * most_4[0]
        of_BP[user, 4] = slack * (math.sqrt(own) * most_4[2] + abs(q_BD[user, dim]) * most_4[3])
    return _Asked(whole_BQ, start_B, of_BP)


cgutils: Any = typed_as_any

_SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (16, 32, 64))
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)


def _array(context: Any, builder: Any, signature: Any, args: Any, at: int) -> Any:
    return context.make_array(signature.args[at])(context, builder, args[at])


def _places(places: Iterable[int]) -> Any:
    chosen = list(places)
    return ir.Constant(ir.VectorType(_INT, len(chosen)), chosen)


def _spread(builder: Any, one: Any) -> Any:
    wide = ir.Constant(ir.VectorType(one.type, LANES), None)
    first = builder.insert_element(wide, one, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, first, _places([0] * LANES))


def _lanes_at(builder: Any, array: Any, start: Any, wide: Any) -> Any:
    place = builder.bitcast(builder.gep(array.data, [start]), wide.as_pointer())
    return builder.load(place, align=4)


def _scaled(builder: Any, one: Any, other: Any, more: Any) -> Any:
    """One × other + more, in one step or in two: bounds leave room for either."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v16f32")
    return builder.call(function, [one, other, more])


def _adding_bytes(builder: Any, wide: bool, whole: Any) -> Callable[[Any, Any], Any]:
    """How to add four products of bytes to each sum, a row's without a sign, the query's with one:
    by one instruction of AVX-512 VNNI, else in pairs of 16 bits, which every CPU can do well.
    """
    if wide:
        name, query = "llvm.x86.avx512.vpdpbusd.512", _spread(builder, whole)
        kind = ir.FunctionType(_INTS, [_INTS] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return lambda sums, rows: builder.call(function, [sums, rows, query])
    pairs, products = ir.VectorType(_SHORT, 2 * LANES), ir.VectorType(_INT, 2 * LANES)
    eights = ir.Constant(ir.VectorType(_SHORT, 2), [8, 8])
    two = builder.bitcast(whole, eights.type)
    # The low bytes of both halves with their signs, and the high ones.
    queries = [
        builder.sext(builder.bitcast(_spread(builder, builder.bitcast(own, _INT)), pairs),
                     products)
        for own in (builder.ashr(builder.shl(two, eights), eights), builder.ashr(two, eights))
    ]  # fmt: skip
    low = ir.Constant(_INTS, [0x00FF00FF] * LANES)

    def added(sums: Any, rows: Any) -> Any:
        high = builder.lshr(rows, ir.Constant(_INTS, [8] * LANES))
        for own, query in zip((rows, high), queries, strict=True):
            row = builder.sext(builder.bitcast(builder.and_(own, low), pairs), products)
            both = builder.mul(row, query)
            halves = [
                builder.shuffle_vector(both, both, _places(range(odd, 2 * LANES, 2)))
                for odd in (0, 1)
            ]
            sums = builder.add(sums, builder.add(*halves))
        return sums

    return added


def _code_of_products(
    _context: Any,
    whole_VQL: Any,
    vector_C: Any,
    at: Any,
    whole_BQ: Any,
    start_B: Any,
    user: Any,
    dot_USL: Any,
) -> Any:
    """Products of `USERS` users from `user` on with `SIDE` vectors, named from `at` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, named, queries, starts, dots = (
            _array(context, builder, signature, args, at) for at in (0, 1, 3, 4, 6)
        )
        size = builder.extract_value(rows.shape, 1)

        def number(value: int) -> Any:
            return ir.Constant(size.type, value)

        vectors = [
            builder.load(builder.gep(named.data, [builder.add(args[2], number(side))]))
            for side in range(SIDE)
        ]
        of_row = [builder.mul(builder.mul(vector, size), number(LANES)) for vector in vectors]
        users = [builder.add(args[5], number(at)) for at in range(USERS)]
        of_user = [builder.mul(own, size) for own in users]
        starts_U = [builder.load(builder.gep(starts.data, [own])) for own in users]
        sums_US = [
            [cgutils.alloca_once_value(builder, _spread(builder, start)) for _ in vectors]
            for start in starts_U
        ]
        wide = "+avx512vnni" in context.codegen().magic_tuple()[2]
        with cgutils.for_range(builder, size) as loop:
            step = builder.mul(loop.index, number(LANES))
            row_S = [_lanes_at(builder, rows, builder.add(own, step), _INTS) for own in of_row]
            for own, sums_S in zip(of_user, sums_US, strict=True):
                place = builder.gep(queries.data, [builder.add(own, loop.index)])
                added = _adding_bytes(builder, wide, builder.load(place))
                for sums, row in zip(sums_S, row_S, strict=True):
                    builder.store(added(builder.load(sums), row), sums)
        for at, sums in enumerate(sums for sums_S in sums_US for sums in sums_S):
            place = builder.bitcast(
                builder.gep(dots.data, [number(at * LANES)]), _INTS.as_pointer()
            )
            builder.store(builder.load(sums), place, align=4)
        return context.get_dummy_value()

    return types.void(whole_VQL, vector_C, at, whole_BQ, start_B, user, dot_USL), code


_multiply: Any = intrinsic(_code_of_products)


def _code_over_lanes(made: Callable[..., Any], result: Any) -> Any:
    """Code that makes one thing of a vector: of its products with a user as floats, of what is
    known of its rows, and of numbers of the user.
    """

    def code_of(
        _context: Any, dot_USL: Any, user: Any, side: Any, vector: Any, known: Any, of_user: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lanes = ir.Constant(args[1].type, LANES)
            sides = builder.mul(args[1], ir.Constant(args[1].type, SIDE))
            at = builder.mul(builder.add(sides, args[2]), lanes)
            dots = _array(context, builder, signature, args, 0)
            dot = builder.sitofp(_lanes_at(builder, dots, at, _INTS), _FLOATS)
            row = builder.mul(args[3], lanes)
            own = [
                context.make_array(kind)(context, builder, builder.extract_value(args[4], at))
                for at, kind in enumerate(known)
            ]
            rows = [_lanes_at(builder, own_N, row, _FLOATS) for own_N in own]
            numbers = [builder.extract_value(args[5], at) for at in range(len(of_user))]
            return made(builder, dot, *rows, *(_spread(builder, number) for number in numbers))

        return result(dot_USL, user, side, vector, known, of_user), code

    return code_of


def _made_best(builder: Any, dot: Any, step: Any, bias: Any, per_step: Any, last: Any) -> Any:
    """The highest score of a vector's rows, about, by the query's step and last coordinate."""
    best = _scaled(builder, step, builder.fmul(dot, per_step), builder.fmul(bias, last))
    lowest = ir.Constant(_FLOATS, [LOWEST] * LANES)
    best = builder.select(builder.fcmp_ordered("==", best, best), best, lowest)
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(best, best, _places(range(at, at + width))) for at in (0, width)
        ]
        best = builder.select(builder.fcmp_ordered(">", *halves), *halves)
    return builder.extract_element(best, ir.Constant(_INT, 0))


def _made_reached(
    builder: Any,
    dot: Any,
    step: Any,
    bias: Any,
    norm: Any,
    per_step: Any,
    last: Any,
    of_norm: Any,
    of_step: Any,
    edge: Any,
) -> Any:
    """One bit for each of a vector's rows: whether its upper bound reaches the edge, which is
    without the query's rest.
    """
    rest = _scaled(builder, bias, last, builder.fmul(of_norm, norm))
    upper = _scaled(builder, step, _scaled(builder, dot, per_step, of_step), rest)
    reached = builder.fcmp_ordered(">=", upper, edge)
    return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), _LONG)


_best: Any = intrinsic(_code_over_lanes(_made_best, types.float32))
_reached: Any = intrinsic(_code_over_lanes(_made_reached, types.uint64))


def _code_of_lowest_bit(_context: Any, word: Any) -> Any:
    """The place of the lowest bit of a word that is not 0."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), code


def _code_of_num_bits(_context: Any, word: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), code


_lowest_bit: Any = intrinsic(_code_of_lowest_bit)
_num_bits: Any = intrinsic(_code_of_num_bits)


@compiled
def _look_at_some(known: _Known, asked: _Asked, vector_V: I64, best_BC: F32) -> None:
    """The best score of every user in each of the first of these vectors, about."""
    whole_VQL, step_N, bias_N, _, _ = known
    whole_BQ, start_B, of_BP = asked
    num_users, num_columns = best_BC.shape
    dot_USL = np.empty((USERS, SIDE, LANES), np.int32)
    for column in range(0, num_columns, SIDE):
        for user in range(0, num_users, USERS):
            _multiply(whole_VQL, vector_V, column, whole_BQ, start_B, user, dot_USL)
            for at in range(min(USERS, num_users - user)):
                of_2 = of_BP[user + at, 0], of_BP[user + at, 1]
                for side in range(SIDE):
                    vector = vector_V[column + side]
                    best = _best(dot_USL, at, side, vector, (step_N, bias_N), of_2)
                    best_BC[user + at, column + side] = best


@compiled
def _mark(known: _Known, asked: _Asked, vector_V: I64, edge_B: F32, word_BW: U64) -> None:
    """One bit for each row, vector after vector: whether its upper bound reaches the edge."""
    whole_VQL, known_3 = known.whole_VQL, (known.step_N, known.bias_N, known.norm_N)
    whole_BQ, start_B, of_BP = asked
    num_users, num_words = word_BW.shape
    dot_USL = np.empty((USERS, SIDE, LANES), np.int32)
    for word in range(num_words):
        first = word * SIDE
        for user in range(0, num_users, USERS):
            _multiply(whole_VQL, vector_V, first, whole_BQ, start_B, user, dot_USL)
            for at in range(min(USERS, num_users - user)):
                of_P = of_BP[user + at]
                of_5 = of_P[0], of_P[1], of_P[2], of_P[3], edge_B[user + at] - of_P[4]
                bits = np.uint64(0)
                for side in range(SIDE):
                    own = _reached(dot_USL, at, side, first + side, known_3, of_5)
                    bits |= own << np.uint64(side * LANES)
                word_BW[user + at, word] = bits


@compiled
def _sizes(word_BW: U64, room: int) -> I64:
    """How many rows of each user are marked; none where it is a crowd."""
    size_B = np.zeros(len(word_BW), np.int64)
    for user in range(len(word_BW)):
        size = np.int64(0)
        for word in word_BW[user]:
            size += _num_bits(word)
        size_B[user] = size if size <= room else 0
    return size_B


@compiled
def _rows_of(word_BW: U64, size_B: I64) -> I64:
    """The marked rows, user after user."""
    row_R, num_vectors = np.empty(size_B.sum(), np.int64), word_BW.shape[1] * SIDE
    num = 0
    for user in range(len(word_BW)):
        if size_B[user] == 0:
            continue
        for at in range(word_BW.shape[1]):
            word = word_BW[user, at]
            while word:
                place = at * BITS + np.int64(_lowest_bit(word))
                row_R[num] = place // LANES + place % LANES * num_vectors
                num += 1
                word &= word - np.uint64(1)
    return row_R
