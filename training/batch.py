"""One mini-batch as arrays: which positions it steps through, and which item each state predicts.

Knows no model. Shape letters: T positions of a window, B windows, P positions of the log.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afterclick.serving.manifest import event_code
from afterclick.training.data import I64, Mask, Sequences

PURCHASE = event_code("purchase")

MASKED = 0.2
"""Share of a window's items hidden in a masked warm-up, as in BERT4Rec's and S3-Rec's setting."""


class Batch(NamedTuple):
    """Windows, the longest of T positions; the last position of each is stepped by nobody."""

    at_TB: I64
    """Position in the log; a window's first beyond its end."""
    inside_TB: Mask
    predicts_TB: Mask
    """(T - 1, B): steps after which the state predicts an item."""
    target_TB: I64
    """(T - 1, B): position of that item."""
    masked_TB: Mask
    """(T - 1, B): steps whose item the state does not get to see."""


def batch_of(
    part: Sequences, begin_B: I64, size_B: I64, mask_rng: np.random.Generator | None = None
) -> Batch:
    """Windows as a batch: every state predicts the next item.

    With `mask_rng` a share of the items is hidden, and the state one step after each predicts it:
    what came before and after is known of it.
    """
    step_TB = np.arange(int(size_B.max()))[:, None]
    inside_TB = step_TB < size_B
    at_TB = np.where(inside_TB, begin_B + step_TB, begin_B)
    nothing_TB = np.zeros(inside_TB[1:].shape, bool)
    if mask_rng is None:
        return Batch(at_TB, inside_TB, inside_TB[1:], at_TB[1:], nothing_TB)
    chosen_TB = inside_TB[1:] & (mask_rng.random(nothing_TB.shape) < MASKED)
    predicts_TB, target_TB = nothing_TB.copy(), at_TB[:-1].copy()
    predicts_TB[1:] = chosen_TB[:-1] & inside_TB[2:]
    target_TB[1:] = at_TB[:-2]
    masked_TB = nothing_TB
    masked_TB[:-1] = predicts_TB[1:]
    return Batch(at_TB, inside_TB, predicts_TB, target_TB, masked_TB)


def next_purchases(part: Sequences, batch: Batch) -> tuple[Mask, I64]:
    """(T - 1, B): steps that a purchase follows within the window, and its position."""
    num_steps = len(batch.at_TB)
    step_TB = np.where(
        batch.inside_TB & (part.event_P[batch.at_TB] == PURCHASE),
        np.arange(num_steps)[:, None],
        num_steps,
    )
    next_TB = np.minimum.accumulate(step_TB[::-1], axis=0)[::-1][1:]
    at_TB = np.take_along_axis(batch.at_TB, np.minimum(next_TB, num_steps - 1), axis=0)
    return next_TB < num_steps, at_TB


def keeping(shape: tuple[int, ...], share: float, device: torch.device) -> Tensor:
    """Dropout's factors: 0 for a share of the entries, and the others scaled up for them."""
    return torch.empty(shape, device=device).bernoulli_(1 - share).mul_(1 / (1 - share))
