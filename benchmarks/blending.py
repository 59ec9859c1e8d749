"""The blend alone, stage by stage: `python -m benchmarks.blending [--against REF]`.

A memory and an index of sessions from the synthetic world (or from a log, `--clicks`), item vectors
that know what is clicked together, a network of random weights as large as the trainer's: what a
list costs, not how good it is. CPU time of the calling thread, in batches and for one user alone;
a stage's time is its own, without the stages that it calls; of several rounds the quietest counts,
because whoever else runs here takes the caches. `--against REF` runs the code of
another commit on the same data, turn by turn, and says whether the lists are the same bit for bit.
Prints the machine, a table, one JSON line.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import argparse
import csv
import functools
import gzip
import hashlib
import importlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx

from afterclick.serving.blend import Blend, Context
from afterclick.serving.catalog import Catalog
from afterclick.serving.engine import F32
from afterclick.serving.features import FEATURES, TIMED
from afterclick.serving.index import TwoStageScanner
from afterclick.serving.manifest import (
    BLEND_NAME,
    BlendSpec,
    ItemRow,
    ItemTable,
    Manifest,
    Snapshot,
    StateTensor,
    StepInputs,
)
from afterclick.serving.memory import Memory, memory_of
from afterclick.serving.records import item_hash
from afterclick.serving.scanner import Scanner
from afterclick.streams.events import Item
from afterclick.streams.synthetic import World
from afterclick.training.blend_graph import blend_graph

ROOT = Path(__file__).parents[1]
DIM = 128
UNITS = 64
WANT = 71
"""K + margin + 1, what a fold asks for by default."""
CLICKS_A_USER = 30
HISTORY = 50
END_MS = 1_700_000_000_000
ASKED = 256
"""Users whose lists are made."""
ALONE = 32
"""Users who are asked for one by one."""

FORMER = {"Scanner.look": "Scanner.top_and_scores", "Blend.rows": "Blend._rows_of"}
"""What a function was called in commits that this one may be compared with."""

STAGES: tuple[tuple[str, str, str], ...] = (
    ("rows", "serving.blend", "Blend.rows"),
    ("pasts", "serving.blend", "past_of"),
    ("scan", "serving.scanner", "Scanner.look"),
    ("scan", "serving.engine", "Scanner.look"),
    ("scan", "serving.index", "TwoStageScanner.look"),
    ("neighbours", "serving.neighbours", "neighbour_items"),
    ("candidates", "serving.blend", "_of_model"),
    ("candidates", "serving.blend", "_best_near"),
    ("candidates", "serving.blend", "name_candidates"),
    ("candidates", "serving.blend", "gather"),
    ("features", "serving.features", "describe"),
    ("network", "serving.blend", "Blend.scores"),
    ("lists", "serving.blend", "_lists"),
)
"""(stage, module, function); one that this code does not have is left out."""
REST = "the rest"


class Question(NamedTuple):
    """Everything that a list is made of."""

    blend: Blend
    query_BD: F32
    contexts: list[Context]
    memory: Memory
    catalog: Catalog
    scanner: Scanner


class Log(NamedTuple):
    """Sequences of clicks, those of the users who are asked for last."""

    ids: list[str]
    start_S1: np.ndarray
    item_P: np.ndarray
    time_P: np.ndarray | None


def world_log(num_items: int, num_clicks: int, seed: int) -> Log:
    """The synthetic world's readers, a sequence each."""
    world = World(seed, max(1, num_clicks // CLICKS_A_USER), num_items)
    rows = [
        (int(click.user_id[1:]), click.timestamp_ms, int(click.item_id[1:]))
        for click in world.past(num_clicks, END_MS)
    ]
    user_P, time_P, item_P = np.array(sorted(rows), np.int64).T
    start = np.flatnonzero(np.diff(user_P, prepend=-1))
    ids = [f"i{code:05d}" for code in range(int(item_P.max()) + 1)]
    return Log(ids, np.append(start, len(user_P)), item_P.copy(), time_P.copy())


def file_log(path: Path, num_clicks: int) -> Log:
    """The newest clicks of a file of sessions without times: `session_id,item_id`."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        rows = [(row["session_id"], row["item_id"]) for row in csv.DictReader(lines)][-num_clicks:]
    code: dict[str, int] = {}
    item_P = np.array([code.setdefault(item, len(code)) for _, item in rows], np.int64)
    fresh = [at for at, row in enumerate(rows) if at == 0 or row[0] != rows[at - 1][0]]
    return Log(list(code), np.array([*fresh, len(rows)]), item_P, None)


def vectors_of(log: Log, seed: int) -> F32:
    """(N, D + 1): what was clicked next to an item, in random directions; the last entry 0."""
    rng = np.random.default_rng(seed)
    random_ND = rng.standard_normal((len(log.ids), DIM)).astype(np.float32)
    is_first_P = np.zeros(len(log.item_P), bool)
    is_first_P[log.start_S1[:-1]] = True
    right = np.flatnonzero(~is_first_P)
    owner = np.concatenate([log.item_P[right], log.item_P[right - 1]])
    other = np.concatenate([log.item_P[right - 1], log.item_P[right]])
    order = np.argsort(owner, kind="stable")
    begin = np.flatnonzero(np.diff(owner[order], prepend=-1))
    vector_ND = 0.5 * random_ND
    vector_ND[owner[order][begin]] += np.add.reduceat(random_ND[other[order]], begin)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return np.concatenate([vector_ND, np.zeros((len(vector_ND), 1), np.float32)], axis=1)


def question(
    log: Log, folder: Path, spec: dict[str, Any], seed: int, scan: str = "exact"
) -> Question:
    """The last sequences are asked about, the others are what is known."""
    rng = np.random.default_rng(seed)
    split = len(log.start_S1) - 1 - ASKED
    end = int(log.start_S1[split])
    time_P = None if log.time_P is None else log.time_P[:end]
    features = [name for name in FEATURES if time_P is not None or name not in TIMED]
    blend_spec = BlendSpec(features=features, **spec)
    memory = memory_of(
        log.ids, log.start_S1[: split + 1], log.item_P[:end], time_P, per_item=blend_spec.sessions
    )
    scan_ND = vectors_of(log, seed)
    table = ItemTable(items=[ItemRow(item_id=item) for item in log.ids])
    catalog = Catalog(table, scan_ND[:, :-1].copy(), scan_ND)
    scanner: Scanner
    if scan == "exact":
        scanner = Scanner(catalog.scan_vectors_ND, provider="cpu", threads=1)
    else:
        scanner = TwoStageScanner(catalog.scan_vectors_ND, threads=1)
    kind = np.dtype([("hash", "<u8"), ("tag", "<u4"), ("traits", "<u2")])
    contexts, query_BD = [], np.zeros((ASKED, DIM + 1), np.float32)
    now_ms = END_MS if time_P is not None else 0
    for user, begin in enumerate(log.start_S1[split:-1].tolist()):
        # As far as anywhere within the sequence: short and long pasts.
        size = int(log.start_S1[split + user + 1]) - begin
        own = log.item_P[begin : begin + int(rng.integers(1, size + 1))][-HISTORY:]
        packed = np.zeros(len(own), kind)
        packed["hash"] = [item_hash(log.ids[code]) for code in own.tolist()]
        contexts.append(Context(packed.tobytes(), len(own), now_ms, now_ms))
        weight = 0.6 ** np.arange(len(own))[::-1]
        query = (scan_ND[own, :-1] * weight[:, None]).sum(axis=0)
        query_BD[user, :-1] = 14.0 * query / np.linalg.norm(query)
    query_BD[:, -1] = 1.0
    layers = [
        ((rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32),
         rng.standard_normal(shape[1]).astype(np.float32))
        for shape in ((len(features), UNITS), (UNITS, UNITS // 2), (UNITS // 2, 1))
    ]  # fmt: skip
    mean_F, scale_F = np.full(len(features), -3.0), np.full(len(features), 0.3)
    onnx.save(blend_graph(mean_F, scale_F, layers), folder / BLEND_NAME)
    manifest = Manifest(
        schema=1, release="random", created_at="", cell="lstm", num_items=len(log.ids),
        step_dim=DIM, scan_dim=DIM + 1, state=[StateTensor(name="h", layers=1, units=DIM)],
        inputs=StepInputs(), history=HISTORY, snapshot=Snapshot(source="random"), files={},
        blend=blend_spec,
    )  # fmt: skip
    blend = Blend(folder, manifest, threads=1)
    return Question(blend, query_BD, contexts, memory, catalog, scanner)


class Clock:
    """CPU time of each stage, without the stages within it."""

    def __init__(self) -> None:
        self.us: dict[str, float] = {}
        self._inner_us = [0.0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            self._inner_us.append(0.0)
            begun = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                took = (time.thread_time_ns() - begun) / 1e3
                self.us[stage] = self.us.get(stage, 0.0) + took - self._inner_us.pop()
                self._inner_us[-1] += took

        return called

    def watch(self) -> None:
        """Count the time of every stage from now on."""
        for stage, name, path in STAGES:
            owner: Any = importlib.import_module(f"afterclick.{name}")
            *outer, last = path.split(".")
            for part in outer:
                owner = getattr(owner, part, None)
            if not hasattr(owner, last):
                last = FORMER.get(path, last).rpartition(".")[2]
            if owner is not None and hasattr(owner, last):
                function = getattr(owner, last)
                for other in [owner, *map(sys.modules.get, _MODULES)]:
                    if getattr(other, last, None) is function:
                        setattr(other, last, self.timed(stage, function))


_MODULES = ("afterclick.serving.blend", "afterclick.serving.features")


def lists(asked: Question, size: int, num: int) -> list[Any]:
    """The lists of the first users, in batches of this size."""
    blend, query_BD, contexts, *rest = asked
    found = []
    for begin in range(0, num, size):
        part = slice(begin, begin + size)
        found += blend.rank(query_BD[part], contexts[part], *rest, want=WANT)
    return found


def moved(asked: Question, times: int) -> float:
    """Median CPU µs of a batch's first look at the items after the catalogue took one."""
    look = getattr(asked.blend, "rows", None) or asked.blend._rows_of
    taken = []
    for offset in range(times):
        item = Item(item_id=asked.catalog.ids[offset], available=offset % 2 == 0)
        asked.catalog.apply(item, 0, offset)
        begun = time.thread_time_ns()
        look(asked.memory, asked.catalog)
        taken.append((time.thread_time_ns() - begun) / 1e3)
    return statistics.median(taken)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """This process's code: µs a user by stage, and what the lists are."""
    if given.clicks is None:
        log = world_log(given.items, given.events, given.seed)
    else:
        log = file_log(given.clicks, given.events)
    spec = dict(pair.split("=") for pair in given.set)
    with tempfile.TemporaryDirectory(prefix="afterclick-blending-") as folder:
        asked = question(
            log, Path(folder), {k: int(v) for k, v in spec.items()}, given.seed, given.scan
        )
    found = lists(asked, 64, ASKED)
    same = lists(asked, 1, ALONE) == found[:ALONE]
    result: dict[str, Any] = {
        "items": len(log.ids),
        "lists": hashlib.sha256(repr(found).encode()).hexdigest(),
        "alone_is_batch": same,
        "moved_us": moved(asked, 5),
    }
    if given.scan != "exact":
        exact = Scanner(asked.catalog.scan_vectors_ND, provider="cpu", threads=1)
        others = lists(asked._replace(scanner=exact), 64, ASKED)
        pairs = zip(found, others, strict=True)
        result["as_exact"] = statistics.mean(
            len({*one.items} & {*other.items}) / len(other.items) for one, other in pairs
        )
    clock = Clock()
    clock.watch()
    for name, size, num in (("batch", ASKED, ASKED), ("alone", 1, ALONE)):
        rounds: list[dict[str, float]] = []
        for _ in range(given.repeats + 1):
            clock.us = {}
            begun = time.thread_time_ns()
            lists(asked, size, num)
            clock.us[REST] = (time.thread_time_ns() - begun) / 1e3 - sum(clock.us.values())
            rounds.append(clock.us)
        names = [*dict.fromkeys(stage for stage, _, _ in STAGES if stage in rounds[0]), REST]
        quietest = min(rounds[1:], key=lambda one: sum(one.values()))
        result[name] = {stage: quietest[stage] / num for stage in names}
    return result


def against(given: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Runs of this code and of another commit's, turn by turn: (this, that, this, …)."""
    with tempfile.TemporaryDirectory(prefix="afterclick-against-") as folder:
        there = Path(folder)
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", given.against, "serving", "streams", "training"],
            check=True, capture_output=True,
        )  # fmt: skip
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(there / "afterclick", filter="data")
        results = []
        for turn in range(2 * given.turns):
            path = [str(ROOT)] if turn % 2 == 0 else [str(there), str(ROOT)]
            found = subprocess.run(
                [sys.executable, "-m", "benchmarks.blending", "--child", *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                check=True, stdout=subprocess.PIPE,
            )  # fmt: skip
            results.append(msgspec.json.decode(found.stdout))
    return results


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of several runs of the same code, rounded."""
    result = dict(results[0])
    for name in ("batch", "alone"):
        result[name] = {
            stage: round(min(one[name][stage] for one in results), 1) for stage in results[0][name]
        }
        result[f"{name}_us"] = round(min(sum(one[name].values()) for one in results), 1)
        result[f"{name}_beside_scan_us"] = round(
            min(sum(one[name].values()) - one[name]["scan"] for one in results), 1
        )
    result["moved_us"] = round(statistics.median(one["moved_us"] for one in results), 1)
    return result


def table(now: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """As Markdown."""
    head = "in a batch of 256 | one user alone"
    lines = [f"| CPU µs a user | {head} |", "|---|---|---|"]
    for name in dict.fromkeys([*(stage for stage, _, _ in STAGES), REST]):
        cells = [
            _cell(now[kind].get(name), before[kind].get(name) if before else None)
            for kind in ("batch", "alone")
        ]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for words, suffix in (("**all**", "_us"), ("**beside the scan**", "_beside_scan_us")):
        cells = [
            _cell(now[kind + suffix], before[kind + suffix] if before else None)
            for kind in ("batch", "alone")
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    old = before["moved_us"] if before else None
    lines += ["", f"once after the catalogue moved: {_cell(now['moved_us'], old)} µs"]
    if "as_exact" in now:
        lines.append(f"items of a list that it has over the exact scan, too: {now['as_exact']:.4f}")
    if before:
        same = "the same" if now["lists"] == before["lists"] else "OTHERS"
        lines.append(f"lists: {same}")
    return lines


def _cell(now: float | None, before: float | None) -> str:
    if now is None or before is None:
        return " → ".join(f"{us:.0f}" for us in (before, now) if us is not None)
    return f"{before:.0f} → {now:.0f} ({before / max(now, 1e-9):.1f} ×)"


def main(argv: Sequence[str] | None = None) -> int:
    """CPU µs a user of the blend's stages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blending", description=__doc__)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--clicks", type=Path, help="sessions without times; else the world")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scan", choices=("exact", "two-stage"), default="exact")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], help="NAME=NUMBER of BlendSpec")
    parser.add_argument("--against", metavar="REF", help="commit to compare with")
    parser.add_argument("--turns", type=int, default=2, help="runs of each code")
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    if given.child:
        sys.stdout.write(msgspec.json.encode(measure(given)).decode())
        return 0
    # Not before: another commit's code may lack what the harness asks of today's.
    from benchmarks.report import machine, tell

    machine_words = machine("")
    print(f"machine: {machine_words[1]}")
    results = against(given, arguments) if given.against else [measure(given)]
    now = summary(results[::2])
    before = summary(results[1::2]) if given.against else None
    lines = table(now, before)
    failures = [] if now["alone_is_batch"] else ["a user's list depends on the batch"]
    result = {"now": now, "before": before, "failures": failures}
    lines += [f"- {words}" for words in failures]
    tell("blend", "blending", arguments, machine_words, result, lines, report=given.report)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
