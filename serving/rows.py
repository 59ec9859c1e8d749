"""Where the memory's items stand in the catalogue: their rows, what is hidden, when they came out.

Looked up whole for a release, and after that only what has changed. Shape letter: N items of the
memory.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.candidates import I64, Published
from afterclick.serving.catalog import Catalog
from afterclick.serving.memory import UNKNOWN, Memory
from afterclick.serving.records import item_hash


class Rows(NamedTuple):
    """Where the memory's items stand in the catalogue."""

    row_N: I64
    """Negative where an item has no row."""
    code_of_row: I64
    """Negative for a row that holds nothing."""
    hidden_N: npt.NDArray[np.bool_]
    published: Published


def rows_of(memory: Memory, catalog: Catalog) -> Rows:
    """Where the memory's items stand; catalogue items that it lacks are numbered first."""
    memory.know(catalog.ids)
    memory.know(catalog.published_ms)
    row_N = np.array([-1 if row is None else row for row in map(catalog.row, memory.ids)], np.int64)
    code_of_row = np.full(len(catalog.scan_vectors_ND), UNKNOWN, np.int64)
    with_row = np.flatnonzero(row_N >= 0)
    code_of_row[row_N[with_row]] = with_row
    hidden_N = np.array([not catalog.is_available(item_id) for item_id in memory.ids], bool)
    ms_N = np.array([catalog.published_ms.get(item_id, 0) for item_id in memory.ids], np.int64)
    order = np.lexsort((memory.hash_N, ms_N))  # of the same time by hash, which no code decides
    order = order[ms_N[order] > 0]
    return Rows(row_N, code_of_row, hidden_N, Published(ms_N, ms_N[order], order))


def rows_after(rows: Rows, memory: Memory, catalog: Catalog, changed: Sequence[str]) -> Rows:
    """`rows_of`, from what it was before these items changed and the memory learnt of others."""
    memory.know(
        item_id
        for item_id in changed
        if catalog.row(item_id) is not None or item_id in catalog.published_ms
    )
    more = memory.num_items - len(rows.row_N)
    row_N = np.append(rows.row_N, np.full(more, -1))
    hidden_N = np.append(rows.hidden_N, np.zeros(more, bool))
    ms_N = np.append(rows.published.ms_N, np.zeros(more, np.int64))
    num_rows = len(catalog.scan_vectors_ND)
    code_of_row = np.append(rows.code_of_row, np.full(num_rows - len(rows.code_of_row), UNKNOWN))
    fresh = list(range(len(rows.row_N), memory.num_items))
    known = map(memory.code_of_hash.get, map(item_hash, changed))
    codes = {*fresh, *(code for code in known if code is not None)}
    published: list[int] = []
    for code in sorted(codes):
        item_id = memory.ids[code]
        row, ms = catalog.row(item_id), catalog.published_ms.get(item_id, 0)
        if row is not None:
            row_N[code], code_of_row[row] = row, code
        hidden_N[code] = not catalog.is_available(item_id)
        if ms != ms_N[code]:
            ms_N[code] = ms
            published.append(code)
    return Rows(
        row_N, code_of_row, hidden_N, _republished(rows.published, ms_N, published, memory.hash_N)
    )


def _republished(
    before: Published, ms_N: I64, codes: list[int], hash_N: npt.NDArray[np.uint64]
) -> Published:
    """The order of publication after the times of a few items have changed."""
    if not codes:
        return Published(ms_N, before.sorted_ms, before.sorted_code)
    stays = ~np.isin(before.sorted_code, codes)
    sorted_ms, sorted_code = before.sorted_ms[stays], before.sorted_code[stays]
    added = [code for code in codes if ms_N[code] > 0]
    added.sort(key=lambda code: (int(ms_N[code]), int(hash_N[code])))
    places = []
    for code in added:
        begin, end = (
            int(np.searchsorted(sorted_ms, ms_N[code], side=side)) for side in ("left", "right")
        )
        places.append(begin + int(np.searchsorted(hash_N[sorted_code[begin:end]], hash_N[code])))
    return Published(
        ms_N, np.insert(sorted_ms, places, ms_N[added]), np.insert(sorted_code, places, added)
    )
