"""What a smaller model learns from a release: its scores.

Knows no training loop; `fit` adds the loss to its own. Shape letters: X predictions, P positions,
C items compared, N items, D scan vector.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from afterclick.serving.engine import F32
from afterclick.serving.releases import LoadedRelease
from afterclick.training.data import I64, Sequences, held_out
from afterclick.training.fit import Guide
from afterclick.training.model import Recommender
from afterclick.training.trial import release_queries

TAUGHT_ITEMS = 1024
"""Items whose scores a batch of distillation compares; a larger catalogue is drawn from."""


def teacher_guide(loaded: LoadedRelease, item_ids: Sequence[str], seed: int) -> Guide:
    """Divergence of the smaller model's scores from the release's, over a draw of items.

    Source: Hinton, Vinyals & Dean 2015, at temperature 1.
    """
    rng = np.random.default_rng(seed)
    row_N = rows_of(loaded, item_ids)
    known = np.flatnonzero(row_N >= 0)
    scan_ND = loaded.catalog.scan_vectors_ND
    queries: list[tuple[Sequences, F32]] = []

    def query_of(part: Sequences) -> F32:
        for other, query_PD in queries:
            if other is part:
                return query_PD
        query_PD = np.zeros((part.num_events, scan_ND.shape[1]), np.float32)
        held = held_out(part, None)
        at_X = np.flatnonzero(held.target_P)
        query_PD[at_X] = release_queries(loaded, held, row_N)
        queries.append((part, query_PD))
        return query_PD

    def guide(model: Recommender, h_XH: torch.Tensor, part: Sequences, at_X: I64) -> torch.Tensor:
        item_C = known
        if len(known) > TAUGHT_ITEMS:
            item_C = np.sort(rng.choice(known, TAUGHT_ITEMS, replace=False))
        device = h_XH.device
        wanted_XC = torch.from_numpy(query_of(part)[at_X] @ scan_ND[row_N[item_C]].T).to(device)
        item = torch.from_numpy(item_C).to(device)
        items = model.vectors(model.rows(item))
        score_XC = torch.addmm(items.bias_X, model.query(h_XH), items.item_XD.T)
        return functional.kl_div(
            functional.log_softmax(score_XC, 1),
            functional.log_softmax(wanted_XC, 1),
            log_target=True,
            reduction="batchmean",
        )

    return guide


def rows_of(loaded: LoadedRelease, item_ids: Sequence[str]) -> I64:
    """Rows of items in a release's catalogue; -1 where it has none."""
    rows = (loaded.catalog.row(item_id) for item_id in item_ids)
    return np.array([-1 if row is None else row for row in rows], np.int64)
