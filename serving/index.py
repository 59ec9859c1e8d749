"""A scan in two stages for catalogues of 500,000 items and more: some roughly, the best exactly.

Rows stand in lists around centres. A query goes through the lists whose centres it scores highest,
and there every row is scored by sums of small integers (product quantisation, 4 bits for 2
coordinates, `faiss.IndexIVFPQFastScan`); then each user's best `SURVIVORS` are scored again in
float32. Knows no item id, as the exact scan. Optional: needs the extra `index`. Shape letters as in
`engine.py`, R rows that were fetched, L lists.

A user's answer depends on the query and on the rows that can be listed, not on who shares the
batch, nor on the order in which rows came:
- centres are found among the first rows, which come with the release; codebooks are their order
  statistics, not trained;
- lists are chosen by exact scores, and a row that comes later finds its list alone;
- survivors are cut between two different rough scores, never inside a group of equal ones, and
  masked rows do not count;
- their scores are sums over one row each, whatever lies beside it in memory;
- whoever has too few survivors, or asks for too many rows, is scanned exactly.

Rough scores are integers, but the tables they are summed from are float32 products: as with
everything else here, the promise of equal bits holds for one CPU level and one version of faiss.

Source: Jégou, Douze & Schmid 2011 (product quantisation, inverted lists); André, Kermarrec & Le
Scouarnec 2017 (sums in registers).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from afterclick.serving.best import best_first, best_rows
from afterclick.serving.dots import all_scores, scores_of
from afterclick.serving.errors import ConfigError
from afterclick.serving.scanner import F32, I64, MASKED, USERS_MAX, Scanner

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

ALONE_MAX = 16
"""Rows that faiss compares with centres one by one; for more it multiplies matrices, and the last
bits of a row would depend on the others.
"""

ROUNDS, ROWS_A_CENTRE = 6, 64
"""Of the search for centres."""

TRIED, TRIED_BEST, TRIED_RECALL = 64, 50, 0.99
"""Rows that stand in for queries when the number of lists is chosen, of the half with the higher
bias, as the others are hardly ever asked for: twice as many lists are gone through as hold this
share of their best. Where vectors stand in no groups, these are all.
"""

FULL = 32
"""So many times the rows that are fetched the lists of a query hold at least, on average."""


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
        self._nearest: Any = None
        self._centres_LD = np.zeros((0, self._padded_dim), np.float32)
        self._probes = 0
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

    @property
    def lists_read(self) -> float:
        """Share of the lists that a query goes through."""
        return self._probes / max(1, len(self._centres_LD))

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
        padded_BD = self._padded(q_BD)
        list_BL = best_rows(all_scores(padded_BD, self._centres_LD), self._probes)[1]
        rough_BR, at_BR = self._index.search_preassigned(
            padded_BD, self._fetched, list_BL, np.zeros(list_BL.shape, np.float32)
        )
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
            size = ALONE_MAX
            if self._index is None:
                self._index, size = self._empty_index(new), ADDED_MAX
            for start in range(0, len(new), size):
                self._index.add(self._padded(self._matrix[new[start : start + size]]))
            known_N[new] = True
            self._row_of_M = np.concatenate([self._row_of_M, new])
            if size == ADDED_MAX:
                self._probes = self._index.nprobe = self._enough_lists(new)
        self._known_N = known_N

    def _empty_index(self, rows: I64) -> Any:
        """With centres and codebooks for these rows: four values along each coordinate, sixteen
        for a pair.
        """
        faiss, num_lists = self._faiss, 1 << max(0, round(np.log2(np.sqrt(len(rows)) / 2)))
        tried = rows[:: max(1, len(rows) // (num_lists * ROWS_A_CENTRE))]
        groups = faiss.Kmeans(
            self._padded_dim,
            num_lists,
            niter=ROUNDS,
            seed=1,
            min_points_per_centroid=1,
            max_points_per_centroid=2 * ROWS_A_CENTRE,
        )
        groups.train(self._padded(self._matrix[tried]))
        self._centres_LD = np.ascontiguousarray(groups.centroids)
        nearest = faiss.IndexFlatL2(self._padded_dim)
        nearest.add(self._centres_LD)
        self._nearest = nearest  # the index refers to it, and does not keep it
        index = faiss.IndexIVFPQFastScan(
            nearest,
            self._padded_dim,
            num_lists,
            self._padded_dim // COORDINATES,
            BITS,
            faiss.METRIC_INNER_PRODUCT,
        )
        index.by_residual = False
        at = [int(level * (len(rows) - 1)) for level in LEVELS]
        values_4D = np.zeros((len(LEVELS), self._padded_dim), np.float32)
        for coordinate in range(self._matrix.shape[1]):
            values_4D[:, coordinate] = np.partition(self._matrix[rows, coordinate], at)[at]
        first, second = np.divmod(np.arange(1 << BITS), len(LEVELS))
        books = np.stack([values_4D[first, 0::2].T, values_4D[second, 1::2].T], axis=-1)
        faiss.copy_array_to_vector(books.reshape(-1), index.pq.centroids)
        index.is_trained = True
        return index

    def _enough_lists(self, rows: I64) -> int:
        """Lists to go through, by where the best of some rows stand that are taken for queries."""
        likely = rows[np.argsort(-self._matrix[rows, -1], kind="stable")][: -(-len(rows) // 2)]
        tried_BD = self._matrix[likely[:: max(1, len(likely) // TRIED)][:TRIED]].copy()
        tried_BD[:, -1] = 1
        best_BK = super()._top(tried_BD, min(TRIED_BEST, len(rows)))[1]
        list_BK = self._nearest.assign(self._padded(self._matrix[best_BK.ravel()]), 1)
        score_BL = all_scores(self._padded(tried_BD), self._centres_LD)
        rank_BL = np.argsort(np.argsort(-score_BL, axis=1, kind="stable"), axis=1)
        rank_BK = np.take_along_axis(rank_BL, list_BK.reshape(best_BK.shape), axis=1)
        enough = int(np.quantile(rank_BK, TRIED_RECALL, method="higher")) + 1
        full = -(-FULL * self._fetched * len(self._centres_LD) // len(rows))
        return min(max(2 * enough, full), len(self._centres_LD))

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
