"""What users touched last, as the query graph takes it: from the interactions that records keep.

Knows no state and no list. Shape letters: B users, M interactions, E step vector.
"""

from collections.abc import Sequence

import numpy as np

from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import I64, Past
from afterclick.serving.records import unpack_interactions


def past_of(interactions: Sequence[bytes], catalog: Catalog, length: int) -> Past | None:
    """The last `length` interactions of every user with items that the catalogue knows.

    Args:
        interactions: packed, as records hold them; those before a reset do not count.
        catalog: items in force.
        length: M; 0 gives None.
    """
    if not length:
        return None
    rows_BM = np.full((len(interactions), length), -1, np.int64)
    for user, packed in enumerate(interactions):
        known: list[int] = []
        for kept in reversed(unpack_interactions(packed)):
            row = catalog.row_of_hash(kept.item_hash)
            if row is not None:
                known.append(row)
            if kept.reset or len(known) == length:
                break
        rows_BM[user, : len(known)] = known
    return past_of_rows(rows_BM, catalog.step_vectors_NE)


def past_of_rows(
    rows_BM: I64, step_vectors_NE: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> Past:
    """The same from rows, newest first; negative where there is none."""
    has_BM = rows_BM >= 0
    x_BME = np.where(has_BM[:, :, None], step_vectors_NE[np.maximum(rows_BM, 0)], np.float32(0))
    return Past(x_BME, has_BM.astype(np.float32))
