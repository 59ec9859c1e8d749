"""Weights that one training run leaves for the next, by item id.

Kept beside the releases, not in them: a worker has no use for them. Knows no data and no loss; any
model whose tables over the items have one row each goes through.
"""

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from afterclick.serving.errors import ConfigError
from afterclick.training.model import Recommender

BUCKETS, BUCKET_VECTORS = "bucket_K", "buckets.weight"
"""What items say is hashed; the rows of the vectors are those of this catalogue's hashes."""


def save_weights(path: Path, model: Recommender, item_ids: Sequence[str]) -> None:
    """Write a model's weights and the ids of its items; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    torch.save({"items": json.dumps(list(item_ids)), "state": state}, fresh)
    fresh.replace(path)


def load_weights(path: Path, model: Recommender, item_ids: Sequence[str]) -> int:
    """Set a model's weights to saved ones; items that they lack keep what chance gave them.

    Args:
        path: as `save_weights` wrote it.
        model: of the same architecture; its item rows are `item_ids`.
        item_ids: in the order of the rows.

    Returns:
        How many items were known.

    Raises:
        ConfigError: it cannot be read, or belongs to another architecture.
    """
    where = f"warm start from {path}"
    if not zipfile.is_zipfile(path):  # torch would take it for its oldest format
        raise ConfigError(f"{where}: cannot be read; train with warm_start = false")
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{where}: {error}; train with warm_start = false") from error
    saved: dict[str, torch.Tensor] = data["state"]
    row_of = {item_id: row for row, item_id in enumerate(json.loads(data["items"]))}
    own = model.state_dict()
    if saved.keys() != own.keys():
        raise ConfigError(
            f"{where}: it holds {sorted(saved.keys() ^ own.keys())} otherwise than these settings; "
            "train with warm_start = false"
        )
    pairs = [(new, row_of[name]) for new, name in enumerate(item_ids) if name in row_of]
    new_row = torch.tensor([new for new, _ in pairs], dtype=torch.long)
    old_row = torch.tensor([old for _, old in pairs], dtype=torch.long)
    if BUCKETS in own:
        now_K, then_K = own.pop(BUCKETS).cpu(), saved[BUCKETS]
        both = torch.isin(now_K, then_K)
        rows, before_K = own.pop(BUCKET_VECTORS), saved[BUCKET_VECTORS].to(model.bias.device)
        if rows.shape[1:] == before_K.shape[1:]:
            rows[both] = before_K[torch.searchsorted(then_K, now_K[both])]
    for name, value in own.items():
        before = saved[name].to(value.device)
        by_item = value.dim() > 0 and len(value) == len(item_ids) and len(before) == len(row_of)
        if value.shape[by_item:] != before.shape[by_item:]:
            raise ConfigError(
                f"{where}: {name} is {tuple(before.shape)}, these settings make it "
                f"{tuple(value.shape)}; train with warm_start = false"
            )
        if by_item:
            value[new_row] = before[old_row]
        else:
            value.copy_(before)
    return len(pairs)
