"""The recommender in torch: item vectors, a recurrent cell, a query that scores every item.

Knows no data, loss, or ONNX. Shape letters: T steps, B sequences, X any number of rows, N items,
D item vector, H hidden units, Y layers, K buckets of content, F entries of content, V entries of a
given vector.

What the exported graphs compute is exactly `advance` and `query` here, without dropout. Everything
that depends on an item alone (its id and content, normalising, scaling) is folded into
`step_vectors` and `scan_vectors`, so that a worker can add an item without knowing the loss.

An item's vector is the sum of its own (by id) and of what it says about itself (hashed features of
its text, a given vector). In training the own one is dropped now and then, so that the content
alone learns to do; an item that training never saw has nothing else.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from afterclick.serving.manifest import EVENTS, GAP_BUCKETS
from afterclick.training.cells import PastAttention, cell_of
from afterclick.training.settings import TrainingSettings
from afterclick.training.text import Content

STEP_NORM = 3.0
"""Length of a normalised step vector: about 0.26 per entry at D = 128, where the gates' sigmoids
still have slope.
"""

NORM_MIN = 1e-6
"""Smaller norms are taken for this one; the exported graph does the same."""

HOURS = 24

State = tuple[Tensor, ...]


class Steps(NamedTuple):
    """Inputs of T steps of B sequences: item rows, event codes, gap buckets, hours of day; int64
    each.
    """

    item_TB: Tensor
    event_TB: Tensor
    gap_TB: Tensor
    hour_TB: Tensor


class Rows(NamedTuple):
    """Rows of the tables that some items need: what a gradient of theirs touches."""

    item_X: Tensor
    id_XD: Tensor
    bias_X: Tensor
    code_C: Tensor
    """Rows of the bucket table that the items meet, ascending; empty without content."""
    bucket_CD: Tensor


class Vectors(NamedTuple):
    """What some items feed into the cell, and what a query is compared with."""

    step_XD: Tensor
    item_XD: Tensor
    bias_X: Tensor


class Past(NamedTuple):
    """The items touched last before X states, newest first; M places each."""

    x_XMD: Tensor
    """Step vectors, zeros where nothing stands."""
    has_XM: Tensor
    """1 where something stands, else 0."""


class Recommender(nn.Module):
    """A recurrent cell over item vectors that also score the items."""

    bucket_K: Tensor
    start_N1: Tensor
    code_F: Tensor
    weight_F: Tensor
    given_NV: Tensor
    trained_N: Tensor
    speaks_N: Tensor

    def __init__(
        self, num_items: int, settings: TrainingSettings, content: Content | None = None
    ) -> None:
        super().__init__()
        self.settings = settings
        self.num_items = num_items
        self.content = content
        dim, units = settings.dim, settings.units
        self.items = nn.Embedding(num_items, dim)
        nn.init.normal_(self.items.weight, 0.0, dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_items))
        # Zeros: a kind of event or a gap that training never saw must not disturb a state.
        self.events = nn.Embedding(len(EVENTS), dim) if settings.event_vectors else None
        self.gaps = nn.Embedding(GAP_BUCKETS, dim) if settings.gap_vectors else None
        self.hours = nn.Embedding(HOURS, dim) if settings.hour_vectors else None
        for table in (self.events, self.gaps, self.hours):
            if table is not None:
                nn.init.zeros_(table.weight)
        self.cell = cell_of(settings.cell, dim, units, settings.layers, settings.dropout)
        self.out = nn.Linear(units, dim)
        self.buy = nn.Linear(units, dim) if settings.purchase_weight else None
        self.attend = PastAttention(dim, units, settings.past) if settings.past else None
        self.scale = nn.Parameter(torch.tensor(float(settings.scale)))
        if content is not None:
            self.buckets = nn.Embedding(len(content.bucket_K), dim)
            nn.init.normal_(self.buckets.weight, 0.0, dim**-0.5)
            self.given = nn.Parameter(torch.randn(content.given_NV.shape[1], dim) * dim**-0.5)
            self.prior = nn.Parameter(torch.zeros(()))
            # Kept with the weights: another catalogue's buckets stand in other rows.
            self.register_buffer("bucket_K", torch.from_numpy(content.bucket_K))
            self.register_buffer("start_N1", torch.from_numpy(content.start_N1), persistent=False)
            self.register_buffer("code_F", torch.from_numpy(content.code_F), persistent=False)
            self.set_trained(np.ones(num_items, bool))

    @property
    def is_cosine(self) -> bool:
        """Whether both sides of a score are normalised."""
        return self.settings.loss == "cosine"

    def set_trained(self, trained_N: npt.NDArray[np.bool_]) -> None:
        """Say which items training meets: the others have no vector of their own, and what only
        they say counts for nothing.
        """
        if self.content is None:
            return
        for name, array in (
            ("weight_F", self.content.weights(trained_N)),
            ("given_NV", self.content.given(trained_N)),
            ("trained_N", trained_N.copy()),
            ("speaks_N", self.content.speaking(trained_N)),
        ):
            tensor = torch.from_numpy(array).to(self.bias.device)
            self.register_buffer(name, tensor, persistent=False)

    def rows(self, item_X: Tensor) -> Rows:
        """Rows of the tables that these items need; not attached to the tables."""
        code_C = torch.zeros(0, dtype=torch.int64, device=item_X.device)
        bucket_CD = self.items.weight.new_zeros(0, self.settings.dim)
        if self.content is not None:
            met_K = torch.zeros(len(self.bucket_K), dtype=torch.bool, device=item_X.device)
            met_K[self.code_F[self._entries(item_X)[0]]] = True
            code_C = met_K.nonzero()[:, 0]
            bucket_CD = self.buckets.weight.detach()[code_C]
        own_XD, bias_X = self.items.weight.detach()[item_X], self.bias.detach()[item_X]
        return Rows(item_X, own_XD, bias_X, code_C, bucket_CD)

    def vectors(self, rows: Rows, *, own: bool = True) -> Vectors:
        """Vectors of items from their rows; without `own`, as if training had not met them."""
        item_XD, bias_X = rows.id_XD, rows.bias_X
        if self.content is not None:
            has_own_X = self.trained_N[rows.item_X] & own
            if self.training and self.settings.id_dropout:
                kept_X = torch.rand_like(bias_X) >= self.settings.id_dropout
                has_own_X = has_own_X & (kept_X | ~self.speaks_N[rows.item_X])
            item_XD = item_XD * has_own_X[:, None] + self._said(rows)
            bias_X = torch.where(has_own_X, bias_X, self.prior)
        if not self.is_cosine:
            return Vectors(item_XD, item_XD, bias_X)
        item_XD = normalise(item_XD)
        return Vectors(item_XD * STEP_NORM, item_XD, bias_X)

    def step_vectors(self, item_X: Tensor) -> Tensor:
        """(X, D) vectors that a touched item feeds into the cell."""
        return self.vectors(self.rows(item_X)).step_XD

    def scan_vectors(self) -> Tensor:
        """(N, D + 1) item vectors with the bias as last coordinate."""
        every_N = torch.arange(self.num_items, device=self.bias.device)
        found = self.vectors(self.rows(every_N))
        return torch.cat([found.item_XD, found.bias_X[:, None]], dim=1)

    def add_context(self, x_TBD: Tensor, steps: Steps) -> Tensor:
        """Add the vectors of event kind, gap and hour to step vectors that are given."""
        if self.events is not None:
            x_TBD = x_TBD + self.events(steps.event_TB)
        if self.gaps is not None:
            x_TBD = x_TBD + self.gaps(steps.gap_TB)
        if self.hours is not None:
            x_TBD = x_TBD + self.hours(steps.hour_TB)
        return x_TBD

    def hidden(self, x_TBD: Tensor, steps: Steps, keep_TBD: Tensor | None = None) -> Tensor:
        """(T, B, H) last layer's hidden state after every step, from the zero state.

        Args:
            x_TBD: step vectors of the items.
            steps: their context.
            keep_TBD: dropout's factors for the inputs.
        """
        x_TBD = self.add_context(x_TBD, steps)
        if keep_TBD is not None:
            x_TBD = x_TBD * keep_TBD
        # oneDNN has no bf16 LSTM for CPUs without the instructions; the products gain most anyway.
        with torch.autocast(x_TBD.device.type, enabled=False):
            h_TBH: Tensor = self.cell(x_TBD.float())[0]
        return h_TBH

    def advance(self, x_TBD: Tensor, state: State) -> State:
        """State tensors (Y, B, H), h first, after T steps of equal length for all sequences."""
        if self.settings.cell == "lstm":
            after: State = self.cell(x_TBD, state)[1]
            return after
        return (self.cell(x_TBD, state[0])[1],)

    def query(self, h_XH: Tensor, past: Past | None = None, head: str = "click") -> Tensor:
        """(X, D) query of hidden states; an item's score is `query · item_vector + bias`.

        Args:
            h_XH: hidden states.
            past: what was touched last before each; needed where `settings.past` is set.
            head: `click`, or `purchase` where there is such a head.
        """
        project = self.out if head == "click" else self.buy
        assert project is not None, "this model has no such head"
        q_XD: Tensor = project(h_XH)
        if self.attend is not None:
            assert past is not None, "attention needs something to attend to"
            q_XD = q_XD + self.attend(h_XH, *past)
        return normalise(q_XD) * self.scale if self.is_cosine else q_XD

    def past(
        self, step_RD: Tensor, row_TB: Tensor, after_X: Tensor, column_X: Tensor
    ) -> Past | None:
        """What the query of some states attends to; None without attention.

        Args:
            step_RD: step vectors.
            row_TB: rows of them, step by step; a negative one is hidden.
            after_X: steps taken before the state.
            column_X: whose state.
        """
        if self.attend is None:
            return None
        ago_M = torch.arange(1, self.settings.past + 1, device=row_TB.device)
        at_XM = after_X[:, None] - ago_M
        row_XM = torch.where(at_XM >= 0, row_TB[at_XM.clamp(min=0), column_X[:, None]], -1)
        has_XM = (row_XM >= 0).to(step_RD.dtype)
        x_XMD = functional.embedding(row_XM.clamp(min=0), step_RD) * has_XM[:, :, None]
        return Past(x_XMD, has_XM)

    def _entries(self, item_X: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the items' entries one after the other, and where each item's begin."""
        begin_X = self.start_N1[item_X]
        size_X = self.start_N1[item_X + 1] - begin_X
        offset_X = size_X.cumsum(0) - size_X
        shift_F = torch.repeat_interleave(begin_X - offset_X, size_X)
        return shift_F + torch.arange(len(shift_F), device=item_X.device), offset_X

    def _said(self, rows: Rows) -> Tensor:
        """(X, D) sums of what the items say about themselves."""
        entry_F, offset_X = self._entries(rows.item_X)
        said_XD = self.given_NV[rows.item_X] @ self.given
        if not len(entry_F):
            return said_XD
        place_K = torch.zeros_like(self.bucket_K)
        place_K[rows.code_C] = torch.arange(len(rows.code_C), device=place_K.device)
        found: Tensor = functional.embedding_bag(
            place_K[self.code_F[entry_F]],
            rows.bucket_CD,
            offset_X,
            mode="sum",
            per_sample_weights=self.weight_F[entry_F],
        )
        return said_XD + found


def normalise(vector: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis."""
    return functional.normalize(vector, dim=-1, eps=NORM_MIN)
