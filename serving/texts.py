"""Lists as JSON: ids that are encoded already, scores written digit by digit, in a compiled loop.

The bytes are those that msgspec would write. Knows no order and no user. Shape letters: N items, B
users, K places of a list, A bytes of all ids together.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from afterclick.serving.compiled import compiled

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
T = TypeVar("T", bound=np.generic)

DECIMALS = 4
"""Scores in lists are for people; the order is decided before they are rounded."""

SCORE_MAX = 1e10
"""Larger ones are left to msgspec: all digits of smaller ones fit a float64."""

_SCALE = 10.0**DECIMALS
_SCORE_BYTES = 18
"""Sign, eleven digits, point, four digits, comma."""
_COMMA, _POINT, _MINUS, _ZERO = (ord(letter) for letter in ",.-0")


class Ranked(NamedTuple):
    """Items of one user, best first, with their scores, rounded to `DECIMALS`."""

    text: bytes
    """As JSON: `"items":[…],"scores":[…]`."""

    @property
    def items(self) -> list[str]:
        """Ids."""
        return _decoded(self).items

    @property
    def scores(self) -> list[float]:
        """One per item."""
        return _decoded(self).scores


class _Fields(msgspec.Struct):
    items: list[str]
    scores: list[float]


def _decoded(ranked: Ranked) -> _Fields:
    return msgspec.json.decode(b"{%b}" % ranked.text, type=_Fields)


def ranked_of(items: list[str], scores: list[float]) -> Ranked:
    """A list from ids and scores that are rounded already."""
    return Ranked(msgspec.json.encode(_Fields(items, scores))[1:-1])


class Texts:
    """JSON of ids by their number, each with a comma behind it; ids come, and none goes.

    Others may read meanwhile: what stands there stays as it is, in the old arrays and in new ones.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._text_A = np.zeros(0, np.uint8)
        self._end_N = np.zeros(0, np.int64)
        self._num = 0
        self.extend(ids)

    def extend(self, ids: Sequence[str]) -> None:
        """Take further ids, under the next numbers."""
        texts = [msgspec.json.encode(item_id) + b"," for item_id in ids]
        end_N = np.cumsum([self._used, *map(len, texts)])
        fresh_A = np.frombuffer(b"".join(texts), np.uint8)
        self._text_A = _with_room(self._text_A, self._used, int(end_N[-1]))
        self._text_A[end_N[0] : end_N[-1]] = fresh_A
        self._end_N = _with_room(self._end_N, self._num, self._num + len(texts))
        self._end_N[self._num : self._num + len(texts)] = end_N[1:]
        self._num += len(texts)

    @property
    def _used(self) -> int:
        return int(self._end_N[self._num - 1]) if self._num else 0

    def ranked(self, score_BK: F32, number_BK: I64, num_B: I64) -> list[Ranked]:
        """Lists of users.

        Args:
            score_BK: best first, none above `SCORE_MAX` in size.
            number_BK: of the items.
            num_B: how many of the places are a user's.
        """
        score_BK, number_BK = map(np.ascontiguousarray, (score_BK, number_BK))
        out_A, end_B2 = _written(score_BK, number_BK, num_B, self._text_A, self._end_N)
        out, ranked, begin = out_A.tobytes(), [], 0
        for middle, end in end_B2.tolist():
            pair = out[begin:middle], out[middle:end]
            ranked.append(Ranked(b'"items":[%b],"scores":[%b]' % pair))
            begin = end
        return ranked


def _with_room(array: npt.NDArray[T], used: int, size: int) -> npt.NDArray[T]:
    """The array, or a copy of what is used of it with room for more."""
    if size <= len(array):
        return array
    grown = np.zeros(size + size // 8, array.dtype)
    grown[:used] = array[:used]
    return grown


@compiled
def _written(score_BK: F32, number_BK: I64, num_B: I64, text_A: U8, end_N: I64) -> tuple[U8, I64]:
    """Ids of each user, then the scores, without brackets; where either ends."""
    room = 0
    for user in range(len(num_B)):
        for at in range(num_B[user]):
            number = number_BK[user, at]
            room += _SCORE_BYTES + end_N[number] - (end_N[number - 1] if number > 0 else 0)
    out_A, end_B2, end = np.empty(room, np.uint8), np.empty((len(num_B), 2), np.int64), 0
    for user in range(len(num_B)):
        for at in range(num_B[user]):
            number = number_BK[user, at]
            for byte in text_A[end_N[number - 1] if number > 0 else 0 : end_N[number]]:
                out_A[end] = byte
                end += 1
        end -= num_B[user] > 0  # no comma behind the last
        end_B2[user, 0] = end
        for at in range(num_B[user]):
            end = _write_score(out_A, end, score_BK[user, at])
        end -= num_B[user] > 0
        end_B2[user, 1] = end
    return out_A[:end], end_B2


@compiled
def _write_score(out_A: U8, end: int, score: float) -> int:
    """The shortest decimal with a digit behind the point, and a comma; the new end."""
    scaled = np.rint(np.float64(score) * _SCALE)
    if np.signbit(scaled):
        out_A[end] = _MINUS
        end += 1
    digits = np.int64(abs(scaled))
    whole, part = digits // 10_000, digits % 10_000
    length, rest = 1, whole // 10
    while rest > 0:
        length, rest = length + 1, rest // 10
    for at in range(length - 1, -1, -1):
        out_A[end + at] = _ZERO + whole % 10
        whole //= 10
    end += length
    out_A[end] = _POINT
    unit = 1000
    while True:
        end += 1
        out_A[end] = _ZERO + part // unit
        part %= unit
        unit //= 10
        if part == 0:
            break
    out_A[end + 1] = _COMMA
    return end + 2
