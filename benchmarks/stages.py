"""`make profile`: where a click's CPU goes, stage by stage, and a flame graph of it.

A real worker drains a backlog; py-spy looks at all of its threads two hundred times a second for
some seconds. A sample belongs to the stage of its innermost frame that names one, and the process's
CPU time is shared out by samples: µs a click. Beside each stage stands its limit: the same bytes
through the one call that cannot be left out, alone, in this process. Prints the machine, a table,
one JSON line; the flame graph is written where `--out` says. py-spy must be allowed to look into
the worker (root, or ptrace).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from afterclick.serving.records import TopList, encode_list, stamp_list
from afterclick.streams.events import encode
from afterclick.streams.local import local_worker
from benchmarks.ground import Ground, Options, backlog, cpu_s, fill, ground
from benchmarks.report import machine, tell

SAMPLES_A_S = 200
LIMIT_USERS = 256

STAGES: tuple[tuple[str, str, set[str]], ...] = (
    ("steps", "serving/engine.py", {"advance", "zero_state"}),
    ("query", "serving/engine.py", {"query"}),
    ("scan, top-K", "serving/scanner.py", set()),
    ("scan, top-K", "serving/bounds.py", set()),
    ("scan, top-K", "serving/dots.py", set()),
    ("scan, top-K", "serving/best.py", set()),
    ("steps", "serving/engine.py", set()),
    ("scan, top-K", "serving/index.py", set()),
    ("blend: features", "serving/features.py", set()),
    ("blend: network", "serving/blend.py", {"scores"}),
    ("blend: the rest", "serving/blend.py", set()),
    ("signals", "serving/memory.py", set()),
    ("list order", "serving/ranking.py", set()),
    ("list JSON", "serving/texts.py", set()),
    ("list JSON", "serving/records.py", {"encode_list", "<lambda>", "stamp_list"}),
    ("records", "serving/records.py", set()),
    ("click decode", "streams/events.py", set()),
    ("Redis", "serving/store.py", set()),
    ("steps", "streams/inference.py", {"run_steps"}),
    ("fold, the rest", "streams/inference.py", set()),
    ("fold, the rest", "streams/fold.py", set()),
    ("partition", "streams/partition.py", set()),
    ("Kafka client", "aiokafka/", set()),
    ("Kafka client", "streams/chunks.py", set()),
    ("Faust, asyncio", "faust/", set()),
    ("Faust, asyncio", "asyncio/", set()),
)
"""(stage, part of a frame's file, its function; any where none is named); the first that fits."""
OTHER = "other"

WAITS = (".select (", ".wait (threading.py", "_worker (concurrent/futures/thread.py")
WAITS += ("_socket_can_read (", ".read_from_socket (", "_wait_for_tstate_lock (")
"""Parts of an innermost frame that waits for somebody: py-spy takes some of these for busy."""


def stage_of(stack: str) -> str:
    """Stage of a sampled stack, `outermost;…;innermost`, frames as `Class.function (file:line)`."""
    for frame in reversed(stack.split(";")):
        function, _, place = frame.partition(" (")
        for stage, file, functions in STAGES:
            if file in place and (not functions or functions & set(function.split("."))):
                return stage
    return OTHER


def busy(raw: str) -> list[tuple[str, int]]:
    """Stacks and their samples, waiting ones left out; py-spy's raw lines are `stack count`."""
    lines = [line.rpartition(" ") for line in raw.splitlines()]
    return [
        (stack, int(number))
        for stack, _, number in lines
        if not any(wait in stack.rpartition(";")[2] for wait in WAITS)
    ]


def shares(raw: str) -> dict[str, float]:
    """Share of the busy samples by stage."""
    counts: Counter[str] = Counter()
    for stack, number in busy(raw):
        counts[stage_of(stack)] += number
    total = sum(counts.values())
    return {stage: count / total for stage, count in counts.most_common()}


def hottest(raw: str, num: int = 15) -> list[tuple[str, str, float]]:
    """(stage, innermost frame, share) of the frames that most samples end in."""
    counts: Counter[tuple[str, str]] = Counter()
    for stack, number in busy(raw):
        counts[stage_of(stack), stack.rpartition(";")[2]] += number
    total = sum(counts.values())
    return [
        (stage, frame, round(count / total, 4)) for (stage, frame), count in counts.most_common(num)
    ]


def limits(stage: Ground) -> dict[str, float]:
    """CPU µs a click of the one call in each stage that cannot be left out."""
    release = stage.load(threads=1)
    engine, scanner = release.engine, release.scanner
    want = stage.serving.k + stage.serving.margin
    rng = np.random.default_rng(1)
    rows_1B = rng.integers(0, stage.options.items, (1, LIMIT_USERS))
    x_TBE = release.catalog.step_vectors_NE[rows_1B]
    gap_1B = rng.integers(0, 20, (1, LIMIT_USERS))
    lens_B = np.ones(LIMIT_USERS, np.int32)
    state_BS = engine.zero_state(LIMIT_USERS)
    q_BD = engine.query(state_BS)
    key_value = [encode(click) for click in backlog(stage.options, end_ms=10**12)[:LIMIT_USERS]]
    top = TopList(
        items=release.catalog.ids[:want], scores=[round(1 / 3 * at, 4) for at in range(want)],
        source="model", release="random", publication=1, items_offset=[0], partition=0, offset=1,
        event_ms=1, written_ms=1,
    )  # fmt: skip
    body = stamp_list(encode_list(top), 1)
    record = bytes(2000)

    pairs = {f"limit:{at}": record + body for at in range(LIMIT_USERS)}
    calls: dict[str, Callable[[], object]] = {
        "steps": lambda: engine.advance(
            state_BS, x_TBE, lens_B, event_TB=gap_1B, gap_TB=gap_1B
        ),
        "query": lambda: engine.query(state_BS),
        "scan, top-K": lambda: scanner.top(q_BD, want + 1),
        "list JSON": lambda: [msgspec.json.encode(top) for _ in range(LIMIT_USERS)],
        "click decode": lambda: [msgspec.json.decode(value) for _, value in key_value],
        "Redis": lambda: stage.redis.mset(pairs),
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        call()
        begun_s, times = time.process_time(), 0
        while time.process_time() - begun_s < 0.3:
            call()
            times += 1
        found[name] = (time.process_time() - begun_s) / times / LIMIT_USERS * 1e6
    return found


def profile(
    options: Options, folder: Path, *, seconds: float, out: Path, blend: bool = False
) -> dict[str, Any]:
    """Shares of a draining worker's CPU, and the limits."""
    with ground(options, folder) as stage:
        stage = stage.blended() if blend else stage
        fill(stage, backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000))
        with local_worker(stage.worker_env, folder) as worker:
            while (begun := stage.applied()) < options.warm_up:
                time.sleep(0.02)
            pid = worker.process.pid
            cpu_before_s, begun_s = cpu_s(pid), time.perf_counter()
            raw = folder / "raw.txt"
            looks = [
                _spy(pid, seconds, kind, path) for kind, path in (("raw", raw), ("flamegraph", out))
            ]
            for look in looks:
                if look.wait() != 0:
                    raise RuntimeError(f"py-spy failed: {look.stderr and look.stderr.read()}")
            clicks = stage.applied() - begun
            took_s, worker_s = time.perf_counter() - begun_s, cpu_s(pid) - cpu_before_s
            ended = stage.applied() >= options.clicks
        found = limits(stage)
    cpu_us = worker_s / max(clicks, 1) * 1e6
    return {
        "clicks_per_s": round(clicks / took_s, 1),
        "cpu_us_a_click": round(cpu_us, 1),
        "stages_us": {
            stage: round(share * cpu_us, 1) for stage, share in shares(raw.read_text()).items()
        },
        "hottest": hottest(raw.read_text()),
        "limits_us": {stage: round(us, 1) for stage, us in found.items()},
        "failures": ["the backlog ended meanwhile: raise --clicks"] if ended else [],
    }


def table(result: dict[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        "| stage | CPU µs a click | limit, µs |",
        "|---|---|---|",
    ]
    for stage, us in result["stages_us"].items():
        lines.append(f"| {stage} | {us} | {result['limits_us'].get(stage, '')} |")
    lines.append(f"| **all of the worker** | **{result['cpu_us_a_click']}** | |")
    lines += ["", "| innermost frame | stage | CPU µs a click |", "|---|---|---|"]
    for stage, frame, share in result["hottest"]:
        lines.append(f"| `{frame}` | {stage} | {share * result['cpu_us_a_click']:.1f} |")
    return [*lines, "", *(f"- {words}" for words in result["failures"])]


def _spy(pid: int, seconds: float, kind: str, path: Path) -> "subprocess.Popen[str]":
    path.parent.mkdir(parents=True, exist_ok=True)
    program = str(Path(sys.executable).with_name("py-spy"))
    return subprocess.Popen(
        [program, "record", "--pid", str(pid), "--duration", str(round(seconds)), "--nonblocking",
         "--rate", str(SAMPLES_A_S), "--format", kind, "--output", str(path), "--threads"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """CPU µs a click by stage, and a flame graph."""
    parser = argparse.ArgumentParser(prog="make profile", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--clicks", type=int, default=120_000, help="backlog that is drained")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--blend", action="store_true", help="with a release that has a blend")
    parser.add_argument("--out", type=Path, default=Path("var/profile.svg"), help="flame graph")
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker"
    )
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    options = Options(
        items=given.items,
        users=given.users,
        clicks=given.clicks,
        worker_env=dict(pair.split("=", 1) for pair in given.set),
    )
    name, words = machine("")
    print(f"machine: {words}")
    with tempfile.TemporaryDirectory(prefix="afterclick-profile-") as folder:
        result = {
            "machine": name,
            **profile(
                options, Path(folder), seconds=given.seconds, out=given.out, blend=given.blend
            ),
        }
    lines = table(result)
    print(f"flame graph: {given.out}")
    tell("profile", "stages", arguments, (name, words), result, lines, report=given.report)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
