"""What the catalogue says of its items, as arrays for training.

The features are those of serving/text.py, the function that a worker applies to a new item. Knows
no model. Shape letters: N items, F entries of all items, K distinct buckets, V entries of a given
vector.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.encoder import F32, I64, unit
from afterclick.serving.manifest import ItemRow
from afterclick.serving.text import bucket, features

Mask = npt.NDArray[np.bool_]


class Content(NamedTuple):
    """Features of N items; entries of item n are start[n] to start[n + 1]."""

    start_N1: I64
    code_F: I64
    """Places in `bucket_K`."""
    field_F: I64
    """Number of the item's field; fields are weighed alike, however long."""
    bucket_K: I64
    """Buckets that any of the items meets, ascending."""
    given_NV: F32
    """Given vectors at length 1, zeros for an item without one; V may be 0."""

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.start_N1) - 1

    def item_F(self) -> I64:  # noqa: N802 - a shape suffix
        """Item of every entry."""
        return np.repeat(np.arange(self.num_items), np.diff(self.start_N1))

    def met(self, trained_N: Mask) -> Mask:
        """(K,) buckets that any of these items meets."""
        met_K = np.zeros(len(self.bucket_K), bool)
        met_K[self.code_F[trained_N[self.item_F()]]] = True
        return met_K

    def speaking(self, trained_N: Mask) -> Mask:
        """(N,) items that say anything that these items say, too."""
        speaks_N: Mask = np.any(self.given(trained_N) != 0, axis=1)
        speaks_N[self.item_F()[self.met(trained_N)[self.code_F]]] = True
        return speaks_N

    def given(self, trained_N: Mask) -> F32:
        """(N, V) given vectors; zeros where none of these items has one to learn from."""
        return self.given_NV if self.given_NV[trained_N].any() else np.zeros_like(self.given_NV)

    def weights(self, trained_N: Mask) -> F32:
        """(F,) weight of every entry: 1 / √(entries of its field that count), or 0."""
        met_F = self.met(trained_N)[self.code_F]
        place_F = self.item_F() * (int(self.field_F.max(initial=0)) + 1) + self.field_F
        count = np.bincount(place_F[met_F], minlength=int(place_F.max(initial=0)) + 1)
        weight_F = np.where(met_F, 1 / np.sqrt(np.maximum(count[place_F], 1)), 0)
        return weight_F.astype(np.float32)


def content_of(rows: Sequence[ItemRow], num_buckets: int) -> Content | None:
    """Features of a catalogue; None where no item says anything.

    Args:
        rows: item n's row.
        num_buckets: features are hashed into so many.

    Given vectors count where they have as many entries as most of them.
    """
    number_F: list[int] = []
    field_F: list[int] = []
    sizes = np.zeros(len(rows), np.int64)
    for at, row in enumerate(rows):
        for number, field in enumerate(features(row)):
            number_F += [bucket(feature, num_buckets) for feature in field]
            field_F += [number] * len(field)
            sizes[at] += len(field)
    lengths = Counter(len(row.vector) for row in rows if row.vector)
    length = max(lengths, key=lambda found: (lengths[found], found), default=0)
    given_NV = np.zeros((len(rows), length), np.float32)
    for at, row in enumerate(rows):
        vector = unit(row.vector, length)
        if vector is not None:
            given_NV[at] = vector
    if not number_F and not given_NV.any():
        return None
    bucket_K, code_F = np.unique(np.array(number_F, np.int64), return_inverse=True)
    start_N1 = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Content(start_N1, code_F, np.array(field_F, np.int64), bucket_K, given_NV)
