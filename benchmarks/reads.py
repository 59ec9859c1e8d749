"""Reads under open load, beside full write load and in peace: `python -m benchmarks.reads`.

Two ways to a list, each from separate processes (`readers.py`): `TopK.get`, and `afterclick api`
over keep-alive HTTP. Full write load is a worker that drains a backlog all the while; once as it
is, once with a tenth of the others' weight on the cores (nice 10), so that whoever reads finds one
at once.
Prints the machine, a table, one JSON line.
"""

import argparse
import os
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from afterclick.serving.reader import Top, TopK
from afterclick.streams.local import HOST, afterclick_argv, local_worker
from afterclick.streams.processes import Process, free_port
from benchmarks.ground import NAMESPACE, ROOT, Ground, Options, backlog, fill, ground, metrics_of
from benchmarks.readers import DRAIN_S, Seen, Task
from benchmarks.report import machine, tell

START_TIMEOUT_S = 60.0
"""For a reader's imports, on a machine that a worker keeps busy."""
BEGIN_IN_S = 0.2
"""From the word to begin to the common start."""
PROCESSES = {"redis": 4, "http": 2}
"""`TopK.get` blocks, so one process would queue its own reads; HTTP needs fewer."""
COMPARED_USERS = 50
NICE = 10
"""Priority of the worker under `beside_nice_writes`; all others have 0."""
LOADS = {
    "beside_writes": "beside writes",
    "beside_nice_writes": f"beside writes at nice {NICE}",
    "in_peace": "in peace",
}


def measure(
    stage: Ground,
    how: str,
    folder: Path,
    *,
    rate: float,
    seconds: float,
    warm_up_s: float,
    port: int,
) -> dict[str, Any]:
    """Latencies in milliseconds of reads at a rate, and the writes that went on beside them."""
    num = PROCESSES[how]
    tasks = [
        Task(
            how=how,
            at=at,
            rate=rate / num,
            warm_up_s=warm_up_s,
            seconds=seconds,
            users=stage.options.users,
            k=stage.options.k,
            seed=stage.options.seed,
            redis=stage.serving.redis,
            namespace=NAMESPACE,
            host=HOST,
            port=port,
            folder=str(folder),
        )
        for at in range(num)
    ]
    processes = [
        Process(
            f"reads {how} {task.at}",
            [sys.executable, "-m", "benchmarks.readers", how],
            log=task.file("log"),
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "READS": msgspec.json.encode(task).decode(),
            },
        )
        for task in tasks
    ]
    try:
        for process in processes:
            process.start()
        for process, task in zip(processes, tasks, strict=True):
            process.wait_until(task.file("ready").exists, START_TIMEOUT_S)
        applied, cpu_s = stage.applied(), _cpu_s(port)
        start_ns = time.monotonic_ns() + int(BEGIN_IN_S * 1e9)
        for task in tasks:
            part = task.file("part")
            part.write_text(str(start_ns))
            part.rename(task.file("begin"))
        for process in processes:
            if process.wait(warm_up_s + seconds + DRAIN_S + START_TIMEOUT_S) != 0:
                raise RuntimeError(f"{process.name}: failed; it said:\n{process.tail()}")
    finally:
        for process in processes:
            process.kill()
    writes = (stage.applied() - applied) / ((time.monotonic_ns() - start_ns) / 1e9)
    seen = [msgspec.json.decode(task.file("json").read_bytes(), type=Seen) for task in tasks]
    found = summary(seen, counted_from_ns=start_ns + int(warm_up_s * 1e9))
    found |= {"rate": rate, "clicks_per_s_beside": round(writes, 1)}
    if how == "http":
        reads = sum(len(one.due_ns) for one in seen)
        found["api_cpu_ms_a_read"] = round(1000 * (_cpu_s(port) - cpu_s) / reads, 3)
    return found


def summary(seen: Sequence[Seen], *, counted_from_ns: int) -> dict[str, Any]:
    """Percentiles over every read due from `counted_from_ns` on; one without answer is infinite."""
    due_ns = np.array([due for one in seen for due in one.due_ns])
    done_ns = np.array([done for one in seen for done in one.done_ns])
    begun_ns = np.array([begun for one in seen for begun in one.begun_ns])
    counted = due_ns >= counted_from_ns
    ms = np.where(done_ns > 0, (done_ns - due_ns) / 1e6, np.inf)[counted]
    lag_ms = ((begun_ns - due_ns) / 1e6)[counted]
    call_ms = np.where(done_ns > 0, (done_ns - begun_ns) / 1e6, np.inf)[counted]
    # `higher`: never a value between two measurements, nor below the share it names.
    shares = (("p50", 50), ("p99", 99), ("p99_9", 99.9), ("max", 100))
    found = {name: float(np.percentile(ms, q, method="higher")) for name, q in shares}
    found["call_p99"] = float(np.percentile(call_ms, 99, method="higher"))
    return {
        **{name: round(value, 2) if np.isfinite(value) else None for name, value in found.items()},
        "reads": len(ms),
        "lost": int((done_ns == 0).sum()),
        "wrong": dict(sum((Counter(one.wrong) for one in seen), Counter())),
        "reader_lag_p99": round(float(np.percentile(lag_ms, 99)), 2),
        "reader_cpu_ms_a_read": round(float(np.mean([one.cpu_ms_a_read for one in seen])), 3),
    }


def table(result: dict[str, Any]) -> list[str]:
    """One row for each way and load, as Markdown."""
    lines = [
        "| due → answer, ms | reads/s | clicks/s beside | p50 | p99 | p99.9 | max "
        "| reader late, p99 | the read itself, p99 | CPU ms a read: API | reader |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("redis", "http"):
        for load, words in LOADS.items():
            one = result[name][load]
            shown = ("p50", "p99", "p99_9", "max", "reader_lag_p99", "call_p99")
            cells = " | ".join(str(one[q]) for q in shown)
            lines.append(
                f"| {'`TopK.get`' if name == 'redis' else '`afterclick api`'}, {words} "
                f"| {one['rate']:,.0f} | {one['clicks_per_s_beside']:,.0f} | {cells} "
                f"| {one.get('api_cpu_ms_a_read', '')} | {one['reader_cpu_ms_a_read']} |"
            )
    return [*lines, "", *(f"- {words}" for words in result["failures"])]


def run(options: Options, folder: Path, *, rate: float) -> dict[str, Any]:
    """Both ways, beside a draining worker and then in peace, on fresh servers."""
    failures: list[str] = []
    result: dict[str, Any] = {"redis": {}, "http": {}}
    with ground(options, folder) as stage:
        fill(stage, backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000))
        port = free_port()
        api = Process(
            "api",
            afterclick_argv("api", "--port", str(port)),
            log=folder / "api.log",
            env={**os.environ, **stage.worker_env},
        ).start()
        try:
            with local_worker(stage.worker_env, folder) as worker:
                while stage.applied() < options.warm_up:
                    time.sleep(0.02)
                api.wait_until(lambda: _answers(port), 30.0)
                for load in LOADS:
                    if load == "beside_nice_writes":
                        _make_nice(worker.process.pid)
                    for how in result:
                        result[how][load] = measure(
                            stage,
                            how,
                            _made(folder / load),
                            rate=rate,
                            seconds=options.seconds,
                            warm_up_s=options.latency_warm_up_s,
                            port=port,
                        )
                    if load == "beside_nice_writes":
                        if stage.applied() >= options.clicks:
                            failures.append("the backlog ended before the reads: raise --clicks")
                        while stage.applied() < options.clicks:
                            time.sleep(0.1)
            failures += _compared(stage, port)
        finally:
            api.kill()
    for how in ("redis", "http"):
        for load, one in result[how].items():
            if one["lost"] or one["wrong"]:
                failures.append(f"{how} {load}: {one['lost']} reads lost, wrong: {one['wrong']}")
    return {**result, "failures": failures}


def _compared(stage: Ground, port: int) -> list[str]:
    """Lists over HTTP against `TopK`, now that nobody writes."""
    with TopK(stage.serving.redis, namespace=NAMESPACE) as top:
        for user in [f"u{at}" for at in range(COMPARED_USERS)]:
            url = f"http://{HOST}:{port}/v1/top/{user}"
            body = urllib.request.urlopen(url, timeout=10).read()
            answer = msgspec.json.decode(body, type=Top)
            own = top.get(user)
            if (answer.items, answer.offset) != (own.items, own.offset):
                return [f"http: the list of {user} is not the one in Redis"]
    return []


def _make_nice(pid: int) -> None:
    """The whole process group, and its session where the kernel weighs sessions first."""
    os.setpriority(os.PRIO_PGRP, pid, NICE)
    autogroup = Path(f"/proc/{pid}/autogroup")
    if autogroup.exists():
        autogroup.write_text(str(NICE))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=2):
            return True
    except OSError:
        return False


def _cpu_s(port: int) -> float:
    return metrics_of(port)["process_cpu_seconds_total"]


def main(argv: Sequence[str] | None = None) -> int:
    """Latency of reads, beside a draining worker and in peace."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reads", description=main.__doc__)
    parser.add_argument("--rate", type=float, default=1000.0, help="reads a second")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds not counted before it")
    parser.add_argument("--clicks", type=int, default=300_000, help="backlog drained beside")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = parser.parse_args(arguments)
    options = Options(
        items=given.items,
        users=given.users,
        clicks=given.clicks,
        warm_up=min(2 * given.users, given.clicks // 4),
        seconds=given.seconds,
        latency_warm_up_s=given.warm_up,
        seed=given.seed,
    )
    name, words = machine("")
    print(f"machine: {words}")
    with tempfile.TemporaryDirectory(prefix="afterclick-reads-") as folder:
        result = {"machine": name, **run(options, Path(folder), rate=given.rate)}
    result["load_after"] = round(os.getloadavg()[0], 1)
    lines = table(result)
    tell("reads", "reads", arguments, (name, words), result, lines, report=given.report)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
