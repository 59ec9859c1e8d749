"""Trained vectors of a large catalogue: `python -m benchmarks.vectors FOLDER --items 1000000`.

Readers of the synthetic world click, and an LSTM learns their next click by sampled softmax:
normalised item vectors, a bias each, a scaled query, as the product's default model has them.
Written out here, because a trainer for a benchmark's vectors may be plain: rows are updated where
a batch touched them (SparseAdam), nothing is validated. Random vectors have no neighbourhoods, so
an index would be judged on what no catalogue looks like. Writes `scan.npy` (N, D + 1),
`queries.npy` (U, D + 1) and `vectors.json`. Shape letters: W windows, T steps, X predictions, C
items scored in a batch.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from afterclick.streams.synthetic import World

UNITS = 128
SCALE = 14.0
FREQUENT, DRAWN = 512, 1024
"""Items scored in every batch beside its own: the most clicked, and a uniform draw."""
CLICKS_A_USER = 30
STEPS_MAX = 15
"""A user's clicks are cut into windows of so many."""
BATCH_WINDOWS = 128
RATE = 1e-2
END_MS = 1_700_000_000_000


def clicks(num_items: int, num_clicks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """User and item numbers, in order of time."""
    world = World(seed, max(1, num_clicks // CLICKS_A_USER), num_items)
    user_P, item_P = np.empty(num_clicks, np.int32), np.empty(num_clicks, np.int32)
    for at, click in enumerate(world.past(num_clicks, END_MS)):
        user_P[at], item_P[at] = int(click.user_id[1:]), int(click.item_id[1:])
    return user_P, item_P


class Model(nn.Module):
    """Item rows (N, D + 1), the bias last; a cell; a query."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(num_items, UNITS + 1, sparse=True)
        nn.init.normal_(self.rows.weight, 0.0, UNITS**-0.5)
        nn.init.zeros_(self.rows.weight[:, -1])
        self.cell = nn.LSTM(UNITS, UNITS)
        self.out = nn.Linear(UNITS, UNITS)

    def items(self, item_X: Tensor) -> tuple[Tensor, Tensor]:
        """(X, D) vectors of length 1 and (X) biases."""
        row_X = self.rows(item_X)
        return functional.normalize(row_X[..., :-1], dim=-1), row_X[..., -1]

    def queries(self, item_TB: Tensor) -> Tensor:
        """(T, B, D) after every step."""
        h_TBH = self.cell(self.items(item_TB)[0] * 3.0)[0]
        return functional.normalize(self.out(h_TBH), dim=-1) * SCALE


def train(window_WT: np.ndarray, num_items: int, *, seed: int, epochs: int) -> Model:
    """One model; progress to stderr."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Model(num_items)
    dense = [*model.cell.parameters(), *model.out.parameters()]
    optimisers = [
        torch.optim.SparseAdam(list(model.rows.parameters()), lr=RATE),
        torch.optim.Adam(dense, lr=RATE / 4),
    ]
    count_N = np.bincount(window_WT.reshape(-1), minlength=num_items)
    frequent = np.argsort(-count_N, kind="stable")[:FREQUENT]
    num_batches = epochs * (len(window_WT) // BATCH_WINDOWS)
    begun_s, mean = time.monotonic(), 0.0
    for step in range(num_batches):
        item_TB = window_WT[rng.integers(0, len(window_WT), BATCH_WINDOWS)].T
        target_X = item_TB[1:].reshape(-1)
        item_C = np.unique(np.concatenate([target_X, frequent, rng.integers(0, num_items, DRAWN)]))
        # How likely a batch scores an item: without it the frequent would be pushed down.
        share_C = count_N[item_C] / count_N.sum()
        missed_C = (1 - 1 / num_items) ** DRAWN * (1 - share_C) ** len(target_X)
        missed_C[np.isin(item_C, frequent)] = 0.0
        log_scored_C = torch.from_numpy(np.log1p(-missed_C).astype(np.float32))
        q_XD = model.queries(torch.from_numpy(item_TB[:-1].copy())).reshape(len(target_X), -1)
        vector_CD, bias_C = model.items(torch.from_numpy(item_C))
        column_X = torch.from_numpy(np.searchsorted(item_C, target_X))
        score_XC = torch.addmm(bias_C - log_scored_C, q_XD, vector_CD.T)
        loss = functional.cross_entropy(score_XC, column_X)
        left = max(0.02, 1 - step / num_batches)
        for optimiser, rate in zip(optimisers, (RATE, RATE / 4), strict=True):
            optimiser.param_groups[0]["lr"] = rate * left
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        if step % 100 == 99:
            took_s = time.monotonic() - begun_s
            progress = f"batch {step + 1} of {num_batches}: {mean:.3f} nats, {took_s:.0f} s"
            sys.stderr.write(progress + "\n")
    return model


def _windows(user_P: np.ndarray, item_P: np.ndarray) -> np.ndarray:
    """(W, T) whole windows of one user's clicks each; what is left over is dropped."""
    begin_U = np.flatnonzero(np.diff(user_P, prepend=-1))
    size_U = np.diff(begin_U, append=len(user_P))
    num_U = size_U // STEPS_MAX
    first_W = np.repeat(begin_U, num_U) + STEPS_MAX * np.concatenate(
        [np.arange(num) for num in num_U]
    )
    return item_P[first_W[:, None] + np.arange(STEPS_MAX)].astype(np.int64)


def make(
    folder: Path, *, num_items: int, num_clicks: int, num_queries: int, seed: int, epochs: int
) -> dict[str, Any]:
    """Clicks, then vectors; clicks that are there already are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    begun_s = time.monotonic()
    log = folder / "clicks.npy"
    if not log.exists():
        np.save(log, np.stack(clicks(num_items, num_clicks, seed)))
    user_P, item_P = np.load(log, allow_pickle=False)
    # New items joined the world meanwhile; they have numbers beyond the first ones.
    num_items = max(num_items, int(item_P.max()) + 1)
    order = np.argsort(user_P, kind="stable")
    window_WT = _windows(user_P[order], item_P[order])
    model = train(window_WT, num_items, seed=seed, epochs=epochs)
    rng = np.random.default_rng(seed)
    picked_UT = window_WT[rng.choice(len(window_WT), num_queries)]
    with torch.no_grad():
        vectors = [model.items(part) for part in torch.arange(num_items).split(100_000)]
        half_TU = torch.from_numpy(picked_UT[:, : STEPS_MAX // 2].T.copy())
        q_UD = model.queries(half_TU)[-1].numpy()
    scan = [torch.cat([vector, bias[:, None]], dim=1).numpy() for vector, bias in vectors]
    np.save(folder / "scan.npy", np.concatenate(scan))
    np.save(folder / "queries.npy", np.concatenate([q_UD, np.ones_like(q_UD[:, :1])], axis=1))
    about = {
        "items": num_items,
        "clicks": len(item_P),
        "items_clicked": len(np.unique(item_P)),
        "seed": seed,
        "epochs": epochs,
        "seconds": round(time.monotonic() - begun_s),
    }
    (folder / "vectors.json").write_bytes(msgspec.json.encode(about))
    return about


def main(argv: Sequence[str] | None = None) -> int:
    """Make the vectors once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vectors", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--clicks", type=int, default=2_000_000)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args(argv)
    about = make(
        given.folder,
        num_items=given.items,
        num_clicks=given.clicks,
        num_queries=given.queries,
        seed=given.seed,
        epochs=given.epochs,
    )
    print(msgspec.json.encode(about).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
