"""Whose records a namespace holds: opened in its epoch, checked against the topic, claimed.

Knows neither Faust nor a fold.
"""

import logging
import time
from typing import TypeVar

import msgspec

from afterclick.serving.errors import ConfigError, UnavailableError
from afterclick.serving.keys import Keys, Meta
from afterclick.serving.settings import ServingSettings
from afterclick.serving.store import Store
from afterclick.streams.admin import TopicsInfo
from afterclick.streams.popularity import Popularity
from afterclick.streams.settings import StreamsSettings

S = TypeVar("S", bound=Store)

log = logging.getLogger(__name__)


def open_store(serving: ServingSettings, topics: TopicsInfo) -> Store:
    """The store of a namespace, in the epoch and with the partitions that it has.

    Raises:
        ConfigError: its records are of another topic, of more partitions, or of another layout.
        UnavailableError: Redis does not answer.
    """
    store = new_store(serving, Keys(serving.namespace, layout=serving.layout), Store)
    meta = store.read_meta()
    if meta is not None:
        _check_meta(meta, serving, topics)
    store.keys = Keys(
        serving.namespace,
        layout=serving.layout,
        partitions=meta.partitions if meta and meta.partitions else topics.clicks_partitions,
        epoch=meta.epoch if meta else 0,
    )
    return store


def new_store(serving: ServingSettings, keys: Keys, kind: type[S]) -> S:
    """A store under the given names, whatever stands there."""
    window_s = Popularity(
        half_life_s=serving.popularity_half_life_s, items_max=serving.popularity_items_max
    ).window_s
    return kind(
        serving.redis,
        keys,
        record_ttl_s=serving.record_ttl_s,
        popularity_ttl_s=2 * window_s + 86400,
        compress_lists=serving.list_compression == "zlib",
    )


def wait_for_redis(serving: ServingSettings, topics: TopicsInfo, timeout_s: float) -> Store:
    """`open_store` once Redis answers, and has what a worker needs.

    Raises:
        ConfigError: as `open_store`, or the server would drop state.
        UnavailableError: it did not answer within `timeout_s`.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            store = open_store(serving, topics)
            store.check_server()
            return store
        except UnavailableError as error:
            if time.monotonic() > until_s:
                raise UnavailableError(f"{error}; waited {timeout_s:.0f} s") from error
            log.warning("%s; trying again", error)
            time.sleep(0.5)


def claim_namespace(
    store: Store, serving: ServingSettings, streams: StreamsSettings, topics: TopicsInfo
) -> None:
    """Tell readers where lists stand, and ourselves later whose log the records are of."""
    while True:
        stored = store.stored_meta()
        found = msgspec.json.decode(stored, type=Meta) if stored else None
        new = Meta(layout=serving.layout, partitions=topics.clicks_partitions)
        if found is not None:
            _check_meta(found, serving, topics)
            new = msgspec.structs.replace(found, partitions=found.partitions or new.partitions)
        new = msgspec.structs.replace(
            new, topic=streams.clicks_topic, topic_id=topics.clicks_id, k=serving.k
        )
        if new.epoch != store.keys.epoch or new.partitions != store.keys.partitions:
            raise UnavailableError(f"namespace {serving.namespace!r}: migrated just now; try again")
        if store.write_meta(stored, new):
            return


def grown_words(streams: StreamsSettings, num: int, known: int) -> str:
    """What an operator must know of partitions that were added."""
    return (
        f"topic {streams.clicks_topic!r} has {num} partitions, records are spread over {known}: "
        "the new ones wait until `afterclick migrate` has moved their users there; the others are "
        "folded on"
    )


def _check_meta(meta: Meta, serving: ServingSettings, topics: TopicsInfo) -> None:
    where = f"namespace {serving.namespace!r}"
    if meta.layout != serving.layout:
        raise ConfigError(
            f"{where}: its lists stand under the layout {meta.layout!r}, "
            f"AFTERCLICK_SERVING__LAYOUT is {serving.layout!r}: readers would look for users where "
            "they are not; set it back, or set another AFTERCLICK_SERVING__NAMESPACE"
        )
    if meta.topic_id and topics.clicks_id and meta.topic_id != topics.clicks_id:
        raise ConfigError(
            f"{where}: its records are folded from topic {meta.topic!r} with id {meta.topic_id}, "
            f"the topic now has {topics.clicks_id}: it was created anew, or is another one; "
            "`afterclick migrate` carries the users over; another AFTERCLICK_SERVING__NAMESPACE "
            "starts over"
        )
    if meta.partitions > topics.clicks_partitions:
        raise ConfigError(
            f"{where}: its records are spread over {meta.partitions} partitions, the topic has "
            f"{topics.clicks_partitions}; `afterclick migrate` carries the users over; another "
            "AFTERCLICK_SERVING__NAMESPACE starts over"
        )
