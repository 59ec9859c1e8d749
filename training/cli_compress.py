"""The verb `compress`: parse, hand over, print. Torch is imported inside, as in cli.py."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from afterclick.serving.errors import ConfigError
from afterclick.serving.settings import serving_settings
from afterclick.streams.columns import (
    add_click_columns,
    add_item_columns,
    click_columns,
    item_columns,
)
from afterclick.training.settings import training_settings


def compress(argv: Sequence[str]) -> int:
    """Make a smaller release of one: int8, pruned, or a smaller model that learns from it."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    from afterclick.serving.releases import ReleaseStore
    from afterclick.training.cli import load_release
    from afterclick.training.compress import Job, describe
    from afterclick.training.compress import compress as make_smaller
    from afterclick.training.sources import read_columns, read_files

    serving = serving_settings(os.environ)
    settings = None
    if options.method == "distill":
        if options.units is None and options.config is None:
            raise ConfigError("compress: distill needs --units N or --config TOML, smaller ones")
        flags = {name: getattr(options, name) for name in ("units", "dim", "epochs", "seed")}
        settings = training_settings(os.environ, options.config, flags)
    columns = click_columns(options)
    teacher = load_release(options.release, serving)
    store = ReleaseStore(serving.releases, serving.releases_cache)
    found = make_smaller(
        Job(
            teacher,
            store.fetch(teacher.manifest.release),
            read_files(options.train, options.items, columns, item_columns(options)),
            read_columns(options.test, columns),
            serving,
        ),
        options.method,
        share=options.share,
        settings=settings,
        publish=options.publish,
    )
    text = msgspec.json.encode(found).decode() + "\n" if options.json else describe(found)
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterclick compress", description=compress.__doc__)
    parser.add_argument("release", metavar="NAME", help="a release's name, or: current")
    parser.add_argument("--method", choices=("int8", "prune", "distill"), required=True)
    parser.add_argument(
        "--train",
        type=Path,
        metavar="FILE",
        required=True,
        help="clicks that it was trained on: int8 takes its scales, distill its lessons from them",
    )
    parser.add_argument(
        "--test", type=Path, metavar="FILE", required=True, help="held-out clicks: what is lost"
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="catalogue, for distill")
    parser.add_argument("--share", type=float, default=0.5, help="prune: of the weights (0.5)")
    parser.add_argument("--config", type=Path, metavar="TOML", help="distill: training settings")
    for name in ("units", "dim", "epochs", "seed"):
        parser.add_argument(f"--{name}", type=int, help="distill: as of `afterclick train`")
    parser.add_argument("--publish", action="store_true", help="make it the release to serve")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    add_click_columns(parser)
    add_item_columns(parser)
    return parser
