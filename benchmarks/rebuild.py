"""Clicks a second of `afterclick rebuild` beside those of the worker, on the same log in one run.

`python -m benchmarks.rebuild`; the last line is one JSON object. The worker drains a backlog first
and is timed as in bench.py; then Redis loses all but the inputs lists, rebuild is timed from its
first look at the topics to its last write, and verify compares every record and list. CPU time, of
the worker's process and of rebuild's with their start, tells more than rates on a shared machine.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from afterclick.streams.local import afterclick_argv, local_worker
from afterclick.streams.rebuild import Rebuilt
from afterclick.streams.verify import verify
from benchmarks.drain import Drain
from benchmarks.ground import Ground, Options, backlog, fill, ground, metrics_of
from benchmarks.report import machine


def main(argv: Sequence[str] | None = None) -> int:
    """Streamed and rebuilt, clicks a second."""
    parser = argparse.ArgumentParser(prog="benchmarks.rebuild", description=main.__doc__)
    fresh = Options()
    for name in ("items", "units", "users", "clicks", "partitions", "seed"):
        default = 200_000 if name == "clicks" else getattr(fresh, name)
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    jobs = given.pop("jobs")
    options = Options(**given)
    with (
        tempfile.TemporaryDirectory(prefix="afterclick-bench-") as folder,
        ground(options, Path(folder)) as stage,
    ):
        result = _run(stage, Path(folder), jobs)
    result["machine"] = machine("")[0]
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    return 1 if result["differences"] or result["lost"] else 0


def _run(stage: Ground, folder: Path, jobs: int) -> dict[str, object]:
    options = stage.options
    fill(stage, backlog(options, end_ms=time.time_ns() // 1_000_000 - 60_000))
    drain = Drain(
        stage.applied,
        total=options.clicks,
        warm_up=options.warm_up,
        limit_s=600.0,
    )
    with local_worker(stage.worker_env, folder) as worker:
        streamed = drain.result()
        _settle(stage)
        streamed_cpu_s = metrics_of(worker.port)["process_cpu_seconds_total"]
    for key in stage.redis.scan_iter(count=1000):
        if not key.endswith((b":inputs", b":meta")):
            stage.redis.delete(key)
    argv = [*afterclick_argv("rebuild"), "--json", "--jobs", str(jobs)]
    env = {**os.environ, **stage.worker_env}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(argv, env=env, stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rebuilt = msgspec.json.decode(ran.stdout.splitlines()[-1], type=Rebuilt)
    checked = verify(stage.serving, stage.streams)
    return {
        "streamed_clicks_per_s": round(streamed.clicks_per_s, 1),
        "rebuild_clicks_per_s": rebuilt.clicks_per_s,
        "ratio": round(rebuilt.clicks_per_s / streamed.clicks_per_s, 2),
        "streamed_cpu_us_per_click": round(streamed_cpu_s * 1e6 / options.clicks, 1),
        "rebuild_cpu_us_per_click": round(cpu_s * 1e6 / options.clicks, 1),
        "clicks": rebuilt.clicks,
        "users": rebuilt.users,
        "rebuild_s": rebuilt.seconds,
        "verify_clicks_per_s": round(checked.clicks / checked.seconds, 1),
        "differences": checked.differences,
        "lost": options.clicks - checked.clicks,
        "items": options.items,
        "units": options.units,
        "partitions": options.partitions,
        "jobs": jobs,
    }


def _settle(stage: Ground) -> None:
    """Until no list is due: the worker's work is done then, not before."""
    names = [stage.keys.due(p) for p in range(stage.options.partitions)]
    while any(stage.redis.exists(name) for name in names):
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
