"""A scan in two stages for catalogues of 100,000 items and more: all roughly, the best exactly.

First every row is scored by sums of small integers (product quantisation, 4 bits for 2 coordinates,
`faiss.IndexPQFastScan`); then each user's best `SURVIVORS` are scored again in float32. Knows no
item id, as the exact scan. Optional: needs the extra `index`. Shape letters as in `engine.py`, and
R rows that were fetched.

A user's answer depends on the query and on the rows that can be listed, not on who shares the
batch, nor on the order in which rows came:
- codebooks are order statistics of the first rows, not trained;
- survivors are cut between two different rough scores, never inside a group of equal ones, and
  masked rows do not count;
- their scores are sums over one row each, whatever lies beside it in memory;
- whoever has too few survivors, or asks for too many rows, is scanned exactly.

Rough scores are integers, but the tables they are summed from are float32 products: as with
everything else here, the promise of equal bits holds for one CPU level and one version of faiss.

Source: Jégou, Douze & Schmid 2011 (product quantisation); André, Kermarrec & Le Scouarnec 2017
(sums in registers).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from afterclick.serving.best import best_first
from afterclick.serving.dots import scores_of
from afterclick.serving.engine import F32, I64
from afterclick.serving.errors import ConfigError
from afterclick.serving.scanner import MASKED, USERS_MAX, Scanner

SURVIVORS = 768
"""Rows of a user that are scored exactly; recall and cost by their number: docs/performance.md."""

SPARE_SHARE = 8
"""The first stage gives one row more for so many survivors, because some may be masked."""

WANT_MAX = 256
"""Rows of an answer; who wants more is scanned exactly."""

COORDINATES, BITS = 2, 4
"""Coordinates of one code, and its bits: 16 values, four along each coordinate."""

LEVELS = (0.0655, 0.3253, 0.6747, 0.9345)
"""Where along a coordinate's sorted values the four stand: what is best for a normal distribution
(Max 1960), which trained vectors are near.
"""

ADDED_MAX = 1 << 16
"""Rows copied at a time while the index is filled."""


class TwoStageScanner(Scanner):
    """`Scanner` whose `top` and `look` are approximate; `scores` stays exact.

    A row whose vector changes after it was added is still found by its first one, and scored by
    the present one.
    """

    def __init__(
        self, scan_vectors_ND: F32, *, threads: int = 0, survivors: int = SURVIVORS
    ) -> None:
        super().__init__(scan_vectors_ND, provider="cpu", threads=threads, bounded=False)
        self._survivors = max(survivors, WANT_MAX)
        self._fetched = self._survivors + self._survivors // SPARE_SHARE
        self._faiss = _faiss()
        dim = scan_vectors_ND.shape[1]
        self._padded_dim = dim + dim % COORDINATES
        self._index: Any = None
        self._known_N = np.zeros(0, bool)
        self._row_of_M = np.zeros(0, np.int64)
        self._add_rows()

    @property
    def users_max(self) -> int:
        """Users that one call should be asked for at most: few rows of each are scored."""
        return USERS_MAX

    @property
    def index_bytes(self) -> int:
        """Memory beside the matrix: codes, and the row of each."""
        code_bytes = self._padded_dim // COORDINATES * BITS // 8
        row_bytes: int = code_bytes + self._row_of_M.itemsize
        return len(self._row_of_M) * row_bytes + len(self._known_N)

    def changed(self, scan_vectors_ND: F32, rows: Iterable[int]) -> None:
        """Take a matrix with new or masked rows; new ones are found from the next scan on."""
        super().changed(scan_vectors_ND, rows)
        self._add_rows()

    def top(self, q_BD: F32, k: int) -> tuple[F32, I64]:
        """As `Scanner.top`, but for a row in a hundred or so that it misses."""
        if k > WANT_MAX or len(self._row_of_M) <= self._fetched:
            return super()._top(q_BD, min(k, self.num_rows))
        return super().top(q_BD, k)

    def _top(self, q_BD: F32, k: int) -> tuple[F32, I64]:
        rough_BR, at_BR = self._index.search(self._padded(q_BD), self._fetched)
        rows_BR = self._row_of_M[at_BR]
        user_R = np.repeat(np.arange(len(q_BD)), rows_BR.shape[1])
        scores_BR = scores_of(
            np.ascontiguousarray(q_BD), self._matrix, user_R, rows_BR.ravel()
        ).reshape(rows_BR.shape)
        valid_BR = (at_BR >= 0) & (scores_BR > MASKED / 2)
        place_BR = np.cumsum(valid_BR, axis=1)
        enough_B = place_BR[:, -1] > self._survivors
        first_out_B = np.argmax(place_BR > self._survivors, axis=1)
        kept_BR = valid_BR & (rough_BR > rough_BR[np.arange(len(q_BD)), first_out_B][:, None])
        enough_B &= kept_BR.sum(axis=1) >= WANT_MAX
        scores_BR[~kept_BR] = MASKED
        scores_BK, rows_BK = best_first(scores_BR, rows_BR, k)
        if not enough_B.all():
            scores_BK[~enough_B], rows_BK[~enough_B] = super()._top(q_BD[~enough_B], k)
        return scores_BK, rows_BK

    def _add_rows(self) -> None:
        """Index rows that are not in it and not masked, spare ones are."""
        known_N = np.zeros(self.num_rows, bool)
        known_N[: len(self._known_N)] = self._known_N
        unknown = np.flatnonzero(~known_N)
        new = unknown[self._matrix[unknown, -1] > MASKED / 2]
        if len(new):
            if self._index is None:
                self._index = self._empty_index(new)
            for rows in np.array_split(new, -(-len(new) // ADDED_MAX)):
                self._index.add(self._padded(self._matrix[rows]))
            known_N[new] = True
            self._row_of_M = np.concatenate([self._row_of_M, new])
        self._known_N = known_N

    def _empty_index(self, rows: I64) -> Any:
        """With codebooks for these rows: four values along each coordinate, sixteen for a pair."""
        num_codes = self._padded_dim // COORDINATES
        index = self._faiss.IndexPQFastScan(
            self._padded_dim, num_codes, BITS, self._faiss.METRIC_INNER_PRODUCT
        )
        at = [int(level * (len(rows) - 1)) for level in LEVELS]
        values_4D = np.zeros((len(LEVELS), self._padded_dim), np.float32)
        for coordinate in range(self._matrix.shape[1]):
            values_4D[:, coordinate] = np.partition(self._matrix[rows, coordinate], at)[at]
        first, second = np.divmod(np.arange(1 << BITS), len(LEVELS))
        books = np.stack([values_4D[first, 0::2].T, values_4D[second, 1::2].T], axis=-1)
        self._faiss.copy_array_to_vector(books.reshape(-1), index.pq.centroids)
        index.is_trained = True
        return index

    def _padded(self, vectors: F32) -> F32:
        padded = np.zeros((len(vectors), self._padded_dim), np.float32)
        padded[:, : vectors.shape[1]] = vectors
        return padded


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "scan: 'two-stage' needs faiss; install 'afterclick[index]', or set scan to 'exact'"
        ) from error
    # Threads of its own would fight with those that fold partitions side by side.
    faiss.omp_set_num_threads(1)
    return faiss
