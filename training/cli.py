"""The verbs `train`, `tune`, `evaluate` and `schedule`: parse, hand over, print.

Torch and everything else that is heavy is imported inside the verbs, so that `afterclick --help`
loads this module in the base install.
"""

import argparse
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from afterclick.serving.errors import ConfigError
from afterclick.serving.settings import ServingSettings, serving_settings
from afterclick.streams.columns import (
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.streams.settings import streams_settings
from afterclick.training.settings import TrainingSettings, training_settings

if TYPE_CHECKING:
    from afterclick.serving.releases import LoadedRelease
    from afterclick.training.blending import Fitted as FittedBlend
    from afterclick.training.blending import Scorer
    from afterclick.training.data import Columns
    from afterclick.training.pipeline import Outcome
    from afterclick.training.sources import Source

FLAGS = {
    "cell": "lstm or gru; to compare with: rnn or attention",
    "layers": "recurrent layers",
    "units": "hidden units of a layer",
    "dim": "length of an item vector",
    "loss": "cosine, softmax, bpr-max or bce",
    "epochs": "passes over the training part at most",
    "final_epochs": "passes over all data after the best epoch",
    "batch_events": "predictions per mini-batch, 0: by the length of the log",
    "softmax_items": "items scored per mini-batch",
    "learning_rate": "peak of AdamW's rate",
    "dropout": "share of the step vector dropped",
    "patience": "epochs without a better MRR@20 before stopping",
    "validation": "newest share held out",
    "split": "auto, events, sequences or tails",
    "history": "longest stretch learnt from",
    "item_min_count": "clicks an item needs",
    "seed": "of everything random",
    "threads": "of torch; 0: one per core",
    "device": "auto, cpu or cuda",
}
"""Settings that have a flag; a file or the environment sets the others, too."""


def train(argv: Sequence[str]) -> int:
    """Train on clicks from files or from Kafka, and publish the release."""
    options = _train_parser().parse_args(argv)

    from afterclick.training import peers
    from afterclick.training.pipeline import train_release
    from afterclick.training.progress import Bars, JsonLines, Silent, Teller

    _check_source("train", options)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = training_settings(
        os.environ, options.config, {name: getattr(options, name) for name in FLAGS}
    )
    serving = serving_settings(os.environ)

    if peers.join():
        options.progress = "none" if peers.rank() else options.progress
        options.json = options.json and not peers.rank()
    bars = Bars()
    tellers: dict[str, Teller] = {"bars": bars, "jsonl": JsonLines(), "none": Silent()}
    with peers.leaving(), bars if options.progress == "bars" else nullcontext():
        source = _source(options)
        test = None
        if options.test is not None:
            from afterclick.training.sources import read_columns

            test = read_columns(options.test, click_columns(options))
        outcome = train_release(
            source,
            settings,
            serving,
            test=test,
            publish=not options.no_publish,
            resume=options.resume,
            teller=tellers[options.progress],
        )
    if options.json:
        sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
    elif options.progress == "bars":
        sys.stdout.write(describe(outcome))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a release, or settings, on held-out clicks beside every baseline."""
    options = _evaluate_parser().parse_args(argv)
    if options.mode == "live":
        if options.from_s is None or options.release is not None:
            raise ConfigError("evaluate: --mode live needs --from UNIX_S, and trains by --config")
    elif (options.release is None) == (options.config is None):
        raise ConfigError(
            "evaluate: give either --release NAME|current or --config TOML (/dev/null has the "
            "defaults)"
        )
    if options.config is not None and options.mode == "session" and not options.train:
        raise ConfigError("evaluate: --config trains on --train FILE; --clicks is held out")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    serving = serving_settings(os.environ)

    from afterclick.training.data import joined
    from afterclick.training.report import write_comparison
    from afterclick.training.sources import read_columns
    from afterclick.training.trial import describe as describe_trial
    from afterclick.training.trial import evaluate_release, without_last

    columns = click_columns(options)
    clicks = read_columns(options.clicks, columns)
    train = joined([read_columns(path, columns) for path in options.train])
    if options.mode == "leave-one-out":
        train = without_last(clicks)
    with tempfile.TemporaryDirectory(prefix="afterclick-evaluate-") as folder:
        if options.mode == "live":
            return _live(options, msgspec.structs.replace(serving, releases=folder), clicks)
        if options.config is not None:
            serving = msgspec.structs.replace(
                serving,
                releases=folder,
                filter_seen=serving.filter_seen or options.filter_seen,
            )
            name, refitted = _trained(options, serving, train)
        else:
            name, refitted = options.release, {}
        trial = evaluate_release(
            load_release(name, serving),
            clicks,
            train if len(train.user) else None,
            serving,
            mode=options.mode,
            filter_seen=options.filter_seen,
            seed=options.seed,
            refitted=refitted,
        )
    if options.plot is not None:
        write_comparison(options.plot, f"release {trial.release}", trial.methods, trial.intervals)
    text = msgspec.json.encode(trial).decode() + "\n" if options.json else describe_trial(trial)
    sys.stdout.write(text)
    return 0


def schedule(argv: Sequence[str]) -> int:
    """Train again and again, each time in a process of its own."""
    parser = argparse.ArgumentParser(
        prog="afterclick schedule",
        description=schedule.__doc__,
        epilog="All other options are those of `afterclick train`, e.g. --topic.",
    )
    parser.add_argument("--every", required=True, help="from start to start: 30s, 15m, 1h, 1d")
    parser.add_argument("--runs", type=int, help="stop after so many runs")
    options, rest = parser.parse_known_args(argv)

    from afterclick.training.schedule import parse_period, run_schedule

    every_s = parse_period(options.every)
    if options.runs is not None and options.runs < 1:
        raise ConfigError(f"--runs: expected at least 1, got {options.runs}")
    _train_parser().parse_args(rest)  # a typing error must not wait for the first run
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return run_schedule(rest, every_s=every_s, runs=options.runs)


def tune(argv: Sequence[str]) -> int:
    """Search for the settings that rank a validation part best; write them for `train --config`."""
    options = _tune_parser().parse_args(argv)

    from afterclick.training.search_space import read_space
    from afterclick.training.tune import describe
    from afterclick.training.tune import tune as run_study

    _check_source("tune", options)
    if options.trials < 1:
        raise ConfigError(f"--trials: expected at least 1, got {options.trials}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = training_settings(
        os.environ, options.config, {name: getattr(options, name) for name in FLAGS}
    )
    found = run_study(
        _source(options),
        settings,
        serving_settings(os.environ),
        options.out,
        space=None if options.space is None else read_space(options.space),
        method=options.method,
        metric=options.metric,
        trials=options.trials,
        minutes=options.minutes,
        prune=not options.no_pruning,
        command=shlex.join(["afterclick", "tune", *argv]),
        tell=lambda line: print(line, file=sys.stderr),  # noqa: T201 - progress of hours
    )
    text = msgspec.json.encode(found).decode() + "\n" if options.json else describe(found)
    sys.stdout.write(text)
    return 0


def describe(outcome: "Outcome") -> str:
    """The run's result for people: a table of methods, then where everything is."""
    lines = []
    tested = {name: found for name, found in outcome.test.items() if isinstance(found, dict)}
    if tested:
        names = ("hit_rate_20", "mrr_20", "predictions")
        own = {name: float(outcome.test[name]) for name in names}  # type: ignore[arg-type]
        tested = {"as served": own, **tested}
    for title, metrics in (("validation", outcome.metrics), ("test", tested)):
        if not metrics:
            continue
        count = int(metrics.get("model", metrics.get("as served", {}))["predictions"])
        lines.append(f"{title + ', ' + str(count) + ' predictions':<34}  HR@20  MRR@20")
        for method, values in metrics.items():
            figures = f"{100 * values['hit_rate_20']:6.1f} {100 * values['mrr_20']:7.1f}"
            lines.append(f"  {method:<32} {figures}")
    number = outcome.publication
    lines.append(f"release  {outcome.release}")
    lines.append(f"         {'not published' if number is None else f'published as {number}'}")
    lines.append(f"report   {outcome.report}")
    return "\n".join(lines) + "\n"


def _check_source(verb: str, options: argparse.Namespace) -> None:
    if options.topic == (options.clicks is not None):
        raise ConfigError(f"{verb}: give either --clicks FILE or --topic, to say where clicks are")
    if options.items is not None and options.clicks is None:
        raise ConfigError(f"{verb}: --items FILE goes with --clicks; --topic reads the items topic")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clicks", type=Path, metavar="FILE", help="CSV[.gz], Parquet, JSON lines, a folder"
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="catalogue, same kinds of file")
    parser.add_argument("--topic", action="store_true", help="read Kafka's topics instead")
    parser.add_argument("--config", type=Path, metavar="TOML", help="training settings")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = parser.add_argument_group("settings (AFTERCLICK_TRAINING__* are the others)")
    for name, text in FLAGS.items():
        default = TrainingSettings.__struct_defaults__[
            TrainingSettings.__struct_fields__.index(name)
        ]
        settings.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), help=f"{text} ({default})"
        )
    add_click_columns(parser)
    add_item_columns(parser)


def _tune_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterclick tune", description=tune.__doc__)
    _add_source(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("tune"), help="of the study (tune)"
    )
    parser.add_argument("--space", type=Path, metavar="TOML", help="what is searched")
    parser.add_argument("--method", choices=("tpe", "grid", "random"), default="tpe", help="(tpe)")
    parser.add_argument(
        "--metric", choices=("mrr_20", "hit_rate_20"), default="mrr_20", help="(mrr_20)"
    )
    parser.add_argument("--trials", type=int, default=20, help="in all, earlier runs' too (20)")
    parser.add_argument("--minutes", type=float, help="begin no trial after so many")
    parser.add_argument("--no-pruning", action="store_true", help="train every trial to its end")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    _add_settings(parser)
    return parser


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterclick train", description=train.__doc__)
    _add_source(parser)
    parser.add_argument("--test", type=Path, metavar="FILE", help="held-out clicks to evaluate on")
    parser.add_argument("--no-publish", action="store_true", help="add the release, announce not")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument(
        "--progress", choices=("bars", "jsonl", "none"), default="bars", help="how to tell"
    )
    _add_settings(parser)
    return parser


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterclick evaluate", description=evaluate.__doc__)
    parser.add_argument("--release", metavar="NAME", help="a release's name, or: current")
    parser.add_argument("--config", type=Path, metavar="TOML", help="train with these, unpublished")
    parser.add_argument("--clicks", type=Path, metavar="FILE", required=True, help="held out")
    parser.add_argument(
        "--train", type=Path, metavar="FILE", nargs="+", default=[], help="what baselines count"
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="catalogue, for --config")
    parser.add_argument(
        "--mode",
        choices=("session", "leave-one-out", "live"),
        default="session",
        help="predict every click after a sequence's first, each user's last one, or every click "
        "from --from on through the worker's own path, the trainer re-exporting meanwhile",
    )
    parser.add_argument("--from", dest="from_s", type=float, metavar="UNIX_S", help="live begins")
    parser.add_argument(
        "--retrain-every", default="24h", help="live: event time between releases (24h); 0: never"
    )
    parser.add_argument(
        "--renew-every", default="5m", help="live: event time between renewals of lists (5m)"
    )
    parser.add_argument(
        "--renew-users", type=int, default=10_000, help="live: users of one, 0: none (10000)"
    )
    parser.add_argument("--filter-seen", action="store_true", help="no item a second time")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the table, live: the curve")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    add_click_columns(parser)
    add_item_columns(parser)
    return parser


def _live(options: argparse.Namespace, serving: ServingSettings, clicks: "Columns") -> int:
    from afterclick.streams.demo_source import from_files
    from afterclick.streams.replay import Pace
    from afterclick.training.prequential import Pace as LivePace
    from afterclick.training.prequential import describe_live, run_live
    from afterclick.training.report import write_curve
    from afterclick.training.schedule import parse_period

    every_s = 0.0 if options.retrain_every == "0" else parse_period(options.retrain_every)
    source = from_files(
        options.clicks,
        options.items,
        click_columns(options),
        item_columns(options),
        train_share=0.5,
        from_s=options.from_s,
        pace=Pace(),
    )
    live = run_live(
        source,
        clicks,
        training_settings(os.environ, options.config, {}),
        serving,
        LivePace(
            retrain_every_h=every_s / 3600,
            renew_every_s=parse_period(options.renew_every),
            renew_users_max=options.renew_users,
        ),
        tell=lambda line: logging.getLogger(__name__).warning("%s", line),
    )
    if options.plot is not None:
        write_curve(options.plot, f"live: {options.clicks.name}", live)
    text = msgspec.json.encode(live).decode() + "\n" if options.json else describe_live(live)
    sys.stdout.write(text)
    return 0


def _trained(
    options: argparse.Namespace, serving: ServingSettings, train: "Columns"
) -> tuple[str, dict[str, "Scorer"]]:
    """Name of a release that was trained for this evaluation only, and its blend's ablations."""
    from afterclick.training.pipeline import train_release
    from afterclick.training.sources import source_of

    source = source_of("evaluate", train, options.items, item_columns(options))
    settings = training_settings(os.environ, options.config, {})
    if options.mode == "leave-one-out" and settings.split == "auto":
        settings = msgspec.structs.replace(settings, split="tails")
    refitted: dict[str, Scorer] = {}

    def on_blend(blend: "FittedBlend") -> None:
        ablations = {name: each for name, each in blend.scorers.items() if name != "blend"}
        refitted.update(ablations)

    outcome = train_release(source, settings, serving, publish=False, on_blend=on_blend)
    return outcome.release, refitted


def load_release(name: str, serving: ServingSettings) -> "LoadedRelease":
    """A release by its name, or the published one by `current`."""
    from afterclick.serving.manifest import MANIFEST_NAME, Publication, sha256_of
    from afterclick.serving.releases import LoadedRelease, ReleaseStore

    store = ReleaseStore(serving.releases, serving.releases_cache)
    if name == "current":
        published = store.current()
        if published is None:
            raise ConfigError(f"{serving.releases}: nothing is published yet")
        name = published.release
    folder = store.fetch(name)
    sha256 = sha256_of(folder / MANIFEST_NAME)
    return LoadedRelease(Publication(number=1, release=name, sha256=sha256), folder, serving)


def _source(options: argparse.Namespace) -> "Source":
    from afterclick.training.sources import read_files, read_topic

    if options.topic:
        return read_topic(streams_settings(os.environ))
    return read_files(options.clicks, options.items, click_columns(options), item_columns(options))
