"""What ranks and lists are worth: hits and ranks at K, properties of the lists, intervals.

Pure functions of arrays; knows no model, file or torch. One relevant item per prediction, the next
one, so recall is the hit rate and an ideal DCG is 1. Ties count against us: whoever makes a rank
puts every item of the target's score before it. Shape letters: X predictions, N items, K places of
a list, G groups (sessions or users), M figures, D vector.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

CUTOFFS = (1, 5, 10, 20)

MISS = 1 << 60
"""Rank of a target that cannot be ranked."""

NOTHING = -1
"""Code in a list's place that holds no item."""

OF_TEST = "test/"
"""Before the method in a manifest's metrics, where they are of a test file."""

RESAMPLES = 1000
"""Of a bootstrap: its own noise is then about 2% of an interval's width."""

LEVEL = 0.95
"""Share of the resamples inside an interval."""

GROUPS_AT_ONCE = 1 << 22
"""Draws held at once: 32 MB."""

LISTS_AT_ONCE = 4096
"""Lists whose vectors are held at once: 40 MB at 20 places and 128 floats."""


class Ranking(NamedTuple):
    """What one method made of the same predictions, in the same order, as every other method."""

    rank_X: I64
    """Place of the target, best is 1; `MISS` where it is not ranked."""
    top_XK: I64
    """Codes of the best items, best first; `NOTHING` where there is none."""


def figures(rank_X: I64) -> dict[str, F64]:
    """One value per prediction and metric at every cut-off; their means are the metrics.

    `hit_rate` (recall, since one item is relevant), `mrr`, `ndcg`, `precision` (hits / k) and `f1`
    (harmonic mean of precision and recall: 2 / (k + 1) for a hit).
    """
    found: dict[str, F64] = {}
    rank_X = np.asarray(rank_X, np.int64)
    for k in CUTOFFS:
        hit_X = (rank_X <= k).astype(np.float64)
        safe_X = np.minimum(rank_X, k)  # the logarithm of a miss is of no use
        found[f"hit_rate_{k}"] = hit_X
        found[f"mrr_{k}"] = hit_X / safe_X
        found[f"ndcg_{k}"] = hit_X / np.log2(1 + safe_X)
        found[f"precision_{k}"] = hit_X / k
        found[f"f1_{k}"] = hit_X * 2 / (k + 1)
    return found


def rates(rank_X: I64) -> dict[str, float]:
    """Means of `figures` as fractions, 0 without a prediction, and how many `predictions`."""
    count = len(rank_X)
    means = {
        name: float(value_X.mean()) if count else 0.0 for name, value_X in figures(rank_X).items()
    }
    return {**means, "predictions": float(count)}


def intervals(
    rank_X: I64, group_X: I64, *, seed: int, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap of every rate: 95% of what other samples of groups would have given.

    Whole groups are drawn with replacement, because predictions of one session or user are not
    independent: resampling predictions would give intervals that are too narrow.

    Args:
        rank_X: as in `figures`.
        group_X: number of the session or user of each prediction, any whole numbers.
        seed: of the draws; equal seeds give equal intervals, and methods on the same predictions
            the same draws.
        resamples: how many.

    Returns:
        Lower and upper end per metric; (0, 0) without a prediction.
    """
    value_XM = np.stack(list(figures(rank_X).values()), axis=1)
    names = list(figures(rank_X))
    if not len(rank_X):
        return dict.fromkeys(names, (0.0, 0.0))
    group_X = np.unique(group_X, return_inverse=True)[1]
    order = np.argsort(group_X, kind="stable")
    begin_G = np.searchsorted(group_X[order], np.arange(group_X.max() + 1))
    sum_GM = np.add.reduceat(value_XM[order], begin_G, axis=0)
    count_G = np.bincount(group_X).astype(np.float64)
    num = len(count_G)
    rng = np.random.default_rng(seed)
    means = []
    for begin in range(0, resamples, step := max(1, GROUPS_AT_ONCE // num)):
        rows = min(step, resamples - begin)
        drawn = rng.integers(num, size=(rows, num)) + np.arange(rows)[:, None] * num
        weight_RG = np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num)
        means.append((weight_RG @ sum_GM) / (weight_RG @ count_G)[:, None])
    tail = (1 - LEVEL) / 2
    low_M, high_M = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return {
        name: (float(low), float(high))
        for name, low, high in zip(names, low_M, high_M, strict=True)
    }


def coverage(top_XK: I64, num_items: int) -> float:
    """Share of the items that stand in at least one list."""
    return float((_shown(top_XK, num_items) > 0).mean()) if num_items else 0.0


def gini(top_XK: I64, num_items: int) -> float:
    """How unequally the places go to items: 0 for all alike, near 1 for a few that take all.

    Gini coefficient of how often each item stands in a list, items that never do included.
    """
    count_N = np.sort(_shown(top_XK, num_items))
    total = int(count_N.sum())
    if not total:
        return 0.0
    place_N = np.arange(1, num_items + 1)
    return float(((2 * place_N - num_items - 1) * count_N).sum() / (num_items * total))


def novelty(top_XK: I64, clicks_N: F64) -> float:
    """Mean self-information of listed items in bits: -log2 of their share of the training clicks.

    Every item is given one click more than it had, so that one never clicked has a finite value.

    Args:
        top_XK: lists.
        clicks_N: clicks per item in training.
    """
    bits_N = -np.log2((clicks_N + 1) / (clicks_N.sum() + len(clicks_N)))
    return float(bits_N[top_XK[top_XK != NOTHING]].mean()) if (top_XK != NOTHING).any() else 0.0


def diversity(top_XK: I64, vector_ND: npt.NDArray[np.floating]) -> float:
    """Mean over lists of 1 - the mean cosine of the list's pairs of items.

    Args:
        top_XK: lists; one with fewer than two items does not count.
        vector_ND: any vectors of the items; a zero vector has cosine 0 to all.
    """
    norm_N1 = np.linalg.norm(vector_ND, axis=1, keepdims=True)
    unit_ND = vector_ND / np.where(norm_N1 > 0, norm_N1, 1)
    own_N = (norm_N1[:, 0] > 0).astype(np.float64)  # cosine of an item with itself
    found = []
    for begin in range(0, len(top_XK), LISTS_AT_ONCE):
        top = top_XK[begin : begin + LISTS_AT_ONCE]
        there = top != NOTHING
        sum_XD = np.einsum("xkd,xk->xd", unit_ND[top], there.astype(unit_ND.dtype))
        count_X = there.sum(axis=1)
        # The sum over all pairs is the squared length of the sum, less every item with itself.
        pairs_X = (sum_XD.astype(np.float64) ** 2).sum(axis=1) - (own_N[top] * there).sum(axis=1)
        some = count_X > 1
        found.append(1 - pairs_X[some] / (count_X[some] * (count_X[some] - 1)))
    values = np.concatenate(found) if found else np.zeros(0)
    return float(values.mean()) if len(values) else 0.0


def _shown(top_XK: I64, num_items: int) -> I64:
    return np.bincount(top_XK[top_XK != NOTHING], minlength=num_items)


def headlines(metrics: dict[str, dict[str, float]]) -> dict[str, float | dict[str, float]]:
    """Per method HR@20 and MRR@20, and how many predictions stand behind them."""
    shown: dict[str, float | dict[str, float]] = {
        method: {name: values[name] for name in ("hit_rate_20", "mrr_20")}
        for method, values in metrics.items()
    }
    shown["predictions"] = next(iter(metrics.values()))["predictions"]
    return shown
