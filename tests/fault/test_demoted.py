"""A primary that was demoted keeps its connections: who writes must find the new one by itself."""

from pathlib import Path

import msgspec
import pytest

from afterclick.serving.keys import Keys
from afterclick.serving.records import Head
from afterclick.serving.store import Store
from tests.fault.proxy import Proxy
from tests.fault.redis_pair import redis_pair

pytestmark = pytest.mark.service


def test_a_write_finds_the_new_primary_behind_the_same_address(tmp_path: Path) -> None:
    """Nothing resets the old connection: without looking again a worker would wait for ever."""
    with redis_pair(tmp_path) as pair, Proxy(pair.primary.port) as front:
        store = Store(
            f"redis://{front.address}/0", Keys("n"), record_ttl_s=100, popularity_ttl_s=100
        )
        first, second = Head(next=1, batch="a"), Head(next=2, batch="b")
        assert store.commit(0, b"", first, None, [], []) is None
        pair.keep_behind()
        pair.promote()
        front.lead_to(pair.primary.port, reset=False)
        pair.rejoin()

        stands_there = store.commit(0, msgspec.json.encode(first), second, None, [], [])

        assert stands_there in (None, b"")  # the first write may not have come across
        store.close()
