"""The best of many scores, exactly, in the order of lists: falling, equal ones by row.

Most scores are never looked at one by one: folded over each other they leave an edge that at least
as many reach as are wanted. Knows no item, and no graph. Shape letters: B users, N rows, K results,
W columns of the folded scores, R rows that are left.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

COLUMNS = 8
"""So many columns for each result that is wanted: then about a quarter more than those reach the
edge.
"""

CROWD = 8
"""So many times as many as wanted are sorted apart: most of them are equal, masked rows perhaps."""

_ROW_MAX = (1 << 31) - 1


def best_rows(score_BN: F32, k: int) -> tuple[F32, I64]:
    """Scores and rows of every user's k best, best first, equal scores by row number.

    Args:
        score_BN: finite; at least k rows, fewer than 2^31.
        k: at least 1.
    """
    num_users, num_rows = score_BN.shape
    folds = num_rows // (COLUMNS * k)
    if folds < 2:
        row_BR = np.broadcast_to(np.arange(num_rows), score_BN.shape)
        return best_first(score_BN, row_BR, k)
    width = num_rows // folds
    folded_BW = score_BN[:, : folds * width].reshape(num_users, folds, width).max(axis=1)
    edge_B = np.partition(folded_BW, width - k, axis=1)[:, width - k]
    at_R = np.flatnonzero(score_BN >= edge_B[:, None])
    bound_B1 = np.arange(num_users + 1) * num_rows
    begin_B1 = np.searchsorted(at_R, bound_B1)
    size_B = np.diff(begin_B1)
    crowded = np.flatnonzero(size_B > CROWD * k)
    if len(crowded):
        return _with_crowds(score_BN, k, crowded)
    row_R = at_R - np.repeat(bound_B1[:-1], size_B)
    score_BK, row_BK, _ = best_of_groups(score_BN.ravel().take(at_R, mode="clip"), row_R, size_B, k)
    return score_BK, row_BK


def best_of_groups(score_R: F32, row_R: I64, size_B: I64, k: int) -> tuple[F32, I64, I64]:
    """Scores and rows of every user's k best, as `best_rows`, and how many there are.

    Args:
        score_R: user after user.
        row_R: below 2^31, all different for a user.
        size_B: entries of each user.
        k: columns of the answer; fewer where nobody has so many. What stands behind a user's own
            number of results says nothing.
    """
    end_B, num_users = np.cumsum(size_B), len(size_B)
    widest = int(size_B.max())
    key_BR = np.full((num_users, widest), np.iinfo(np.int64).max)
    offset_B = np.arange(num_users) * widest - (end_B - size_B)
    key_BR.ravel()[np.arange(len(row_R)) + np.repeat(offset_B, size_B)] = _keys(score_R, row_R)
    key_BR.sort(axis=1)
    return *_apart(key_BR[:, :k]), np.minimum(size_B, k)


def best_first(score_BR: F32, row_BR: I64, k: int) -> tuple[F32, I64]:
    """The k best of every user's rows, equal scores by row number.

    Rows below 2^31. A partition is enough: sorting all takes longer than scoring them.
    """
    key_BR = _keys(score_BR, row_BR)
    return _apart(np.sort(np.partition(key_BR, k - 1, axis=1)[:, :k], axis=1))


def _with_crowds(score_BN: F32, k: int, crowded: I64) -> tuple[F32, I64]:
    """Those with many equal scores one by one, the others together."""
    score_BK = np.empty((len(score_BN), k), np.float32)
    row_BK = np.empty((len(score_BN), k), np.int64)
    for user in crowded.tolist():
        row_BK[user] = np.argsort(-score_BN[user], kind="stable")[:k]
        score_BK[user] = score_BN[user, row_BK[user]]
    others = np.setdiff1d(np.arange(len(score_BN)), crowded)
    if len(others):
        score_BK[others], row_BK[others] = best_rows(score_BN[others], k)
    return score_BK, row_BK


def _keys(score: F32, row: I64) -> I64:
    """Score and row as one whole number, the best one lowest, no two alike."""
    rising = _flip((score + np.float32(0)).view(np.int32))  # -0.0 would stand behind 0.0
    keys: I64 = ~((rising.astype(np.int64) << 32) | (_ROW_MAX - row))
    return keys


def _apart(key_BK: I64) -> tuple[F32, I64]:
    key_BK = ~key_BK
    score_BK: F32 = _flip((key_BK >> 32).astype(np.int32)).view(np.float32)
    return score_BK, _ROW_MAX - (key_BK & _ROW_MAX)


def _flip(bits: Any) -> Any:
    """Bits of floats ↔ integers in the same order; it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
