"""`afterclick demo`: all of it on this machine, as real processes, with live clicks.

Starts a broker, Redis, a worker and the trainer in a private folder, sends a past, waits for the
first release, then sends live clicks and measures what a reader sees. Everything it started ends
with it, on Ctrl-C too. Its display is `demo_panel.py`, its events are `demo_source.py`.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from afterclick.serving.errors import UnavailableError
from afterclick.serving.reader import TopK
from afterclick.streams.admin import create_topics
from afterclick.streams.columns import (
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.streams.demo_live import SWAP_GRACE_S, Live
from afterclick.streams.demo_panel import Show, new_show
from afterclick.streams.demo_source import DemoSource, from_files, from_world
from afterclick.streams.demo_trainer import Trainer, running_trainer
from afterclick.streams.events import Click
from afterclick.streams.local import local_broker, local_redis, local_worker
from afterclick.streams.probe import Probe
from afterclick.streams.replay import Pace, Sender, positive
from afterclick.streams.score import Score
from afterclick.streams.settings import StreamsSettings

NAMESPACE = "afterclick"
PARTITIONS = 4

FIRST_RELEASE_TIMEOUT_S = 900.0
"""A large log on a busy machine; the click world takes half a minute."""

VISITS_MAX = 20_000
"""Users who open their page before live begins, those who clicked last."""
VISITS_TIMEOUT_S = 120.0

SETTLE_S = 10.0
"""Longest wait at the end for the lists of the last clicks."""


def main(argv: Sequence[str]) -> int:
    """Show all of it on this machine: broker, Redis, training, worker, live clicks."""
    began_s = time.monotonic()
    options = _parser().parse_args(argv)
    if options.clicks is None and (options.items or options.from_s is not None):
        _parser().error("--items and --from go with --clicks")
    source = _source(options)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with contextlib.ExitStack() as stack:
            if options.folder is not None:
                options.folder.mkdir(parents=True, exist_ok=True)
                folder = Path(tempfile.mkdtemp(prefix="demo-", dir=options.folder))
            else:
                folder = Path(
                    stack.enter_context(
                        tempfile.TemporaryDirectory(
                            prefix="afterclick-demo-", ignore_cleanup_errors=True
                        )
                    )
                )
            show = stack.enter_context(new_show())
            summary = _run(source, folder, show, options, began_s)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
    return 0


def _run(
    source: DemoSource, folder: Path, show: Show, options: argparse.Namespace, began_s: float
) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        show.step("broker")
        broker = stack.enter_context(local_broker(folder / "broker"))
        show.step("broker", f"tansu at {broker.address}", done=True)
        show.step("Redis")
        redis = stack.enter_context(local_redis(folder / "redis"))
        show.step("Redis", redis.url, done=True)
        env = _settings(broker.address, redis.url, folder)
        streams = StreamsSettings(broker=broker.address)
        create_topics(streams, partitions=PARTITIONS, replication=1)

        show.step("past", f"{len(source.past)} clicks of {source.name}")
        score = Score()
        with Sender(streams) as bulk:
            for item in source.items:
                bulk.send(item)
            for click in source.past:
                bulk.send(click)
                if click.item_id:
                    score.learn(click.user_id, click.item_id, click.timestamp_ms or 0)
            bulk.flush()
        if bulk.failed:
            raise UnavailableError(f"past: {bulk.failed} events were lost: {bulk.last_error}")
        said = f"{len(source.past)} clicks, {len(source.items)} items in Kafka"
        show.step("past", said, done=True)

        show.step("training")
        trainer = stack.enter_context(running_trainer("train", [], env, folder, before_live=True))
        show.step("worker")
        worker = stack.enter_context(local_worker(env, folder))
        show.step("worker", f"ready, {worker.url}/metrics", done=True)
        reader = stack.enter_context(TopK(redis.url, namespace=NAMESPACE))
        user = source.past[-1].user_id
        first_list_s = _await_first_release(trainer, show, reader, user, began_s)
        show.step("training", trainer.status, done=True)
        _visit(streams, source, reader, show)

        # The next runs begin at once, so that a swap can be seen soon.
        every = ["--every", f"{options.every:g}s"]
        again = stack.enter_context(
            running_trainer("schedule", every, env, folder, before_live=False)
        )
        env_file = _write_env(folder, env)
        for line in _hints(env_file, redis.port, source):
            show.note(line)
        sender = stack.enter_context(Sender(streams, bulk=False))
        probe = stack.enter_context(Probe(redis.url, NAMESPACE))
        live = Live(source, score, sender, probe, reader, show, again)
        with contextlib.suppress(KeyboardInterrupt):
            live.run(options.seconds)
            probe.wait_settled(SETTLE_S)
        summary = live.summary()
        return {**summary, "first_list_s": round(first_list_s, 3)}


def _await_first_release(
    trainer: Trainer, show: Show, reader: TopK, user: str, began_s: float
) -> float:
    """Show the training until lists come from its release; returns when the first list stood.

    The worker makes lists of popularity while there is no release: the first one is that.
    """
    first_list_s: float | None = None

    def until(done: Callable[[], bool], what: str) -> None:
        nonlocal first_list_s
        until_s = time.monotonic() + FIRST_RELEASE_TIMEOUT_S
        while not done():
            for line in trainer.poll():
                show.training(line)
            if first_list_s is None and reader.get(user, 1).source in ("model", "popularity"):
                first_list_s = time.monotonic() - began_s
                show.step("first list", f"user {user}, by popularity", done=True)
            if trainer.exit_code not in (None, 0):
                raise UnavailableError(
                    f"afterclick train ended with {trainer.exit_code}; it said:\n{trainer.tail()}"
                )
            if time.monotonic() >= until_s:
                raise UnavailableError(f"demo: waited {FIRST_RELEASE_TIMEOUT_S:.0f} s for {what}")
            time.sleep(0.05)

    until(lambda: trainer.published > 0 and not trainer.running, "the first release")
    until(lambda: first_list_s is not None, "the first list")
    # The fallback list is renewed every few seconds and names the release in force.
    until(lambda: reader.get("", 1).publication > 0, "the worker to take the release")
    assert first_list_s is not None
    return first_list_s


def _visit(streams: StreamsSettings, source: DemoSource, reader: TopK, show: Show) -> None:
    """Let users open their page once, so that their lists come from the model.

    A list is renewed at its user's events only: without this, what stands before a user's first
    live click would still be the list of popularity from before the first release.
    """
    newest = {click.user_id: click.timestamp_ms for click in source.past}
    users = list(dict.fromkeys(click.user_id for click in reversed(source.past)))[:VISITS_MAX]
    show.step("visits", f"{len(users)} users")
    placed: dict[int, int] = {}

    def on_ack(partition: int, offset: int) -> None:
        placed[partition] = max(offset, placed.get(partition, -1))

    with Sender(streams) as sender:
        for user in users:
            visit = Click(user_id=user, event="visit", timestamp_ms=newest[user])
            sender.send(visit, on_ack)
        sender.flush()
    until_s = time.monotonic() + VISITS_TIMEOUT_S
    while any(reader.folded_to(partition) <= offset for partition, offset in placed.items()):
        if time.monotonic() >= until_s:
            raise UnavailableError(f"demo: visits not folded within {VISITS_TIMEOUT_S:.0f} s")
        time.sleep(0.05)
    show.step("visits", f"{len(users)} users opened their page: lists by the model", done=True)


def _settings(broker: str, redis_url: str, folder: Path) -> dict[str, str]:
    return {
        "AFTERCLICK_STREAMS__BROKER": broker,
        "AFTERCLICK_STREAMS__SESSION_TIMEOUT_S": "6",
        "AFTERCLICK_STREAMS__REBALANCE_TIMEOUT_S": "6",
        "AFTERCLICK_SERVING__REDIS": redis_url,
        "AFTERCLICK_SERVING__NAMESPACE": NAMESPACE,
        "AFTERCLICK_SERVING__RELEASES": str(folder / "releases"),
        "AFTERCLICK_SERVING__RELEASES_CACHE": str(folder / "cache"),
        "AFTERCLICK_SERVING__THREADS": "1",
    }


def _write_env(folder: Path, env: Mapping[str, str]) -> Path:
    """A file for `source`, so that another terminal can join in."""
    path = folder / "demo.env"
    path.write_text("".join(f"export {k}={shlex.quote(v)}\n" for k, v in env.items()))
    return path


def _hints(env_file: Path, redis_port: int, source: DemoSource) -> list[str]:
    own = Path(sys.executable).with_name("afterclick")
    on_path = shutil.which("afterclick")
    command = "afterclick" if on_path or not own.exists() else shlex.quote(str(own))
    user, item = source.past[-1].user_id, source.past[-1].item_id
    redis_cli = f"redis-cli -p {redis_port} --raw GET {shlex.quote(f'{NAMESPACE}:top:{user}')}"
    return [
        "Click yourself, in another terminal:",
        f"  source {shlex.quote(str(env_file))}",
        f"  {command} click you {shlex.quote(item)}",
        f"  {command} top you",
        "Read any user's list as JSON:",
        f"  {redis_cli}",
    ]


def _source(options: argparse.Namespace) -> DemoSource:
    pace = Pace(speed=options.speed, rate=options.rate)
    if options.clicks is None:
        return from_world(
            seed=options.seed,
            num_users=options.users,
            num_items=options.num_items,
            num_past=options.past,
            pace=pace,
            now_ms=time.time_ns() // 1_000_000,
        )
    return from_files(
        options.clicks,
        options.items,
        click_columns(options),
        item_columns(options),
        train_share=options.train_share,
        from_s=options.from_s,
        pace=pace,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="afterclick demo",
        description=main.__doc__,
        epilog="The last line on stdout is one JSON object, on Ctrl-C too once clicks are live.",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        help="end by itself after so many seconds of live clicks, later only until a re-exported "
        f"release was swapped in, {SWAP_GRACE_S:.0f} s at most",
    )
    parser.add_argument(
        "--every", type=positive, default=60.0, metavar="S", help="seconds between trainings (60)"
    )
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--speed", type=positive, metavar="X", help="multiples of event time")
    pace.add_argument("--rate", type=positive, metavar="N", help="clicks per second, evenly")
    parser.add_argument("--folder", type=Path, help="keep everything in a folder made in this one")
    world = parser.add_argument_group("the click world")
    world.add_argument("--seed", type=int, default=1, help="(1)")
    world.add_argument("--users", type=int, default=1200, help="(1200)")
    world.add_argument("--num-items", type=int, default=2000, help="(2000)")
    world.add_argument("--past", type=int, default=60_000, help="clicks before live begins (60000)")
    real = parser.add_argument_group("real data instead")
    real.add_argument(
        "--clicks", type=Path, metavar="FILE", help="CSV[.gz], Parquet, JSON lines, a folder"
    )
    real.add_argument("--items", type=Path, metavar="FILE", help="its catalogue")
    real.add_argument(
        "--train-share", type=_share, default=0.8, metavar="X", help="first part, trained on (0.8)"
    )
    real.add_argument(
        "--from", dest="from_s", type=float, metavar="UNIX_S", help="live begins here instead"
    )
    add_click_columns(parser)
    add_item_columns(parser)
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return share


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
