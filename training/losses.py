"""What a query should score high and low: losses over the catalogue or a sample of it.

Knows no epochs and no files. Shape letters: X predictions, N items, C items scored in this batch,
D item vector.

`cosine` and `softmax`: cross-entropy over the scored items, a sample corrected by its log inclusion
probability (logQ; Bengio & Senécal 2008, Yi et al. 2019). `bpr-max`: Hidasi & Karatzoglou, CIKM
2018. `bce`: binary cross-entropy against the sampled items with the positive's probability
calibrated, Petrov & Macdonald, RecSys 2023 (gSASRec).
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from afterclick.training.settings import TrainingSettings

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

BPR_PENALTY = 1.0
"""Weight of the squared scores of negatives in BPR-max, the middle of the paper's tuned range."""

CALIBRATION = 0.75
"""gSASRec's t: 0 is plain BCE, 1 undoes the sampling of negatives wholly; the paper's default."""


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
        self.num_clicked = len(clicked)
        self._everything = Drawn(clicked, np.zeros(len(clicked), np.float32))
        self._is_whole = len(clicked) <= limit
        by_count = clicked[np.argsort(-count_N[clicked], kind="stable")]
        self._head, self._tail = by_count[: limit // 2], by_count[limit // 2 :]
        self._num_drawn = min(limit - limit // 2, len(self._tail))
        self._share_N = count_N / max(int(count_N.sum()), 1)
        self._is_head_N = np.zeros(len(count_N), bool)
        self._is_head_N[self._head] = True

    def draw(self, clicked_X: I64, rng: np.random.Generator) -> Drawn:
        """Items for a batch with these clicks, every one of them included."""
        if self._is_whole:
            return self._everything
        picked = rng.choice(self._tail, self._num_drawn, replace=False, shuffle=False)
        item_C = np.unique(np.concatenate([self._head, picked, clicked_X]))
        by_draw = self._num_drawn / len(self._tail)
        by_batch_C = 1 - (1 - self._share_N[item_C]) ** len(clicked_X)
        inclusion_C = 1 - (1 - by_draw) * (1 - by_batch_C)
        inclusion_C[self._is_head_N[item_C]] = 1.0
        return Drawn(item_C, np.log(inclusion_C).astype(np.float32))


class Scored(NamedTuple):
    """Queries and the items that they are compared with."""

    query_XD: Tensor
    item_CD: Tensor
    bias_C: Tensor
    column_X: Tensor
    """Column of each query's target."""
    log_inclusion_C: Tensor
    num_items: int
    """Items that could have been drawn."""
    weight_X: Tensor | None = None
    """Of each prediction, mean about 1; None weighs all alike."""


def next_item_loss(scored: Scored, settings: TrainingSettings) -> Tensor:
    """Weighted sum of the settings' loss over the targets, in nats."""
    if settings.loss in ("cosine", "softmax"):
        return _CrossEntropy.apply(*scored[:5], scored.weight_X)  # type: ignore[no-any-return]
    loss_X = _bpr_max(scored) if settings.loss == "bpr-max" else _calibrated_bce(scored)
    return loss_X.sum() if scored.weight_X is None else loss_X @ scored.weight_X


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy whose one large array, the scores, is turned in place into its own gradient.

    Autograd would hold three of them: at 1,024 predictions over 4,096 items a third of a step was
    spent on reading and writing 16 MB each time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_XD: Tensor,
        item_CD: Tensor,
        bias_C: Tensor,
        column_X: Tensor,
        log_inclusion_C: Tensor,
        weight_X: Tensor | None,
    ) -> Tensor:
        score_XC = torch.addmm(bias_C - log_inclusion_C, query_XD, item_CD.T).float()
        # A target is scored whatever the draw, so its own score takes no correction.
        row_X = torch.arange(len(query_XD), device=query_XD.device)
        own_X = score_XC[row_X, column_X] + log_inclusion_C[column_X]
        score_XC[row_X, column_X] = own_X
        largest_X1 = score_XC.amax(1, keepdim=True)
        share_XC = score_XC.sub_(largest_X1).exp_()
        sum_X1 = share_XC.sum(1, keepdim=True)
        loss_X = (sum_X1.log() + largest_X1)[:, 0] - own_X
        share_XC.div_(sum_X1)
        share_XC[row_X, column_X] -= 1
        if weight_X is not None:
            loss_X = loss_X * weight_X
            share_XC.mul_(weight_X[:, None])
        is_half = torch.is_autocast_enabled(query_XD.device.type)
        kind = torch.bfloat16 if is_half else torch.float32
        ctx.save_for_backward(share_XC.sum(0), share_XC.to(kind), query_XD, item_CD)
        return loss_X.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias_grad_C, share_XC, query_XD, item_CD = ctx.saved_tensors
        kind = share_XC.dtype
        query_grad_XD = (share_XC @ item_CD.to(kind)).to(query_XD.dtype) * grad
        item_grad_CD = (share_XC.T @ query_XD.to(kind)).to(item_CD.dtype) * grad
        return query_grad_XD, item_grad_CD, bias_grad_C * grad, None, None, None


def _bpr_max(scored: Scored) -> Tensor:
    """-log of the softmax-weighted share of negatives below the target, and a penalty on theirs."""
    score_XC, own_X1 = _scores(scored)
    is_own_XC = torch.zeros_like(score_XC, dtype=torch.bool)
    is_own_XC.scatter_(1, scored.column_X[:, None], True)
    weight_XC = torch.softmax(score_XC.masked_fill(is_own_XC, -torch.inf), 1)
    above_X = (weight_XC * torch.sigmoid(own_X1 - score_XC)).sum(1)
    penalty_X = (weight_XC * score_XC.square()).sum(1)
    return BPR_PENALTY * penalty_X - torch.log(above_X + 1e-24)


def _calibrated_bce(scored: Scored) -> Tensor:
    """The target's, and the mean over the negatives."""
    score_XC, own_X1 = _scores(scored)
    num_negatives = max(score_XC.shape[1] - 1, 1)
    share = num_negatives / max(scored.num_items - 1, num_negatives)
    beta = share * (CALIBRATION * (1 - 1 / share) + 1 / share)
    own_X = own_X1[:, 0]
    negative_X = functional.softplus(score_XC).sum(1) - functional.softplus(own_X)
    return beta * functional.softplus(-own_X) + negative_X / num_negatives


def _scores(scored: Scored) -> tuple[Tensor, Tensor]:
    """(X, C) scores, and (X, 1) those of the targets."""
    score_XC = torch.addmm(scored.bias_C, scored.query_XD, scored.item_CD.T)
    return score_XC, score_XC.gather(1, scored.column_X[:, None])
