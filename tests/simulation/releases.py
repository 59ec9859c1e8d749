"""Releases and catalogues as of every items offset, loaded once in a process: they never change.

Memories do: whoever serves a release with a blend has one of its own (`Hearing`).
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from afterclick.serving.blend import Blend
from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import Engine
from afterclick.serving.manifest import Publication
from afterclick.serving.memory import Memory
from afterclick.serving.records import InputsEntry
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.scanner import Scanner
from afterclick.serving.settings import ServingSettings
from afterclick.streams.events import Item
from afterclick.streams.feed import absorber_of, catch_up
from afterclick.streams.partition import Serving
from afterclick.streams.record import Record
from afterclick.streams.signals import Absorber
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


class Hearing(NamedTuple):
    """A release with a memory of its own, as `LoadedRelease` is to the fold."""

    engine: Engine
    catalog: Catalog
    scanner: Scanner
    blend: Blend | None
    memory: Memory | None

    @classmethod
    def of(cls, loaded: LoadedRelease) -> "Hearing":
        """The release, its memory as it came."""
        blend = copy.copy(loaded.blend)
        if blend is not None:
            blend._kept = None  # of the memory that it was asked with
        memory = None
        if loaded.memory is not None:
            memory = Memory(loaded.memory.ids)
            memory._restore({name: array.copy() for name, array in loaded.memory.dump().items()})
        return cls(loaded.engine, loaded.catalog, loaded.scanner, blend, memory)


class SignalsTopic:
    """Topic `signals` as its values so far, for `catch_up`."""

    def __init__(self, values: list[bytes]) -> None:
        self.values = values

    def edges(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self.values)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[list[Record]]:
        found = self.values[start:stop]
        yield [Record(start + at, 0, b"", value) for at, value in enumerate(found)]


class _Names(NamedTuple):
    release: str
    sha256: str


class Releases:
    """What every publication serves at every items offset.

    Args:
        folder: where releases are written.
        write: writes one: folder, seed.
        blend: whether the tiny ones written without `write` have one.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path, int], object] | None = None,
        *,
        blend: bool = False,
    ) -> None:
        self._folder = folder
        self._made: dict[tuple[int, int], Serving] = {}
        for seed, name in enumerate(sorted(set(NAMES) - {""})):
            if write is not None:
                write(folder / name, seed)
            else:
                write_tiny_release(
                    folder / name,
                    num_items=NUM_ITEMS,
                    units=4,
                    seed=seed,
                    categories=4,
                    blend=blend,
                    state_dtype="fp16" if name == "r2" else "fp32",
                )

    def serving(self, publication: int, items: int) -> Serving:
        """What a worker serves under a publication once it read so many items."""
        key = (publication, items)
        if key not in self._made:
            self._made[key] = self._load(publication, items)
        return self._made[key]

    def hearing(
        self, serving: Serving, namespace: str, signals: list[bytes], end: int
    ) -> tuple[Serving, Absorber | None]:
        """A release whose memory knows the topic up to an offset, and nobody else's hands on it."""
        loaded: Any = serving.release
        if loaded is None or loaded.memory is None:
            return serving, None
        own = Hearing.of(loaded)
        view: Any = SimpleNamespace(manifest=loaded.manifest, memory=own.memory)
        absorber = absorber_of(view, namespace)
        assert absorber is not None
        catch_up(SignalsTopic(signals), "", absorber, end)
        return serving._replace(release=own, signals=absorber.offset), absorber

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
