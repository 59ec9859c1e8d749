"""`make bench`: clicks a second and click to list, beside ceilings and rivals, in one run.

Prints the machine, a table, then one JSON object as the last line. README.md says what is measured.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from afterclick.streams.local import Worker, local_worker
from afterclick.streams.processes import Process
from afterclick.streams.verify import verify
from benchmarks import latency, rivals, swap
from benchmarks.ceilings import engine_alone, matmul_alone
from benchmarks.drain import Drain, Rate
from benchmarks.ground import ROOT, Ground, Options, backlog, fill, ground
from benchmarks.report import machine, table, write_report

QUICK = {
    "broker": "tansu",
    "users": 2_000,
    "clicks": 3_000,
    "warm_up": 500,
    "partitions": 2,
    "processes": 2,
    "seconds": 1.5,
    "latency_warm_up_s": 0.5,
    "rival_seconds": 2.0,
    "ceiling_seconds": 0.3,
}
IDLE_RATE = 5.0
"""Clicks a second of a stream that is idle between two of them."""
NAIVE_CHECKED = 20
"""Users of the naive app whose list is compared: a rival that computes nonsense is no rival."""


def main(argv: Sequence[str] | None = None) -> int:
    """Clicks a second, and click to list, beside ceilings and rivals."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options, runs, report, machine_name = _parse(arguments)
    name, words = machine(machine_name)
    _say(f"machine: {words}")
    _say(f"options: {msgspec.json.encode(options).decode()}")
    results = []
    for at in range(runs):
        with tempfile.TemporaryDirectory(prefix="afterclick-bench-") as folder:
            results.append(run_once(options, Path(folder)))
        _say(f"run {at + 1} of {runs}: {msgspec.json.encode(results[-1]).decode()}")
    result = _together(results)
    result["machine"] = name
    result["failures"] = sorted({words for one in results for words in one["failures"]})
    lines = [
        *table(result, runs),
        "",
        *swap.table(result["latency_ms_by_share"][f"{SWAP_SHARE:g}"], result["swap_latency_ms"]),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if report:
        path = write_report(name, words, arguments, options, result, lines)
        _say(f"report: {path.relative_to(ROOT)}")
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    return 1 if result["failures"] else 0


WARM_SHARE = 0.25
"""Live load before anything live is timed: a broker of some seconds' age compiles its code beside
the worker and takes ten times as long a click as later.
"""
LIVE_SHARES = (0.25, 0.125, 0.0625)
"""Live loads below half of the maximum, as shares of it."""
BLEND_SHARES = (0.5, 0.25, 0.125)
"""Live loads under a release with a blend, as shares of what it drains."""
SWAP_SHARE = LIVE_SHARES[-1]
"""The load beside which releases are swapped; measured as long in peace just before, and after all
others, since a swap leaves records to rebuild.
"""
SWAPS = 2
"""Publications while it lasts, `SWAP_TIMES` as long as other measurements. Each makes the lists of
recent users anew, some two to five seconds of CPU: one every two seconds would be another load than
the one in peace, and no trainer publishes so often.
"""
SWAP_TIMES = 4


def run_once(options: Options, folder: Path) -> dict[str, Any]:
    """Everything once, on fresh servers: ceilings, rivals, the worker, its latencies, the check."""
    failures: list[str] = []
    with ground(options, folder) as stage:
        clicks = backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000)
        _say(f"filled at {fill(stage, clicks):.0f} clicks/s; ceilings")
        engine, matmul = engine_alone(stage), matmul_alone(stage)
        _say("rivals")
        nothing = _drain_rival(stage, "do-nothing", failures)
        naive = _drain_rival(stage, "naive", failures)
        _check_naive(stage, clicks, failures)
        _say("one process: drain")
        alone = stage.in_one_process()
        drain = _drain(alone, options.clicks)
        with local_worker(alone.worker_env, folder):
            alone_rate = drain.result()
            _count(alone, options.clicks, failures)
        _say(f"one process: {alone_rate.clicks_per_s:.0f} clicks/s; worker: drain")
        drain = _drain(stage, options.clicks)
        with local_worker(stage.worker_env, folder) as worker:
            rate = drain.result()
            _count(stage, options.clicks, failures)
            _say(f"worker: {rate.clicks_per_s:.0f} clicks/s; live load that warms the broker up")
            live = _live_on(stage, worker)
            whole, part = options.seconds, options.seconds / 2
            long = SWAP_TIMES * whole
            warm = live("warm", rate.clicks_per_s * WARM_SHARE, 3 * whole)
            _say("floor of an idle stream's latency: a consumer that does nothing")
            hop = latency.hop(stage, "hop", rate=IDLE_RATE, seconds=2 * whole)
            idle = live("idle", IDLE_RATE, 2 * whole, linger_ms=0)
            loaded = live("half", rate.clicks_per_s / 2, whole)
            ladder = {
                f"{share:g}": live(
                    f"live-{share:g}", rate.clicks_per_s * share,
                    long if share == SWAP_SHARE else part,
                )
                for share in LIVE_SHARES
            }  # fmt: skip
            _say("the last once more, releases swapped meanwhile")
            swapped = swap.with_swaps(
                stage, worker, rate=rate.clicks_per_s * SWAP_SHARE, seconds=long,
                every_s=long / SWAPS,
            )  # fmt: skip
            if not swapped["swaps_total"]:
                failures.append("swaps: none happened")
            timed = {"warm": warm, "idle": idle, "half load": loaded, "swaps": swapped, **ladder}
            sent = options.clicks + _checked(timed, worker, failures)
        _say("verify")
        _verify(stage, sent, failures)
        _say("the same log once more, for what a blend costs: drain")
        again = stage.apart("again")
        drain = _drain(again, sent)
        with local_worker(again.worker_env, folder):
            again_rate = drain.result()
            _count(again, sent, failures)
        _say(f"worker: {again_rate.clicks_per_s:.0f} clicks/s; with a blend: drain")
        blended = stage.blended()
        drain = _drain(blended, sent)
        with local_worker(blended.worker_env, folder) as worker:
            blend_rate = drain.result()
            _count(blended, sent, failures)
            most = blend_rate.clicks_per_s
            _say(f"worker with a blend: {most:.0f} clicks/s")
            live = _live_on(blended, worker)
            blend_ladder = {
                f"{share:g}": live(f"blend-{share:g}", most * share, whole)
                for share in BLEND_SHARES
            }
            blend_idle = live("blend-idle", IDLE_RATE, whole, linger_ms=0)
            timed = {f"blend, {share}": found for share, found in blend_ladder.items()}
            sent += _checked({"blend, idle": blend_idle, **timed}, worker, failures)
        _say("verify")
        _verify(blended, sent, failures)
    return {
        "processes": options.processes,
        "clicks_per_s": round(rate.clicks_per_s, 1),
        "one_process_clicks_per_s": round(alone_rate.clicks_per_s, 1),
        "again_clicks_per_s": round(again_rate.clicks_per_s, 1),
        "blend_clicks_per_s": round(blend_rate.clicks_per_s, 1),
        "engine_clicks_per_s": round(engine.clicks_per_s, 1),
        "matmul_clicks_per_s": round(matmul.clicks_per_s, 1),
        "do_nothing_agent_clicks_per_s": round(nothing.clicks_per_s, 1),
        "naive_clicks_per_s": round(naive.clicks_per_s, 1),
        "ratios": {
            "end_to_end_of_engine": round(rate.clicks_per_s / engine.clicks_per_s, 3),
            "engine_of_matmul": round(engine.clicks_per_s / matmul.clicks_per_s, 3),
            "end_to_end_of_do_nothing": round(rate.clicks_per_s / nothing.clicks_per_s, 3),
            "end_to_end_of_naive": round(rate.clicks_per_s / naive.clicks_per_s, 3),
            "end_to_end_of_one_process": round(rate.clicks_per_s / alone_rate.clicks_per_s, 3),
            "blend_of_plain": round(blend_rate.clicks_per_s / again_rate.clicks_per_s, 3),
            "idle_p50_of_hop": round(idle["p50"] / hop["p50"], 3),
        },
        "latency_ms": loaded,
        "idle_latency_ms": idle,
        "hop_ms": hop,
        "latency_ms_by_share": dict(sorted(ladder.items())),
        "swap_latency_ms": swapped,
        "blend_idle_latency_ms": blend_idle,
        "blend_latency_ms_by_share": dict(sorted(blend_ladder.items())),
        "timed_clicks": {
            "end_to_end": rate.clicks, "one_process": alone_rate.clicks,
            "again": again_rate.clicks, "blend": blend_rate.clicks,
            "do_nothing": nothing.clicks, "naive": naive.clicks,
        },
        "layouts": {"engine": engine.layout, "matmul": matmul.layout},
        "failures": failures,
    }  # fmt: skip


def _live_on(stage: Ground, worker: Worker) -> Callable[..., dict[str, Any]]:
    def live(name: str, clicks_per_s: float, seconds: float, **more: Any) -> dict[str, Any]:
        _say(f"latency, {name}: {clicks_per_s:.0f} clicks/s")
        return latency.measure(
            stage, name, rate=clicks_per_s, seconds=seconds, worker=worker.process, **more
        )

    return live


def _checked(timed: dict[str, dict[str, Any]], worker: Worker, failures: list[str]) -> int:
    """How many clicks were sent."""
    if not worker.process.running:
        failures.append(f"worker: ended: {worker.process.tail()}")
    for name, found in timed.items():
        if found["unseen"] or found["wrong_offset"]:
            failures.append(
                f"latency, {name}: {found['unseen']} lists unseen, {found['wrong_offset']} "
                "that do not answer their click"
            )
    return sum(found["sent"] for found in timed.values())


def _drain(stage: Ground, total: int) -> Drain:
    return Drain(
        stage.applied,
        total=total,
        warm_up=stage.options.warm_up,
        limit_s=300.0,
    )


def _count(stage: Ground, total: int, failures: list[str]) -> None:
    counted = sum(head.clicks for head in stage.heads())
    if counted != total:
        failures.append(f"{stage.keys.namespace}: counted {counted} of {total} clicks")


@contextlib.contextmanager
def _rival(stage: Ground, name: str, processes: int) -> Iterator[rivals.Task]:
    task = rivals.Task(
        broker=stage.streams.broker,
        topic=stage.streams.clicks_topic,
        redis=stage.serving.redis,
        folder=str(stage.folder),
        release=str(stage.release_folder),
        k=stage.serving.k + stage.serving.margin,
    )
    running = [
        Process(
            f"rival {name} {at + 1} of {processes}",
            [sys.executable, "-m", "benchmarks.rivals", name],
            log=stage.folder / f"rival-{name}-{at}.log",
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "RIVAL": msgspec.json.encode(task).decode(),
            },
        ).start()
        for at in range(processes)
    ]  # fmt: skip
    try:
        yield task
    except RuntimeError as error:
        said = "\n".join(f"{process.name} said:\n{process.tail()}" for process in running)
        raise RuntimeError(f"rival {name}: {error}; {said}") from error
    finally:
        for process in running:
            process.kill()  # a graceful stop would wait for its commits; nothing of it is needed


def _drain_rival(stage: Ground, name: str, failures: list[str]) -> Rate:
    options = stage.options
    # The naive app needs some seconds for what others warm up with.
    warm_up = options.warm_up if name == "do-nothing" else options.warm_up // 10
    # The naive app's states are in its memory: none may move to another process.
    processes = options.processes if name == "do-nothing" else 1

    with _rival(stage, name, processes) as task:
        key = task.done_key(name)

        def taken() -> int:
            return sum(int(offset) for offset in stage.redis.hvals(key))

        rate = Drain(
            taken,
            total=options.clicks,
            warm_up=warm_up,
            limit_s=options.rival_seconds,
        ).result()
    found = taken()
    if found > options.clicks or (rate.complete and found != options.clicks):
        failures.append(f"{name}: took {found} of {options.clicks} clicks")
    return rate


def _check_naive(stage: Ground, clicks: list[Any], failures: list[str]) -> None:
    """Lists in Redis against one computed here, for users whose last click is surely behind."""
    model = rivals.NaiveModel(stage.release_folder, stage.serving.k + stage.serving.margin)
    histories: dict[str, list[Any]] = {}
    for click in clicks:
        histories.setdefault(click.user_id, []).append(click)
    checked = 0
    for user, history in histories.items():
        data = stage.redis.get(rivals.naive_key(user))
        if data is None:
            continue
        # It may stand at any click of the user: the app was stopped on its way.
        answers = [model.click(user, click.item_id, click.timestamp_ms) for click in history]
        if msgspec.json.decode(data) not in answers:
            failures.append(f"naive: the list of {user} answers none of its clicks")
        checked += 1
        if checked == NAIVE_CHECKED:
            return
    failures.append(f"naive: only {checked} lists to check")


def _verify(stage: Ground, num_clicks: int, failures: list[str]) -> None:
    found = verify(stage.serving, stage.streams)
    if found.differences or found.lost or found.doubled or found.behind:
        failures.append(f"verify: {msgspec.json.encode(found).decode()}")
    elif found.clicks != num_clicks:
        failures.append(f"verify: {found.clicks} clicks folded, {num_clicks} were sent")


def _together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of several runs, histograms added up; `spread` holds lowest and highest of each rate
    and ratio.
    """
    result = _median(results)
    if len(results) > 1:
        flat = [{**{k: v for k, v in one.items() if k.endswith("_per_s")}, **one["ratios"]}
                for one in results]  # fmt: skip
        result["spread"] = {
            key: [min(one[key] for one in flat), max(one[key] for one in flat)] for key in flat[0]
        }
    result["runs"] = len(results)
    return result


def _median(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, list) and first and isinstance(first[0], int):
        return [sum(numbers) for numbers in zip(*values, strict=True)]  # of a histogram
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    if isinstance(first, bool) or not isinstance(first, int | float):
        return first
    numbers = [value for value in values if value is not None]
    return round(statistics.median(numbers), 3) if numbers else None


def _parse(argv: Sequence[str]) -> tuple[Options, int, bool, str]:
    parser = argparse.ArgumentParser(prog="make bench", description=main.__doc__)
    sizes = ("items", "units", "k", "users", "clicks", "partitions", "seed")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float, help="of each latency measurement")
    parser.add_argument("--processes", type=int, help="of worker and do-nothing agent; one a core")
    parser.add_argument("--runs", type=int, default=1, help="median and spread of several")
    parser.add_argument(
        "--broker", choices=("kafka", "tansu"), help="kafka; with --quick tansu, as tests use it"
    )
    parser.add_argument("--quick", action="store_true", help="some seconds; proves the harness")
    parser.add_argument("--report", action="store_true", help="write it to benchmarks/results/")
    parser.add_argument("--machine", default="", help="name in the report; made up otherwise")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker"
    )
    given = parser.parse_args(argv)
    chosen: dict[str, Any] = {"quick": given.quick, "processes": os.cpu_count() or 1}
    chosen |= QUICK if given.quick else {}
    for name in (*sizes, "processes", "seconds", "broker"):
        if getattr(given, name) is not None:
            chosen[name] = getattr(given, name)
    chosen["worker_env"] = dict(pair.split("=", 1) for pair in given.set)
    options = Options(**chosen)
    warm_up = min(options.warm_up, options.clicks // 3)
    return (
        msgspec.structs.replace(options, warm_up=warm_up),
        max(1, given.runs),
        given.report,
        given.machine,
    )


def _say(words: str) -> None:
    sys.stderr.write(f"bench {time.strftime('%H:%M:%S')}: {words}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
