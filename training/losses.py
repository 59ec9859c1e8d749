"""Cross-entropy of the next item over the catalogue, or over a corrected sample of it.

Knows no epochs and no files. Shape letters: X predictions, N items, C items scored in this batch,
H hidden units.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from afterclick.training.model import Recommender

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


class Drawn(NamedTuple):
    """Items that one batch scores."""

    item_C: I64
    """Rows, ascending."""
    log_inclusion_C: F32
    """Log probability that a batch like this one scores the item; 0 for one that always is."""


class Candidates:
    """Chooses which items a batch scores.

    Up to `limit` items are scored exactly. Beyond that half of the places go to the most frequent
    items, and half to a uniform draw of the others; what the batch itself holds joins them.
    """

    def __init__(self, count_N: I64, limit: int) -> None:
        clicked = np.flatnonzero(count_N)  # what nobody clicks is nobody's alternative
        self._everything = Drawn(clicked, np.zeros(len(clicked), np.float32))
        self._is_whole = len(clicked) <= limit
        by_count = clicked[np.argsort(-count_N[clicked], kind="stable")]
        self._head, self._tail = by_count[: limit // 2], by_count[limit // 2 :]
        self._num_drawn = min(limit - limit // 2, len(self._tail))
        self._share_N = count_N / max(int(count_N.sum()), 1)

    def draw(self, target_X: I64, rng: np.random.Generator) -> Drawn:
        """Items for a batch with these targets, every target among them."""
        if self._is_whole:
            return self._everything
        picked = rng.choice(self._tail, self._num_drawn, replace=False)
        item_C = np.unique(np.concatenate([self._head, picked, target_X]))
        by_draw = self._num_drawn / len(self._tail)
        by_batch_C = 1 - (1 - self._share_N[item_C]) ** len(target_X)
        inclusion_C = 1 - (1 - by_draw) * (1 - by_batch_C)
        inclusion_C[np.isin(item_C, self._head)] = 1.0
        return Drawn(item_C, np.log(inclusion_C).astype(np.float32))


def next_item_loss(
    model: Recommender,
    h_XH: Tensor,
    target_X: I64,
    drawn: Drawn,
    *,
    weight_X: F32 | None = None,
) -> Tensor:
    """Weighted mean of the negative log probability of the targets.

    Args:
        model: gives query, item vectors and biases.
        h_XH: hidden state before each target.
        target_X: rows of the items that came next.
        drawn: items to score; holds every target.
        weight_X: of each prediction, mean about 1; None weighs all alike.
    """
    device = h_XH.device
    item_C = torch.from_numpy(drawn.item_C).to(device)
    column_X = torch.from_numpy(np.searchsorted(drawn.item_C, target_X)).to(device)
    log_inclusion_C = torch.from_numpy(drawn.log_inclusion_C).to(device)
    bias_C = model.bias[item_C] - log_inclusion_C
    score_XC = torch.addmm(bias_C, model.query(h_XH), model.item_vectors(item_C).T)
    # A target is scored whatever the draw, so its own score takes no correction.
    own_X = score_XC.gather(1, column_X[:, None]) + log_inclusion_C[column_X, None]
    score_XC = score_XC.scatter(1, column_X[:, None], own_X)
    if weight_X is None:
        return functional.cross_entropy(score_XC, column_X)
    loss_X = functional.cross_entropy(score_XC, column_X, reduction="none")
    return (loss_X * torch.from_numpy(weight_X).to(device)).mean()
