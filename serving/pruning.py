"""Which releases nothing needs any more: neither published, nor new, nor named by an inputs list.

A replay loads every release that a partition's inputs name, so those stay, whichever namespace on
this
Redis they are of; so do those that copies in an archive name. Knows no Kafka.
"""

from collections.abc import Iterable

import msgspec

from afterclick.serving.errors import ConfigError
from afterclick.serving.keys import Keys
from afterclick.serving.place import Place
from afterclick.serving.records import InputsEntry
from afterclick.serving.releases import ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.serving.store import Store


def prune(
    settings: ServingSettings, *, archive: str = "", keep: int, dry_run: bool = False
) -> list[str]:
    """Delete releases that nothing needs; their names.

    Args:
        settings: where releases and Redis are.
        archive: place of the archive, empty for none.
        keep: newest releases by name, which is their time, that stay: the next one to publish is
            among them.
        dry_run: delete nothing.

    Raises:
        ConfigError: no inputs list names any release: Redis may be empty, and then a rebuild needs
            what nothing names.
        UnavailableError: Redis, the releases or the archive do not answer.
    """
    named = _in_redis(settings) | (_in_archive(Place(archive)) if archive else set())
    if not named:
        raise ConfigError(
            "releases prune: no inputs list names a release; if Redis was emptied, rebuild it "
            "first, or pass --archive PLACE"
        )
    store = ReleaseStore(settings.releases, settings.releases_cache)
    with store.publishing():
        current = store.current()
        names = store.list()
        kept = {*named, *names[len(names) - keep :], *([current.release] if current else [])}
        gone = [name for name in names if name not in kept]
        if not dry_run:
            for name in gone:
                store.remove(name)
    return gone


def _in_redis(settings: ServingSettings) -> set[str]:
    keys = Keys(settings.namespace, layout=settings.layout)
    store = Store(settings.redis, keys, record_ttl_s=settings.record_ttl_s, popularity_ttl_s=1)
    try:
        return _named(store.all_inputs())
    finally:
        store.close()


def _in_archive(place: Place) -> set[str]:
    patterns = ("inputs/*/p*.jsonl*", "inputs/*/e*/p*.jsonl*")  # an epoch has its own
    files = [place.read(name) or b"" for pattern in patterns for name in place.names(pattern)]
    return _named(line for data in files for line in data.splitlines())


def _named(entries: Iterable[bytes]) -> set[str]:
    decoded = (msgspec.json.decode(entry, type=InputsEntry) for entry in entries)
    return {entry.release for entry in decoded if entry.release}
