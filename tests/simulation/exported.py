"""Releases as the trainer exports them, with random weights: what `make test` simulates with."""

from pathlib import Path

import numpy as np
import torch

from afterclick.serving.manifest import ItemRow, Snapshot
from afterclick.training.export import build_tables, write_release
from afterclick.training.model import Recommender
from tests.simulation.plan import NUM_ITEMS
from tests.unit.training.worlds import quick

KINDS = (("lstm", 1), ("gru", 1), ("lstm", 2))
"""States of three sizes, so that a record of another release can't be taken for one of this."""


def write_exported_release(folder: Path, seed: int) -> None:
    """Write one release through the trainer's own export."""
    torch.manual_seed(seed)
    cell, layers = KINDS[seed]
    model = Recommender(NUM_ITEMS, quick(cell=cell, layers=layers, units=8, dim=8))
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    rows = {
        f"i{n:05d}": ItemRow(item_id=f"i{n:05d}", categories=[f"c{n % 4}"])
        for n in range(NUM_ITEMS)
    }
    folder.mkdir(parents=True)
    write_release(
        folder,
        model,
        build_tables(model, sorted(rows), np.ones(NUM_ITEMS, bool), rows),
        created_at="2026-01-01T00:00:00Z",
        history=50,
        snapshot=Snapshot(source="random"),
    )
