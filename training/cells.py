"""What goes on over the steps: recurrent cells, and what they are compared with.

A cell outside `EXPORTED` is trained and evaluated, and makes no release: a plain RNN could step,
but ONNX Runtime's gives other bits to a user alone than to one in company; self-attention cannot
step in constant time at all: it needs the whole past again at every click.
"""

from typing import Any

import torch
from torch import Tensor, nn

EXPORTED = ("lstm", "gru")
"""Cells that a release can hold."""

ABSENT = 1e9
"""Taken off the logit of a place where nothing stands."""

HEADS = 4
PLACES = 200
"""Later steps share the last place's vector."""


class SelfAttention(nn.Module):
    """Causal self-attention over the steps so far, as SASRec has it (Kang & McAuley 2018)."""

    def __init__(self, dim: int, units: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, units)
        self.places = nn.Embedding(PLACES, units)
        nn.init.normal_(self.places.weight, 0.0, 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                units, HEADS, 2 * units, dropout, activation="gelu", norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(units)

    def forward(self, x_TBD: Tensor) -> tuple[Tensor, None]:
        """(T, B, H) after every step; no state."""
        num_steps = len(x_TBD)
        place_T = torch.arange(num_steps, device=x_TBD.device).clamp_(max=PLACES - 1)
        h_TBH = self.enter(x_TBD) + self.places(place_T)[:, None]
        later_TT = torch.ones(num_steps, num_steps, dtype=torch.bool, device=x_TBD.device).triu(1)
        for block in self.blocks:
            h_TBH = block(h_TBH, src_mask=later_TT)
        return self.norm(h_TBH), None


def cell_of(kind: str, dim: int, units: int, layers: int, dropout: float) -> nn.Module:
    """A core: called with (T, B, D), and a state where it has one, it gives (T, B, H) first."""
    if kind == "attention":
        return SelfAttention(dim, units, layers, dropout)
    between = dropout if layers > 1 else 0.0
    kinds: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    make: Any = kinds[kind]  # torch types their common arguments away
    cell: nn.Module = make(dim, units, layers, dropout=between)
    return cell


class PastAttention(nn.Module):
    """Attention of a hidden state over the items touched last, newest first.

    The values start at zero: what it adds has to be learnt.
    """

    def __init__(self, dim: int, units: int, length: int) -> None:
        super().__init__()
        self.ask = nn.Linear(units, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.place_M = nn.Parameter(torch.zeros(length))
        nn.init.zeros_(self.value.weight)

    def forward(self, h_XH: Tensor, past_XMD: Tensor, has_XM: Tensor) -> Tensor:
        """(X, D) what is added to the query; zeros for one without a past."""
        ask_XD1 = (self.ask(h_XH) * past_XMD.shape[-1] ** -0.5)[:, :, None]
        logit_XM = (self.key(past_XMD) @ ask_XD1)[:, :, 0] + self.place_M
        weight_XM = torch.softmax(logit_XM + (has_XM - 1) * ABSENT, dim=1) * has_XM
        attended: Tensor = (weight_XM[:, None, :] @ self.value(past_XMD))[:, 0]
        return attended
