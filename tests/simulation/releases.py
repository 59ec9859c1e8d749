"""Releases and catalogues as of every items offset, loaded once in a process: they never change."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from afterclick.serving.catalog import Catalog
from afterclick.serving.manifest import Publication
from afterclick.serving.records import InputsEntry
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ServingSettings
from afterclick.streams.events import Item
from afterclick.streams.partition import Serving
from tests.simulation.plan import NUM_ITEMS
from tests.tiny_release import digest_of, write_tiny_release

ITEMS: tuple[Item | None, ...] = (
    Item(item_id="n0", categories=["c0"]),
    Item(item_id="i00003", categories=["c3"], available=False),
    Item(item_id="n1", categories=["c1", "c2"]),
    None,  # a record that was no item
    Item(item_id="i00003", categories=["c3"], available=True),
    Item(item_id="n2", categories=["nobody-has-it"], available=False),
)
"""The items topic."""

NAMES = ("", "r1", "r2", "r1", "r3")
"""Release of every publication; the third rolls back."""


class _Names(NamedTuple):
    release: str
    sha256: str


class Releases:
    """What every publication serves at every items offset.

    Args:
        folder: where releases are written.
        write: writes one: folder, seed.
    """

    def __init__(self, folder: Path, write: Callable[[Path, int], object] | None = None) -> None:
        self._folder = folder
        self._made: dict[tuple[int, int], Serving] = {}
        for seed, name in enumerate(sorted(set(NAMES) - {""})):
            if write is not None:
                write(folder / name, seed)
            else:
                write_tiny_release(
                    folder / name, num_items=NUM_ITEMS, units=4, seed=seed, categories=4
                )

    def serving(self, publication: int, items: int) -> Serving:
        """What a worker serves under a publication once it read so many items."""
        key = (publication, items)
        if key not in self._made:
            self._made[key] = self._load(publication, items)
        return self._made[key]

    def of_entry(self, entry: InputsEntry) -> Serving:
        """What an inputs entry names."""
        serving = self.serving(entry.publication, sum(entry.items))
        named = (entry.release, entry.sha256, entry.items)
        assert named == (serving.name, serving.sha256, serving.catalog.offsets), named
        return serving

    def _load(self, number: int, items: int) -> Serving:
        loaded, catalog, names = None, Catalog.empty(), _Names("", "")
        if number:
            folder = self._folder / NAMES[number]
            names = _Names(folder.name, digest_of(folder))
            publication = Publication(number=number, release=names.release, sha256=names.sha256)
            settings = ServingSettings(provider="cpu", threads=1, k=3, margin=1)
            loaded = LoadedRelease(publication, folder, settings)
            catalog = loaded.catalog
        catalog.offsets = [0]
        for offset, item in enumerate(ITEMS[:items]):
            catalog.apply(item, 0, offset)
        if loaded is not None:
            loaded.refresh()
        return Serving(number, names.release, names.sha256, loaded, catalog)
