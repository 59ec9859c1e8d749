"""From a source to what a run learns from and is judged by: the fold's rules, codes, the split.

Trains nothing. Shape letters: N items, P positions, X predictions.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.errors import ContractError
from afterclick.serving.manifest import ItemRow
from afterclick.serving.settings import ServingSettings
from afterclick.training.data import (
    UNKNOWN,
    Held,
    Mask,
    Sequences,
    build_log,
    newest,
    recode,
    split,
)
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import Source
from afterclick.training.text import Content, content_of


class Data(NamedTuple):
    """What a run learns from and is judged by; codes are rows of `item_ids`."""

    item_ids: list[str]
    train: Sequences
    held: Held | None
    everything: Sequences
    content: Content | None
    num_duplicates: int
    asked: Held | None = None
    """`held`, but items that the training part lacks by their own codes."""


def prepare(source: Source, settings: TrainingSettings, serving: ServingSettings) -> Data:
    """Apply the fold's rules, code the items, hold out the newest part.

    Raises:
        ContractError: no click is left, or no item has clicks enough.
    """
    whole = build_log(source.columns, history=serving.history, idle_ttl_s=serving.idle_ttl_s)
    item_ids = sorted({*whole.item_ids, *source.items})
    sequences = recode(whole, item_ids)
    count_N = np.bincount(sequences.item_P, minlength=len(item_ids))
    sequences = _forget_items(sequences, count_N >= settings.item_min_count)
    train, held = split(sequences, settings.validation, settings.split)
    train = train.select(train.item_P != UNKNOWN)
    everything = sequences.select(sequences.item_P != UNKNOWN)
    if not train.num_events:
        raise ContractError(
            f"training: no item has {settings.item_min_count} clicks (item_min_count) before the "
            "validation part",
            reason="no-transitions",
        )
    content = None
    if settings.content:
        rows = [source.items.get(item_id) or ItemRow(item_id=item_id) for item_id in item_ids]
        content = content_of(rows, settings.content_buckets)
    asked = None
    if held is not None:
        known_N = np.bincount(train.item_P, minlength=len(item_ids)) > 0
        if content is not None:
            known_N |= content.speaking(known_N)
        asked = newest(held, settings.validation_events_max)
        held = Held(_forget_items(asked.sequences, known_N), asked.target_P)
        held = held if held.target_P.any() else None
    return Data(item_ids, train, held, everything, content, whole.num_duplicates, asked)


def settled(data: Data, settings: TrainingSettings) -> TrainingSettings:
    """The settings with what the data decides of them."""
    share = 0.0
    if data.held is not None:
        item_X = data.held.sequences.item_P[data.held.target_P]
        share = float((item_X == UNKNOWN).mean())
    return settings.settled(data.train.num_events, share)


def _forget_items(sequences: Sequences, known_N: npt.NDArray[np.bool_]) -> Sequences:
    item_P = sequences.item_P
    known_P = (item_P != UNKNOWN) & known_N[np.maximum(item_P, 0)]
    return sequences._replace(item_P=np.where(known_P, item_P, UNKNOWN))


def clicked(part: Sequences, data: Data) -> Mask:
    """(N,) whether an item occurs in a part."""
    return np.bincount(part.item_P, minlength=len(data.item_ids)) > 0
