"""Item ids ↔ rows, vectors, availability; new items arrive here while running.

Knows no Kafka: whoever reads the items topic calls `apply`. What a catalogue holds is a pure
function of
its release and of the items topic from the release's `items_offset` to `offsets`, whatever the
order in
which the topic's partitions were read: an item lives in one partition, and rows carry no meaning.

Under one release an item's step vector is that of its first version seen. The release's encoder
makes
a new item's vectors from its title, text, categories, domain and given vector the moment it
arrives; a
release without an encoder gives it the mean of its items that share a category. An item of which
nothing is known has no row: it stands in histories and waits for the next release.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from afterclick.serving.encoder import Encodable, Encoded, ItemEncoder
from afterclick.serving.engine import F32
from afterclick.serving.errors import BAD_JSON, ContractError
from afterclick.serving.manifest import (
    ITEMS_NAME,
    SCAN_VECTORS_NAME,
    STEP_VECTORS_NAME,
    ItemRow,
    ItemTable,
    Manifest,
)
from afterclick.serving.records import item_hash
from afterclick.serving.scanner import MASKED
from afterclick.serving.texts import Texts

SPARE_ROWS = 1024
"""Rows are allocated in steps of this many, so that a new item rarely moves the matrix."""

CHANGES_MAX = 1 << 14
"""Changes that are remembered: who is further behind looks at all items again."""


class ItemVersion(Encodable, Protocol):
    """What `apply` needs of an item event (streams.events.Item has it)."""

    @property
    def item_id(self) -> str: ...  # noqa: D102
    @property
    def available(self) -> bool: ...  # noqa: D102
    @property
    def published_ms(self) -> int | None: ...  # noqa: D102


class Seen(NamedTuple):
    """Where a row's item first appeared in the items topic; release rows have partition -1."""

    partition: int
    offset: int


_FROM_RELEASE = Seen(-1, -1)


class Catalog:
    """The items of one release plus those that arrived since; not safe to change during a scan."""

    def __init__(
        self,
        rows: ItemTable,
        step_vectors_NE: F32,
        scan_vectors_ND: F32,
        encoder: ItemEncoder | None = None,
    ) -> None:
        num_rows = len(rows.items)
        self.ids: list[str] = [row.item_id for row in rows.items]
        self.offsets: list[int] = []
        """Next offset per partition of the items topic."""
        self.step_vectors_NE = _with_spare(step_vectors_NE, num_rows)
        self.scan_vectors_ND = _with_spare(scan_vectors_ND, num_rows)
        self._mask(np.arange(num_rows, len(self.scan_vectors_ND)))
        self.ids_N: npt.NDArray[np.object_] = np.array(
            self.ids + [""] * (len(self.scan_vectors_ND) - num_rows), dtype=object
        )
        self.texts = Texts(self.ids)
        """`ids`, as lists write them."""
        self._seen = [_FROM_RELEASE] * num_rows
        self._row_by_id = {item_id: row for row, item_id in enumerate(self.ids)}
        self._row_by_hash: dict[int, int] = {}
        for row, item_id in enumerate(self.ids):
            self._add_hash(item_hash(item_id), row)
        self._encoder = encoder
        self._categories = {} if encoder is not None else _rows_by_category(rows)
        self.published_ms: dict[str, int] = {
            item.item_id: item.published_ms for item in rows.items if item.published_ms is not None
        }
        """Of the items that say so, with or without a row."""
        self._unavailable: set[str] = set()
        self._hidden: dict[int, F32] = {}
        self.changed_rows: set[int] = set()
        """Of `scan_vectors_ND`, since somebody last emptied it."""
        self._changes: list[str] = []
        self._forgotten = 0
        for item in rows.items:
            if not item.available:
                self._set_available(item.item_id, available=False)

    @classmethod
    def empty(cls) -> "Catalog":
        """The catalogue before any release: availability only."""
        nothing = np.zeros((0, 1), np.float32)
        return cls(ItemTable(items=[]), nothing, nothing)

    @classmethod
    def from_release(cls, folder: Path, manifest: Manifest) -> "Catalog":
        """Read a release's items.

        Raises:
            ContractError: tables and vectors disagree with the manifest, ids repeat or are
            unsorted,
                two items share a hash, or a vector is not finite.
        """
        where = f"release {folder.name}"
        try:
            table = _read_items((folder / ITEMS_NAME).read_bytes())
            step = np.load(folder / STEP_VECTORS_NAME, allow_pickle=False)
            scan = np.load(folder / SCAN_VECTORS_NAME, allow_pickle=False)
        except (OSError, ValueError, *BAD_JSON) as error:
            raise ContractError(
                f"{where}: items cannot be read: {error}", reason="items"
            ) from error
        num, shapes = manifest.num_items, (step.shape, scan.shape)
        expected = ((num, manifest.step_dim), (num, manifest.scan_dim))
        if len(table.items) != num or shapes != expected or {step.dtype, scan.dtype} != {_F32}:
            raise ContractError(
                f"{where}: {len(table.items)} items and vectors {shapes} "
                f"of {step.dtype}, {scan.dtype}; "
                f"the manifest says float32 {expected}",
                reason="items",
            )
        if not (np.isfinite(step).all() and np.isfinite(scan).all()):
            raise ContractError(f"{where}: item vectors are not finite", reason="non-finite")
        ids = [row.item_id for row in table.items]
        if any(left >= right for left, right in pairwise(ids)):
            raise ContractError(f"{where}: item ids are not sorted and unique", reason="items")
        return cls(table, step, scan, ItemEncoder.from_release(folder, manifest))

    @property
    def num_items(self) -> int:
        """Items with a row."""
        return len(self.ids)

    @property
    def unavailable(self) -> frozenset[str]:
        """Ids that must not be listed now."""
        return frozenset(self._unavailable)

    def is_available(self, item_id: str) -> bool:
        """Whether an item may be listed; an unknown one may."""
        return item_id not in self._unavailable

    def row(self, item_id: str) -> int | None:
        """Row of an item that the model can step or score."""
        return self._row_by_id.get(item_id)

    def row_of_hash(self, hash_: int, before: list[int] | None = None) -> int | None:
        """Row of an item named by its hash.

        Args:
            hash_: from a user record.
            before: only items that stood in the items topic below these offsets, release rows
            always.
        """
        row = self._row_by_hash.get(hash_)
        if row is None or before is None:
            return row
        seen = self._seen[row]
        limit = before[seen.partition] if 0 <= seen.partition < len(before) else 0
        return row if seen.partition < 0 or seen.offset < limit else None

    @property
    def num_changes(self) -> int:
        """Items that came, or came again, so far."""
        return self._forgotten + len(self._changes)

    def changed_since(self, num_changes: int) -> list[str] | None:
        """Ids of the items that came after so many others; None where that is too long ago."""
        begin = num_changes - self._forgotten
        return self._changes[begin:] if begin >= 0 else None

    def apply(self, item: ItemVersion | None, partition: int, offset: int) -> None:
        """Take one record of the items topic; None is a record that was no item.

        Raises:
            ContractError: the new item's hash is that of another item; it is left out.
        """
        missing = partition + 1 - len(self.offsets)
        self.offsets.extend([0] * missing)
        if offset < self.offsets[partition]:
            return
        self.offsets[partition] = offset + 1
        if item is None:
            return
        self._changes.append(item.item_id)
        if len(self._changes) > CHANGES_MAX:
            self._forgotten += len(self._changes)
            self._changes = []
        if item.published_ms is not None:
            self.published_ms[item.item_id] = item.published_ms
        if item.item_id not in self._row_by_id:
            self._add(item, Seen(partition, offset))
        self._set_available(item.item_id, available=item.available)

    def _add(self, item: ItemVersion, seen: Seen) -> None:
        vectors = self._encoder.encode(item) if self._encoder else self._kin(item)
        if vectors is None:
            return
        row = len(self.ids)
        self._add_hash(item_hash(item.item_id), row)
        if row == len(self.scan_vectors_ND):
            self._grow()
        self.step_vectors_NE[row], self.scan_vectors_ND[row] = vectors
        self.ids.append(item.item_id)
        self.ids_N[row] = item.item_id
        self.texts.extend([item.item_id])
        self._seen.append(seen)
        self._row_by_id[item.item_id] = row
        self.changed_rows.add(row)

    def _kin(self, item: ItemVersion) -> Encoded | None:
        """Mean of the release's items that share a category; None where there are none."""
        known = sorted({name for name in item.categories if name in self._categories})
        if not known:
            return None
        rows = np.unique(np.concatenate([self._categories[name] for name in known]))
        scan_XD = self._true_scan(rows)
        return Encoded(_mean(self.step_vectors_NE, rows), _mean(scan_XD, np.arange(len(rows))))

    def _add_hash(self, hash_: int, row: int) -> None:
        other = self._row_by_hash.setdefault(hash_, row)
        if other != row:
            raise ContractError(
                f"catalogue: items in rows {other} ({self.ids[other]!r}) and {row} share the hash "
                f"{hash_:016x}; rename one",
                reason="hash-collision",
            )

    def _set_available(self, item_id: str, *, available: bool) -> None:
        row = self._row_by_id.get(item_id)
        if available:
            self._unavailable.discard(item_id)
            if row in self._hidden:
                self.scan_vectors_ND[row] = self._hidden.pop(row)
                self.changed_rows.add(row)
            return
        self._unavailable.add(item_id)
        if row is not None and row not in self._hidden:
            self._hidden[row] = self.scan_vectors_ND[row].copy()
            self._mask(np.array([row]))
            self.changed_rows.add(row)

    def _mask(self, rows: npt.NDArray[np.int64]) -> None:
        # The last query coordinate is 1, so this row's score is MASKED for everybody.
        self.scan_vectors_ND[rows] = 0
        self.scan_vectors_ND[rows, -1] = MASKED

    def _true_scan(self, rows: npt.NDArray[np.int64]) -> F32:
        vectors = self.scan_vectors_ND[rows]
        for at, row in enumerate(rows.tolist()):
            if row in self._hidden:
                vectors[at] = self._hidden[row]
        return vectors

    def _grow(self) -> None:
        num_rows = len(self.ids)
        self.step_vectors_NE = _with_spare(self.step_vectors_NE, num_rows)
        self.scan_vectors_ND = _with_spare(self.scan_vectors_ND, num_rows)
        self._mask(np.arange(num_rows, len(self.scan_vectors_ND)))
        ids = np.full(len(self.scan_vectors_ND), "", dtype=object)
        ids[:num_rows] = self.ids_N[:num_rows]
        self.ids_N = ids


_F32 = np.dtype(np.float32)


class _RawTable(msgspec.Struct):
    """`ItemTable`, its rows not yet decoded."""

    items: list[msgspec.Raw]


def _read_items(data: bytes) -> ItemTable:
    """Row by row: one call for all would hold the interpreter, and so every click."""
    row = msgspec.json.Decoder(ItemRow)
    return ItemTable(
        items=[row.decode(raw) for raw in msgspec.json.decode(data, type=_RawTable).items]
    )


def _with_spare(vectors: F32, num_rows: int) -> F32:
    capacity = (num_rows // SPARE_ROWS + 1) * SPARE_ROWS
    grown = np.zeros((capacity, vectors.shape[1]), np.float32)
    grown[:num_rows] = vectors[:num_rows]
    return grown


def _mean(vectors: F32, rows: npt.NDArray[np.int64]) -> F32:
    mean: F32 = vectors[rows].mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


def _rows_by_category(table: ItemTable) -> dict[str, npt.NDArray[np.int64]]:
    rows: dict[str, list[int]] = {}
    for row, item in enumerate(table.items):
        for name in item.categories:
            rows.setdefault(name, []).append(row)
    return {name: np.array(members, np.int64) for name, members in rows.items()}
