"""Bytes of a user in Redis, by `MEMORY USAGE`: `python -m benchmarks.footprint`.

Users with a full history are folded into a Redis of their own, by the product's fold and its
script, once for each row: states of 32 and of 16 bits, other sizes of list and history. `all` is
what Redis itself says it grew by, a user: record, list, their keys and the tables of keys; expiry
is on, as it is in production. Beside it CPU of a step and of a whole history's steps: states of 16
bits are rounded after each of them, which takes a call each; and of putting a list's bytes
together, compression included. Random weights: they do not change sizes. Prints the machine, a
table, one JSON line.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import redis

from afterclick.serving.engine import Engine
from afterclick.serving.keys import Keys
from afterclick.serving.manifest import MANIFEST_NAME, Publication, sha256_of
from afterclick.serving.records import without_stamp
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.serving.store import Store
from afterclick.streams.events import Click, encode
from afterclick.streams.local import local_redis
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import Chunk, LogEdges, Record
from benchmarks.report import machine, tell
from tests.tiny_release import write_tiny_release

ITEMS = 20_000
START_MS = 1_700_000_000_000
CHUNK = 1024
USERS = 64
"""Of one timed call of the step graph, one thread."""


class Size(NamedTuple):
    """One row of the table."""

    state_dtype: Literal["fp32", "fp16"] = "fp32"
    units: int = 128
    k: int = 50
    margin: int = 20
    history: int = 50
    scores: bool = True
    compression: Literal["none", "zlib"] = "none"


SIZES = (
    Size(),
    Size("fp16"),
    Size(compression="zlib"),
    Size("fp16", scores=False),
    Size("fp16", scores=False, compression="zlib"),
    Size("fp16", k=20, margin=10),
    Size("fp16", k=20, margin=10, history=20),
    Size(units=64),
    Size(units=256),
    Size("fp16", units=256),
)
"""The default first; then what saves bytes, and what larger models take."""


def footprint(size: Size, folder: Path, *, users: int) -> dict[str, Any]:
    """Medians of a record and of a list, and what Redis grew by, in bytes a user."""
    release = folder / "r1"
    write_tiny_release(release, num_items=ITEMS, units=size.units, state_dtype=size.state_dtype)
    serving = ServingSettings(
        k=size.k,
        margin=size.margin,
        history=size.history,
        list_scores=size.scores,
        provider="cpu",
        threads=1,
    )
    digest = sha256_of(release / MANIFEST_NAME)
    loaded = LoadedRelease(Publication(number=1, release="r1", sha256=digest), release, serving)
    us = {steps: _advance_us(loaded.engine, steps) for steps in (1, size.history)}
    clicks = _clicks(users, size.history)
    with local_redis(folder / "redis") as server:
        client = redis.Redis.from_url(server.url)
        keys = Keys("afterclick")
        ttl_s = 1000
        store = Store(
            server.url,
            keys,
            record_ttl_s=ttl_s,
            popularity_ttl_s=ttl_s,
            compress_lists=size.compression == "zlib",
        )
        fold = PartitionFold(
            0,
            store,
            ListRules.of(serving),
            Limits(users_max=256, records_max=CHUNK, bytes_max=1 << 20),
            serving=lambda: Serving(1, "r1", digest, loaded, loaded.catalog),
            dead_letters=lambda letters: None,
            log_start=lambda: 0,
            batch_ids=(f"b{n}" for n in itertools.count()),
        )
        fold.open(LogEdges("t", 0, len(clicks)), lambda offset: None)
        before = _used(client)
        for begin in range(0, len(clicks), CHUNK):
            part = clicks[begin : begin + CHUNK]
            end = begin + len(part)
            while begin < end:
                moved = fold.process(Chunk(begin, end, clicks[begin:end]))
                assert moved.seek is None, moved
                begin = fold.position
        others = sum(
            client.memory_usage(key, samples=0) or 0
            for key in client.scan_iter()
            if b":u:" not in key and not key.startswith(b"afterclick:top:")
        )
        grown = _used(client) - before - others
        names = [f"u{user:07d}" for user in range(users)]
        found = {
            what: statistics.median(client.memory_usage(name_of(user)) or 0 for user in names)
            for what, name_of in (
                ("record", lambda user: keys.user(0, user)),
                ("list", lambda user: keys.top(0, user)),
            )
        }
        _, standing = store.read_standing(0, names[:USERS])
        bodies = [without_stamp(user.list_data or b"") for user in standing]
        pack_us = _user_us(lambda: [store.packed(body, START_MS) for body in bodies])
        store.close()
        client.close()
    return {
        **size._asdict(),
        "record_bytes": int(found["record"]),
        "list_bytes": int(found["list"]),
        "both_bytes": int(sum(found.values())),
        "all_bytes": round(grown / users),
        "step_us": us[1],
        "rebuild_us": us[size.history],
        "pack_us": pack_us,
    }


def _user_us(work: Callable[[], Any]) -> float:
    """CPU µs a user of what is done for `USERS` of them, the smallest of some times."""
    taken = []
    for _ in range(20):
        begun_s = time.process_time()
        work()
        taken.append(time.process_time() - begun_s)
    return round(min(taken) / USERS * 1e6, 1)


def _advance_us(engine: Engine, steps: int) -> float:
    """CPU µs a user of so many steps."""
    rng = np.random.default_rng(0)
    state_BS = engine.zero_state(USERS)
    x_TBE = rng.standard_normal((steps, USERS, engine.manifest.step_dim)).astype(np.float32)
    gap_TB, lens_B = np.zeros((steps, USERS), np.int64), np.full(USERS, steps, np.int32)
    return _user_us(lambda: engine.advance(state_BS, x_TBE, lens_B, gap_TB=gap_TB))


def table(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        "| states | H | K + margin | history | lists | record, bytes | list, bytes | both "
        "| all, a user | CPU µs: a step | a rebuild | a list put together |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['state_dtype']} | {row['units']} | {row['k']} + {row['margin']} "
        f"| {row['history']} | {_lists(row)} | {row['record_bytes']:,} | {row['list_bytes']:,} "
        f"| {row['both_bytes']:,} | {row['all_bytes']:,} "
        f"| {row['step_us']} | {row['rebuild_us']} | {row['pack_us']} |"
        for row in result["sizes"]
    ]
    return lines


def _lists(row: dict[str, Any]) -> str:
    said = "ids, scores" if row["scores"] else "ids"
    return said if row["compression"] == "none" else f"{said}, {row['compression']}"


def _clicks(users: int, history: int) -> list[Record]:
    """Everybody's whole history, user after user: what the fold makes of it is the same."""
    rng = np.random.default_rng(7)
    items = rng.integers(0, ITEMS, users * history).tolist()
    records = []
    for at, item in enumerate(items):
        click = Click(
            user_id=f"u{at // history:07d}",
            item_id=f"i{item:05d}",
            timestamp_ms=START_MS + 1000 * at,
            event_id=f"e{at}",
        )
        records.append(Record(at, START_MS + 1000 * at, *encode(click)))
    return records


def _used(client: "redis.Redis") -> int:
    client.execute_command("MEMORY PURGE")
    return int(client.info("memory")["used_memory_dataset"])


def main(argv: Sequence[str] | None = None) -> int:
    """Bytes of a user at several sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.footprint", description=main.__doc__
    )
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    name, words = machine("")
    print(f"machine: {words}")
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="afterclick-footprint-") as folder:
            rows.append(footprint(size, Path(folder), users=given.users))
        print(msgspec.json.encode(rows[-1]).decode(), file=sys.stderr, flush=True)
    result = {"machine": name, "users": given.users, "items": ITEMS, "sizes": rows}
    tell(
        "footprint", "footprint", arguments, (name, words), result, table(result),
        report=given.report,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
