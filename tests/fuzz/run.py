"""Fold poisoned logs: `python -m tests.fuzz.run --inputs 1000000` (`make fuzz N=1000000`).

Every round folds one log twice, once whole and once without its bad records, and compares. The last
line is one JSON object.
"""

import argparse
import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from afterclick.serving.manifest import Publication
from afterclick.serving.records import TopList, decode_record
from afterclick.serving.releases import LoadedRelease
from afterclick.serving.settings import ListRules, ServingSettings
from afterclick.streams.partition import PartitionFold, Serving
from afterclick.streams.piece import Limits
from afterclick.streams.record import DeadLetter, LogEdges, Record
from afterclick.streams.replica import Replica
from tests.doubles import cut
from tests.fuzz.poison import Sent, stream
from tests.tiny_release import digest_of, write_tiny_release

REASONS = {
    "null-value", "too-large", "json", "schema", "null-key", "wrong-key", "missing-item",
}  # fmt: skip
"""What docs/contracts.md names; tests/unit/test_docs.py holds the page to the code."""

ROUND = 2_000
"""Records of one log: long enough that histories fill."""


class Found(NamedTuple):
    """What one log came to."""

    letters: Counter[str]
    wrong: list[str]
    """Promises that did not hold, in words."""


def load_release(folder: Path) -> LoadedRelease:
    """A tiny release in `folder`."""
    write_tiny_release(folder, num_items=300, seed=1)
    publication = Publication(number=1, release=folder.name, sha256=digest_of(folder))
    return LoadedRelease(publication, folder, ServingSettings(provider="cpu", threads=1))


def fold(records: list[Record], release: LoadedRelease, rng: random.Random) -> tuple[Replica, list]:
    """The store after a log in chunks of chance, and its dead letters."""
    store, letters = Replica(), list[DeadLetter]()
    p = release.publication
    serving = Serving(p.number, p.release, p.sha256, release, release.catalog)
    folding = PartitionFold(
        0,
        store,
        ListRules.of(ServingSettings(k=5, margin=2, history=8, popularity_items_max=50)),
        Limits(users_max=8, records_max=100, bytes_max=1 << 16),
        serving=lambda: serving,
        dead_letters=letters.extend,
        log_start=lambda: 0,
        batch_ids=(f"b{n}" for n in itertools.count()),
    )
    folding.open(LogEdges("t", 0, 10**9), lambda offset: None)
    for chunk in cut(records, [rng.randrange(1, 200) for _ in range(100)]):
        moved = folding.process(chunk._replace(begin=folding.position))
        assert moved.seek is None
        assert moved.waiting_for is None
    return store, letters


def examine(sent: list[Sent], release: LoadedRelease, rng: random.Random) -> Found:
    """Fold a log with and without its bad records, and say what does not hold."""
    wrong: list[str] = []
    store, letters = fold([one.record for one in sent], release, rng)
    bad = {letter.record.offset: letter for letter in letters}
    if len(bad) != len(letters):
        wrong.append("a record became two letters")
    for one in sent:
        letter = bad.get(one.record.offset)
        if one.good and letter:
            wrong.append(f"a good record became a letter: {letter}")
        if one.good is False and not letter:
            wrong.append(f"a bad record was folded: {one.record}")
        if letter and letter.record != one.record:
            wrong.append(f"a letter holds another record: {letter}")
    wrong += [f"reason {letter.reason!r}" for letter in letters if letter.reason not in REASONS]
    without, none = fold([one.record for one in sent if one.record.offset not in bad], release, rng)
    if none:
        wrong.append(f"a record is bad only beside others: {none[0]}")
    if store.snapshot() != without.snapshot():
        wrong.append("good records fold otherwise beside bad ones")
    for body in store.lists.values():
        if not all(math.isfinite(s) for s in msgspec.json.decode(body, type=TopList).scores):
            wrong.append("a score is not finite")
    for data in store.records.values():
        if not np.isfinite(release.engine.unpacked([decode_record(data).state])).all():
            wrong.append("a state is not finite")
    return Found(Counter(letter.reason for letter in letters), wrong)


def main() -> int:
    """Run and print one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begun_s = time.monotonic()
    letters: Counter[str] = Counter()
    crashes = wrong = inputs = 0
    with tempfile.TemporaryDirectory(prefix="afterclick-fuzz-") as folder:
        release = load_release(Path(folder) / "r1")
        for number in itertools.count():
            if inputs >= options.inputs:
                break
            rng = random.Random(f"{options.seed}/{number}")
            sent = stream(rng, min(ROUND, options.inputs - inputs))
            inputs += len(sent)
            try:
                found = examine(sent, release, rng)
            except Exception as error:  # noqa: BLE001 - any of them is what this looks for
                crashes += 1
                sys.stderr.write(f"seed {options.seed}/{number}: {error!r}\n")
                continue
            letters += found.letters
            wrong += bool(found.wrong)
            for text in found.wrong[:3]:
                sys.stderr.write(f"seed {options.seed}/{number}: {text[:500]}\n")
    result = {
        "inputs": inputs,
        "letters": letters.total(),
        "crashes": crashes,
        "wrong": wrong,
        "seconds": round(time.monotonic() - begun_s, 1),
        "reasons": dict(sorted(letters.items())),
        "seed": options.seed,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if crashes or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
