"""Pure: what the scan found → the list a user gets.

Order is by score, best first, ties by item id (code points). Knows neither engine nor Redis. A list
that
is cut inside a group of equal scores needs every member of that group to break the tie: where the
fetched
rows may not hold them all, `pick` says so and the caller ranks that user over the whole catalogue.
"""

from collections.abc import Container
from typing import Any

import numpy as np
import numpy.typing as npt

from afterclick.serving.engine import F32, I64
from afterclick.serving.scanner import MASKED
from afterclick.serving.texts import DECIMALS, SCORE_MAX, Ranked, Texts, ranked_of


def pick(
    scores_K: F32,
    rows_K: I64,
    ids_N: npt.NDArray[np.object_],
    *,
    want: int,
    drop: Container[str] = (),
    complete: bool = False,
) -> Ranked | None:
    """Best `want` items of one user.

    Args:
        scores_K: scores in falling order.
        rows_K: their rows.
        ids_N: item id of every row.
        want: items wanted; fewer where the catalogue has no more.
        drop: ids left out.
        complete: the rows given are the whole catalogue.

    Returns:
        The list, or None where the rows fetched cannot decide it.
    """
    valid = int(np.searchsorted(-scores_K, -MASKED / 2))
    complete = complete or valid < len(scores_K)
    scores, ids = scores_K[:valid].tolist(), ids_N[rows_K[:valid]].tolist()
    if drop:
        kept = [at for at, item in enumerate(ids) if item not in drop]
        scores, ids = [scores[at] for at in kept], [ids[at] for at in kept]
    if not complete and (len(ids) <= want or scores[want - 1] == float(scores_K[valid - 1])):
        return None
    head = scores[: want + 1]
    if len(set(head)) != len(head):
        order = sorted(range(len(ids)), key=lambda at: (-scores[at], ids[at]))
        scores, ids = [scores[at] for at in order], [ids[at] for at in order]
    return ranked_of(ids[:want], rounded(np.array(scores[:want])))


def pick_plain(scores_BK: F32, rows_BK: I64, texts: Texts, *, want: int) -> list[Ranked | None]:
    """`pick` for many users at once where there is nothing to decide.

    Returns:
        Per user the list; None for one with ties, masked rows or too few rows, or scores that are
        not written so fast, whom `pick` must see.
    """
    if scores_BK.shape[1] <= want:
        return [None] * len(scores_BK)
    near = scores_BK[:, : want + 1]
    plain = (near[:, 1:] < near[:, :-1]).all(axis=1) & (near[:, -1] > MASKED / 2)
    plain &= (np.abs(near[:, [0, -1]]) <= SCORE_MAX).all(axis=1)
    ranked = texts.ranked(near, rows_BK, np.where(plain, want, 0))
    return [own if fine else None for own, fine in zip(ranked, plain.tolist(), strict=True)]


def rank_all(
    scores_N: F32, ids_N: npt.NDArray[np.object_], *, want: int, drop: Container[str] = ()
) -> Ranked:
    """Best `want` items of one user by sorting the whole catalogue: slow, obvious, the oracle of
    `pick`.
    """
    rows = np.argsort(-scores_N, kind="stable")
    ranked = pick(scores_N[rows], rows, ids_N, want=want, drop=drop, complete=True)
    assert ranked is not None
    return ranked


def rounded(scores: npt.NDArray[np.float64]) -> list[Any]:
    """As they stand in lists."""
    shown: list[Any] = np.round(scores, DECIMALS).tolist()
    return shown
