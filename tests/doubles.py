"""Logs for unit tests, chunks cut from them, and damage."""

from afterclick.streams.events import Click, encode
from afterclick.streams.record import Chunk, Record


def log_of(
    clicks: list[Click], *, start: int = 0, record_ms: int = 1_700_000_000_000
) -> list[Record]:
    """Clicks as log records, one second apart."""
    records = []
    for at, click in enumerate(clicks):
        key, value = encode(click)
        records.append(Record(start + at, record_ms + 1000 * at, key, value))
    return records


def cut(records: list[Record], sizes: list[int]) -> list[Chunk]:
    """Chunks of the given sizes, the last size repeated until the log ends."""
    chunks: list[Chunk] = []
    at, turn = 0, 0
    begin = records[0].offset if records else 0
    while at < len(records):
        piece = records[at : at + sizes[min(turn, len(sizes) - 1)]]
        chunks.append(Chunk(begin, piece[-1].offset + 1, piece))
        begin, at, turn = piece[-1].offset + 1, at + len(piece), turn + 1
    return chunks


def damaged(data: bytes) -> bytes:
    """The same bytes with one bit turned over, whatever they were."""
    return data[:-1] + bytes([data[-1] ^ 1])
