"""The benchmark's arithmetic: a wrong percentile or clock makes every report wrong."""

import itertools
from collections.abc import Callable
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from afterclick.streams.settings import StreamsSettings
from benchmarks import reads
from benchmarks.bench import _together
from benchmarks.catalogues import recall
from benchmarks.drain import Drain
from benchmarks.gpu import CARDS, floors_ms
from benchmarks.ground import ROOT, Options, backlog
from benchmarks.latency import Schedule, Task, summary
from benchmarks.readers import Seen
from benchmarks.scale import Heads
from benchmarks.sizing import Cost, need
from benchmarks.stages import STAGES, shares, stage_of

MS = 1_000_000


def some_task(rate: float = 500.0) -> Task:
    return Task(
        options=Options(users=5, items=20),
        name="t",
        rate=rate,
        warm_up_s=0.5,
        seconds=1.5,
        linger_ms=2,
        start_ns=10**12,
        start_ms=1_700_000_000_000,
        streams=StreamsSettings(),
        redis="",
        namespace="bench",
        out="",
    )


def sent_and_seen(latencies_ms: list[float | None]) -> tuple[list[int], dict, dict]:
    due = [(at + 1) * MS for at in range(len(latencies_ms))]
    seen = [
        0 if ms is None else at + int(ms * MS) for at, ms in zip(due, latencies_ms, strict=True)
    ]
    offsets = list(range(len(due)))
    sent = {"sent_ns": due, "offset": offsets, "late_start_ns": -1, "cpu_s": 0.2}
    return due, sent, {"seen_ns": seen, "offset": offsets, "polls": 1, "cpu_s": 0.1}


def test_latency_counts_from_the_moment_a_click_was_due() -> None:
    """A sender that is late itself must not make the worker look fast."""
    due, sent, seen = sent_and_seen([5.0] * 100)
    sent["sent_ns"] = [at + 4 * MS for at in due]
    found = summary(due, sent, seen, rate=1.0)
    assert found["p50"] == 5.0
    assert found["sender_lag_p99"] == 4.0
    assert found["cpu_us_a_click"] == {"sender": 2000.0, "watcher": 1000.0}


def test_the_histogram_counts_every_click_once() -> None:
    """One never seen stands beyond the last edge, one at an edge below it."""
    found = summary(*sent_and_seen([1.0, 1.5, 2.0, 4999.0, 5001.0, None]), rate=1.0)["histogram"]
    assert (found[0], found[1], found[-2], found[-1]) == (1, 2, 1, 2)
    assert sum(found) == 6
    assert _together([{"h": found, "ratios": {}}] * 2)["h"] == [2 * count for count in found]


def test_a_percentile_is_never_below_the_share_it_names() -> None:
    """Of 1..100 ms, 1 % is slower than 99 ms."""
    found = summary(*sent_and_seen([float(ms) for ms in range(1, 101)]), rate=1.0)
    assert (found["p50"], found["p99"], found["max"]) == (51.0, 100.0, 100.0)


def test_a_list_that_never_came_is_not_left_out() -> None:
    """Leaving it out would report the survivors' latency."""
    found = summary(*sent_and_seen([1.0] * 50 + [None]), rate=1.0)
    assert found["unseen"] == 1
    assert found["p50"] == 1.0
    assert found["max"] is None


def test_a_list_older_than_its_click_is_counted_as_wrong() -> None:
    """The watcher tells by event time, the log by offset: both must agree."""
    due, sent, seen = sent_and_seen([1.0] * 3)
    seen["offset"] = [0, 0, 2]
    assert summary(due, sent, seen, rate=1.0)["wrong_offset"] == 1


def test_what_nobody_looked_for_is_neither_unseen_nor_counted() -> None:
    """At high rates the lists of some users are looked for; another's click says nothing."""
    due, sent, seen = sent_and_seen([1.0, None, 3.0, None])
    found = summary(due, sent, seen, rate=1.0, watched=[True, False, True, True])
    assert (found["clicks"], found["watched"], found["unseen"], found["p50"]) == (3, 3, 1, 3.0)


def test_the_watched_are_a_share_of_the_users() -> None:
    """Drawn by name, so all clicks of one user are looked for, or none."""
    users = [f"u{at}" for at in range(10_000)]
    assert all(some_task().is_watched(user) for user in users)
    some = msgspec.structs.replace(some_task(), watched=0.2)
    assert 1_800 < sum(some.is_watched(user) for user in users) < 2_200


def test_warm_up_clicks_are_awaited_and_not_counted() -> None:
    """Else the first chunk's cold caches are in p99; but one unseen among them still counts."""
    due, sent, seen = sent_and_seen([None, 90.0, 1.0, 1.0])
    found = summary(due, sent, seen, rate=1.0, counted_from_ns=3 * MS)
    assert (found["clicks"], found["max"], found["unseen"]) == (2, 1.0, 1)


def test_sender_and_watcher_make_the_same_schedule() -> None:
    """They are two processes and exchange nothing."""
    one, two = Schedule(some_task()), Schedule(some_task())
    assert one.due_ns == two.due_ns
    assert one.clicks == two.clicks
    assert len(one.clicks) == 1000


def test_a_users_event_times_rise() -> None:
    """The watcher takes a list's event time for the click it answers; 5 users at 2,000 clicks/s."""
    last: dict[str, int] = {}
    for click in Schedule(some_task(rate=2000.0)).clicks:
        assert click.timestamp_ms is not None
        assert click.timestamp_ms > last.get(click.user_id, 0)
        last[click.user_id] = click.timestamp_ms


def test_the_backlog_is_the_seeds() -> None:
    """Two runs are compared only where they fed the same clicks."""
    options = Options(clicks=500)
    assert backlog(options, end_ms=10**12) == backlog(options, end_ms=10**12)
    other = Options(clicks=500, seed=8)
    assert backlog(options, end_ms=10**12) != backlog(other, end_ms=10**12)


def test_a_read_counts_from_when_it_was_due_and_a_lost_one_is_infinite() -> None:
    """A reader that waits for the answer before must not make the next read look fast."""
    seen = Seen(
        due_ns=[MS, 2 * MS, 3 * MS, 4 * MS],
        begun_ns=[MS, 6 * MS, 7 * MS, 8 * MS],
        done_ns=[6 * MS, 7 * MS, 8 * MS, 0],
        wrong={"status 503": 1},
        cpu_ms_a_read=0.5,
    )
    found = reads.summary([seen, seen], counted_from_ns=2 * MS)
    assert (found["reads"], found["p50"], found["max"]) == (6, 5.0, None)
    assert (found["lost"], found["wrong"]) == (2, {"status 503": 2})
    assert found["reader_lag_p99"] == 4.0
    assert found["call_p99"] is None


def progress(values: list[int]) -> Callable[[], int]:
    source = itertools.chain(values, itertools.repeat(values[-1]))
    return lambda: next(source)


def test_the_clock_starts_after_the_warm_up() -> None:
    """Clicks taken before are not part of the rate."""
    rate = Drain(progress([0, 10, 40, 100]), total=100, warm_up=30, limit_s=5.0).result()
    assert rate.clicks == 60
    assert rate.complete


def test_a_rival_that_does_not_move_is_an_error_not_a_zero() -> None:
    """A rival that failed to start must not be reported as slow."""
    drain = Drain(progress([3]), total=9, warm_up=5, limit_s=1.0, start_timeout_s=0.05)
    with pytest.raises(RuntimeError, match="3 of 5"):
        drain.result()


def test_several_runs_give_median_and_spread() -> None:
    """Of ratios too: they are what is quoted."""
    runs = [
        {"clicks_per_s": rate, "ratios": {"a": rate / 10}, "failures": []}
        for rate in (10.0, 30.0, 20.0)
    ]
    result = _together(runs)
    assert result["clicks_per_s"] == 20.0
    assert result["ratios"]["a"] == 2.0
    assert result["spread"] == {"clicks_per_s": [10.0, 30.0], "a": [1.0, 3.0]}
    assert result["runs"] == 3


def test_a_gpus_floor_counts_bytes_and_operations() -> None:
    """On an H100 1M fp16 rows are 258 MB, 77 µs; 256 users' scores, out and in, 2 GB, 611 µs."""
    moved_ms, computed_ms = floors_ms(CARDS["h100"], 1_000_000, 256, "fp16")
    assert moved_ms == pytest.approx(0.077 + 0.611, abs=0.002)
    assert computed_ms == pytest.approx(0.0668, abs=0.001)


def test_recall_is_the_share_of_the_best_that_were_found() -> None:
    """Order does not count, what lies beyond k does not either."""
    expected, found = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[2, 1, 9], [7, 4, 5]])
    assert recall(expected, found, 2) == 0.75


def test_a_sample_belongs_to_its_innermost_stage() -> None:
    """Frames of libraries count for whoever called them."""
    fold = "thread (1): w;fold (streams/fold.py:250)"
    assert stage_of(f"{fold};Scanner.top (serving/scanner.py:200);run (onnxruntime/x.py:1)") == (
        "scan, top-K"
    )
    assert stage_of(f"{fold};Engine.advance (serving/engine.py:1);_all (numpy/y.py:2)") == "steps"
    assert stage_of(fold) == "fold, the rest"
    assert stage_of("thread (1): MainThread;main (cli.py:3)") == "other"
    waits = "thread (2): w;run (faust/x.py:1);EpollSelector.select (selectors.py:468)"
    raw = f"{fold} 3\nthread (1): w;main (cli.py:3) 1\n{waits} 9\n"
    assert shares(raw) == {"fold, the rest": 0.75, "other": 0.25}


def test_stages_name_files_that_are_there() -> None:
    """A module that moved would count for its caller."""
    ours = {file for _, file, _ in STAGES if file.startswith(("serving/", "streams/"))}
    assert ours
    assert not [file for file in ours if not (ROOT / file).exists()]


def test_what_a_deployment_needs_is_the_product_of_rate_and_cost() -> None:
    """10,000 clicks/s of 200 µs are two cores' work drained, and take eight live."""
    cost = Cost(
        worker_us=200.0,
        redis_us=20.0,
        broker_us=10.0,
        scan_us=100.0,
        user_bytes=4000.0,
        redis_in_bytes=2000.0,
        redis_out_bytes=100.0,
        click_bytes=150.0,
        signal_bytes=50.0,
    )
    found = need(cost, clicks_per_s=10_000, users=1e6, items=20_000)
    assert (found.workers, found.partitions) == (8, 16)
    assert (found.redis_cores, found.broker_cores, found.redis_gb) == (1, 1, 8.0)
    assert found.mbit_per_s == 200.0
    assert need(cost, clicks_per_s=10_000, users=1, items=10**6, scan_us=1000.0).workers == 44


def test_a_partition_s_stand_is_the_longest_time_between_two_of_its_moves() -> None:
    """One that still stands at the end counts as long as it was looked at."""
    heads = Heads(cast(Any, None))
    for now_s, nexts in ((1.0, [5, 5]), (1.5, [6, 5]), (3.5, [6, 5]), (4.0, [7, 5]), (4.5, [8, 5])):
        heads.look(now_s, nexts)
    assert heads.still_s == {0: 2.0, 1: 3.5}
