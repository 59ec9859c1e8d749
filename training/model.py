"""The recommender in torch: item vectors, a recurrent cell, a query that scores every item.

Knows no data, loss, or ONNX. Shape letters: T steps, B sequences, X any number of rows, N items,
D item vector, H hidden units, Y layers.

What the exported graphs compute is exactly `advance` and `query` here, without dropout. Everything
that depends on an item alone (normalising, scaling) is folded into `step_vectors` and
`scan_vectors`, so that a worker can add an item without knowing the loss.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from afterclick.serving.manifest import EVENTS, GAP_BUCKETS
from afterclick.training.settings import TrainingSettings

STEP_NORM = 3.0
"""Length of a normalised step vector: about 0.26 per entry at D = 128, where the gates' sigmoids
still have slope.
"""

NORM_MIN = 1e-6
"""Smaller norms are taken for this one; the exported graph does the same."""

State = tuple[Tensor, ...]


class Steps(NamedTuple):
    """Inputs of T steps of B sequences: item rows, event codes, gap buckets; int64 each."""

    item_TB: Tensor
    event_TB: Tensor
    gap_TB: Tensor


class Recommender(nn.Module):
    """LSTM or GRU over item vectors that also score the items."""

    def __init__(self, num_items: int, settings: TrainingSettings) -> None:
        super().__init__()
        self.settings = settings
        self.num_items = num_items
        dim, units = settings.dim, settings.units
        self.items = nn.Embedding(num_items, dim)
        nn.init.normal_(self.items.weight, 0.0, dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_items))
        # Zeros: a kind of event or a gap that training never saw must not disturb a state.
        self.events = nn.Embedding(len(EVENTS), dim) if settings.event_vectors else None
        self.gaps = nn.Embedding(GAP_BUCKETS, dim) if settings.gap_vectors else None
        for table in (self.events, self.gaps):
            if table is not None:
                nn.init.zeros_(table.weight)
        kind = nn.LSTM if settings.cell == "lstm" else nn.GRU
        between = settings.dropout if settings.layers > 1 else 0.0
        self.cell: nn.RNNBase = kind(dim, units, settings.layers, dropout=between)
        self.out = nn.Linear(units, dim)
        self.scale = nn.Parameter(torch.tensor(float(settings.scale)))

    @property
    def is_cosine(self) -> bool:
        """Whether both sides of a score are normalised."""
        return self.settings.loss == "cosine"

    def step_vectors(self, item_X: Tensor) -> Tensor:
        """(X, D) vectors that a touched item feeds into the cell."""
        vector = self.items(item_X)
        return normalise(vector) * STEP_NORM if self.is_cosine else vector

    def item_vectors(self, item_X: Tensor) -> Tensor:
        """(X, D) vectors that a query is compared with, the bias apart."""
        vector = self.items(item_X)
        return normalise(vector) if self.is_cosine else vector

    def scan_vectors(self) -> Tensor:
        """(N, D + 1) item vectors with the bias as last coordinate."""
        every_N = torch.arange(self.num_items, device=self.bias.device)
        return torch.cat([self.item_vectors(every_N), self.bias[:, None]], dim=1)

    def embed(self, steps: Steps) -> Tensor:
        """(T, B, D) inputs of the cell."""
        return self.add_context(self.step_vectors(steps.item_TB), steps)

    def add_context(self, x_TBD: Tensor, steps: Steps) -> Tensor:
        """Add the vectors of event kind and gap to step vectors that are given."""
        if self.events is not None:
            x_TBD = x_TBD + self.events(steps.event_TB)
        if self.gaps is not None:
            x_TBD = x_TBD + self.gaps(steps.gap_TB)
        return x_TBD

    def hidden(self, steps: Steps) -> Tensor:
        """(T, B, H) last layer's hidden state after every step, from the zero state."""
        x_TBD = functional.dropout(self.embed(steps), self.settings.dropout, self.training)
        h_TBH: Tensor = self.cell(x_TBD)[0]
        return h_TBH

    def advance(self, x_TBD: Tensor, state: State) -> State:
        """State tensors (Y, B, H), h first, after T steps of equal length for all sequences."""
        if self.settings.cell == "lstm":
            after: State = self.cell(x_TBD, state)[1]
            return after
        return (self.cell(x_TBD, state[0])[1],)

    def query(self, h_XH: Tensor) -> Tensor:
        """(X, D) query of hidden states; an item's score is `query · item_vector + bias`."""
        h_XH = functional.dropout(h_XH, self.settings.dropout_hidden, self.training)
        q_XD: Tensor = self.out(h_XH)
        return normalise(q_XD) * self.scale if self.is_cosine else q_XD


def normalise(vector: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis."""
    return functional.normalize(vector, dim=-1, eps=NORM_MIN)
