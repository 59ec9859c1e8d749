"""Full ranking over the whole catalogue: the next item at every position after the first.

Ties count against us, nothing is filtered, the mean is over predictions; an item that the model
does not know is a miss as a target and no step as a click. Shape letters: X predictions, N items,
T steps, B sequences, H hidden units.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afterclick.training.data import I64, UNKNOWN, Held
from afterclick.training.metrics import CUTOFFS, MISS, NOTHING, Ranking
from afterclick.training.model import Recommender, Steps

LIST = max(CUTOFFS)
"""Items of a list."""

CELLS_MAX = 1 << 23
"""Scores held at once: 32 MB of float32."""

STEPS_MAX = 1 << 14
"""Steps of one padded batch."""


class Question(NamedTuple):
    """A batch of sequences and which of their states predict what."""

    steps: Steps
    step_X: Tensor
    """Steps taken before the prediction; 0 is the zero state."""
    row_X: Tensor
    """Sequence in the batch."""
    target_X: I64
    at_X: I64
    """Position of the target in the evaluated sequences."""


def rank_of(score_XN: Tensor, target_X: I64) -> I64:
    """Place of each target, best is 1; every item with the target's score stands before it.

    An item scored -inf is not ranked: such a target is a `MISS`, as is an unknown one.
    """
    target = torch.from_numpy(np.maximum(target_X, 0)).to(score_XN.device)
    own_X1 = score_XN.gather(1, target[:, None])
    rank_X = torch.where(own_X1[:, 0] > -torch.inf, (score_XN >= own_X1).sum(1), MISS)
    return np.where(target_X == UNKNOWN, MISS, rank_X.cpu().numpy())


def ranking_of(score_XN: Tensor, target_X: I64) -> Ranking:
    """Ranks of the targets, and the `LIST` best items; equal scores stand in any order there."""
    score_XK, top = score_XN.topk(min(LIST, score_XN.shape[1]))
    top_XK = np.full((len(score_XN), LIST), NOTHING, np.int64)
    top_XK[:, : top.shape[1]] = torch.where(score_XK > -torch.inf, top, NOTHING).cpu().numpy()
    return Ranking(rank_of(score_XN, target_X), top_XK)


@torch.no_grad()
def model_ranks(
    model: Recommender, held: Held, *, step_ND: Tensor | None = None, scan_ND: Tensor | None = None
) -> I64:
    """Rank every target, in order of position, with the model as it is.

    Args:
        model: is set to evaluation, and left so.
        held: codes are rows of the item tables, or `UNKNOWN`.
        step_ND: a release's step vectors; None takes the model's own.
        scan_ND: a release's scan vectors (N, D + 1); likewise.
    """
    model.eval()
    device = model.bias.device
    if step_ND is None:
        step_ND = model.step_vectors(torch.arange(model.num_items, device=device))
    if scan_ND is None:
        scan_ND = model.scan_vectors()
    vector_DN, bias_N = scan_ND[:, :-1].T.contiguous(), scan_ND[:, -1].contiguous()
    rows_max = max(1, CELLS_MAX // len(scan_ND))
    ranks, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for question in questions(held, device=device):
        h_XH = _states_before(model, question, step_ND)
        places.append(question.at_X)
        for begin in range(0, len(question.target_X), rows_max):
            target_X = question.target_X[begin : begin + rows_max]
            part = slice(begin, begin + rows_max)
            past = model.past(
                step_ND, question.steps.item_TB, question.step_X[part], question.row_X[part]
            )
            q_XD = model.query(h_XH[part], past)
            ranks.append(rank_of(torch.addmm(bias_N, q_XD, vector_DN), target_X))
    order = np.argsort(np.concatenate(places))
    return np.concatenate(ranks)[order]


@torch.no_grad()
def model_queries(model: Recommender, held: Held, step_ND: Tensor) -> npt.NDArray[np.float32]:
    """(X, D + 1) queries before every target, in order of position, the 1 for the bias included.

    Args:
        model: is set to evaluation, and left so.
        held: codes are rows of the table, or `UNKNOWN`.
        step_ND: a release's step vectors.
    """
    model.eval()
    places, queries = [np.zeros(0, np.int64)], []
    for question in questions(held, device=model.bias.device):
        places.append(question.at_X)
        past = model.past(step_ND, question.steps.item_TB, question.step_X, question.row_X)
        h_XH = _states_before(model, question, step_ND)
        queries.append(model.query(h_XH, past).cpu().numpy())
    query_XD = np.concatenate(queries)[np.argsort(np.concatenate(places))]
    return np.pad(query_XD, ((0, 0), (0, 1)), constant_values=1)


def questions(held: Held, *, device: torch.device) -> Iterator[Question]:
    """Padded batches of sequences of about equal length that cover every target once."""
    sequences, target_P = held
    columns_P = (sequences.item_P, sequences.event_P, sequences.gap_P, sequences.hours())
    known_P = sequences.item_P != UNKNOWN
    known_before_P1 = np.concatenate([[0], np.cumsum(known_P)])
    place_K = np.flatnonzero(known_P)
    begin_S = known_before_P1[sequences.start_S1[:-1]]
    sequence_P = sequences.sequence_numbers()
    at_X = np.flatnonzero(target_P)
    step_X = known_before_P1[at_X] - begin_S[sequence_P[at_X]]
    # Only as many steps as the last target of a sequence needs.
    size_S = np.zeros(sequences.num_sequences, np.int64)
    np.maximum.at(size_S, sequence_P[at_X], step_X)
    asked_S = np.unique(sequence_P[at_X])
    order = asked_S[np.argsort(size_S[asked_S], kind="stable")]
    first_of_S = np.searchsorted(sequence_P[at_X], np.arange(sequences.num_sequences + 1))
    begin = 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * max(size_S[order[end]], 1) <= STEPS_MAX:
            end += 1
        members = order[begin:end]
        begin = end
        longest = max(int(size_S[members].max()), 1)
        step_TB = np.arange(longest)[:, None]
        inside_TB = step_TB < size_S[members][None, :]
        if len(place_K):
            picked_TB = np.where(inside_TB, begin_S[members][None, :] + step_TB, 0)
            position_TB = place_K[picked_TB]
            arrays = [np.where(inside_TB, column[position_TB], 0) for column in columns_P]
        else:
            arrays = [np.zeros(inside_TB.shape, np.int64)] * len(columns_P)
        counts = first_of_S[members + 1] - first_of_S[members]
        asked = np.repeat(first_of_S[members] - (np.cumsum(counts) - counts), counts)
        asked = asked + np.arange(counts.sum())
        yield Question(
            Steps(*(torch.from_numpy(array).to(device) for array in arrays)),
            torch.from_numpy(step_X[asked]).to(device),
            torch.from_numpy(np.repeat(np.arange(len(members)), counts)).to(device),
            sequences.item_P[at_X[asked]],
            at_X[asked],
        )


def _states_before(model: Recommender, question: Question, step_ND: Tensor) -> Tensor:
    """(X, H) hidden state from which each prediction is made."""
    x_TBD = model.add_context(step_ND[question.steps.item_TB], question.steps)
    h_TBH: Tensor = model.cell(x_TBD)[0]
    zero_1BH = torch.zeros_like(h_TBH[:1])
    state: Tensor = torch.cat([zero_1BH, h_TBH])[question.step_X, question.row_X]
    return state
