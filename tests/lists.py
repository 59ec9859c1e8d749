"""A list as a worker writes it, for whoever reads lists."""

import msgspec

from afterclick.serving.records import TopList


def a_list(*items: str, written_ms: int = 0) -> bytes:
    return msgspec.json.encode(
        TopList(
            items=list(items),
            scores=[1.0 / (n + 1) for n in range(len(items))],
            source="model",
            release="r1",
            publication=3,
            items_offset=[7],
            partition=2,
            offset=41,
            event_ms=900,
            written_ms=written_ms,
        )
    )
