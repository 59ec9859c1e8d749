"""The command `afterclick`, and the verbs that read lists and publish releases.

A verb is an entry point of the group `afterclick.commands`, so each package brings its own and this
one imports none of them by name. Imports nothing heavy: the base install is enough for `top`, `key`
and `--help`.
"""

import argparse
import difflib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from afterclick.serving.errors import AfterclickError, ConfigError
from afterclick.serving.manifest import ITEMS_NAME, ItemTable, Manifest, read_manifest
from afterclick.serving.reader import Top, TopK
from afterclick.serving.settings import ServingSettings, serving_settings

if TYPE_CHECKING:
    from afterclick.serving.releases import ReleaseStore

GROUP = "afterclick.commands"

_EXTRA_OF_VERB = {"api": "api", "demo": "train,local", "up": "worker,local"}
_EXTRA_OF_PACKAGE = {"afterclick.training": "train"}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells expect."""
EXIT_PIPE_CLOSED = 141
"""128 + SIGPIPE: whoever read our output went away, as `head` does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns what the process exits with.

    0 worked; 1 bytes broke a contract; 2 usage, setting or missing extra; 3 something is away;
    130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except SystemExit as stop:  # argparse, after it has printed
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except AfterclickError as error:
        sys.stderr.write(f"afterclick {arguments[0]}: {error}\n")
        return error.exit_code


def _run(arguments: list[str]) -> int:
    verbs = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        (sys.stdout if arguments else sys.stderr).write(_help(verbs))
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        sys.stdout.write(f"afterclick {importlib.metadata.version('afterclick')}\n")
        return 0
    name = arguments[0]
    if name not in verbs:
        near = difflib.get_close_matches(name, verbs, n=1)
        meant = f"; did you mean `afterclick {near[0]}`?" if near else ""
        sys.stderr.write(f"afterclick: no verb {name!r}{meant} `afterclick --help` lists them\n")
        return EXIT_USAGE
    try:
        code: int = verbs[name].load()(arguments[1:])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "afterclick":
            raise  # a bug of ours, no missing extra
        extra = _extra_of(verbs[name])
        sys.stderr.write(
            f"afterclick {name} needs: pip install 'afterclick[{extra}]' (no {error.name})\n"
        )
        return EXIT_USAGE
    return code


def _extra_of(verb: importlib.metadata.EntryPoint) -> str:
    package = verb.module.rpartition(".")[0]
    return _EXTRA_OF_VERB.get(verb.name) or _EXTRA_OF_PACKAGE.get(package, "worker")


def _help(verbs: dict[str, importlib.metadata.EntryPoint]) -> str:
    lines = ["usage: afterclick VERB …   (afterclick VERB --help tells more)", ""]
    lines += [f"  {name:<10} {_summary(verbs[name])}" for name in sorted(verbs)]
    lines += ["", "settings come from the environment: AFTERCLICK_SERVING__REDIS=redis://…, …"]
    return "\n".join(lines) + "\n"


def _summary(verb: importlib.metadata.EntryPoint) -> str:
    """First line of the verb's docstring; its module is light, so that this costs nothing."""
    try:
        doc = verb.load().__doc__ or ""
    except ImportError as error:
        return f"(cannot be imported: {error})"
    return doc.strip().partition("\n")[0]


def top(argv: Sequence[str]) -> int:
    """Show a user's list as it stands in Redis."""
    parser = argparse.ArgumentParser(prog="afterclick top", description=top.__doc__)
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--k", type=_positive, help="items at most")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(argv)
    settings = serving_settings(os.environ)
    with TopK(settings.redis, namespace=settings.namespace, layout=settings.layout) as reader:
        answer = reader.get(options.user, options.k)
    if options.json:
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    else:
        sys.stdout.write(describe(options.user, answer, titles(settings, answer.release)))
    return 0


def key(argv: Sequence[str]) -> int:
    """Print a user's partition and Redis keys."""
    parser = argparse.ArgumentParser(prog="afterclick key", description=key.__doc__)
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(argv)
    settings = serving_settings(os.environ)
    with TopK(settings.redis, namespace=settings.namespace, layout=settings.layout) as reader:
        place = reader.place(options.user)
    if options.json:
        sys.stdout.write(msgspec.json.encode(place).decode() + "\n")
        return 0
    sys.stdout.write(
        f"list       {place.list_key}\n"
        f"record     {place.record_key}\n"
        f"head       {place.head_key}\n"
        f"partition  {place.partition}\n"
    )
    return 0


def api(argv: Sequence[str]) -> int:
    """Serve lists over HTTP until a signal ends it."""
    parser = argparse.ArgumentParser(prog="afterclick api", description=api.__doc__)
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=_positive, help="port to listen on")
    options = parser.parse_args(argv)
    from afterclick.serving.api import run_api  # needs an extra that readers lack

    settings = serving_settings(os.environ)
    run_api(
        msgspec.structs.replace(
            settings,
            api_host=options.host or settings.api_host,
            api_port=options.port or settings.api_port,
        )
    )
    return 0


def releases(argv: Sequence[str]) -> int:
    """List, show, publish and prune releases; publishing an old one rolls back."""
    parser = argparse.ArgumentParser(prog="afterclick releases", description=releases.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all releases; the published one is marked")
    publish = actions.add_parser("publish", help="make a release the one that workers serve")
    publish.add_argument("release", metavar="ID")
    show = actions.add_parser("show", help="a release's manifest; by default the published one")
    show.add_argument("release", metavar="ID", nargs="?")
    show.add_argument("--json", action="store_true", help="the manifest itself")
    drop = actions.add_parser("prune", help="delete releases that nothing needs any more")
    drop.add_argument("--keep", type=_positive, default=5, help="newest ones that stay (5)")
    drop.add_argument(
        "--archive",
        default=os.environ.get("AFTERCLICK_STREAMS__ARCHIVE", ""),
        help="what its inputs lists name stays, too (AFTERCLICK_STREAMS__ARCHIVE)",
    )
    drop.add_argument("--dry-run", action="store_true", help="only say which")
    options = parser.parse_args(argv)

    from afterclick.serving.releases import ReleaseStore  # needs numpy and ONNX Runtime

    settings = serving_settings(os.environ)
    if options.action == "prune":
        from afterclick.serving.pruning import prune

        for name in prune(
            settings, archive=options.archive, keep=options.keep, dry_run=options.dry_run
        ):
            sys.stdout.write(f"{'would delete' if options.dry_run else 'deleted'} {name}\n")
        return 0
    store = ReleaseStore(settings.releases, settings.releases_cache)
    if options.action == "list":
        return _list_releases(store)
    if options.action == "publish":
        published = store.publish(options.release)
        sys.stdout.write(f"published {published.release} as number {published.number}\n")
        return 0
    return _show_release(store, options.release, as_json=options.json)


def _list_releases(store: "ReleaseStore") -> int:
    current = store.current()
    names = store.list()
    if current and current.release not in names:
        sys.stderr.write(
            f"{store.root}: number {current.number} is {current.release}, which is not here; "
            "publish another: afterclick releases publish ID\n"
        )
    if not names:
        sys.stderr.write(f"{store.root}: no releases yet; `afterclick train` makes one\n")
    for name in names:
        mark = f"* number {current.number}" if current and name == current.release else ""
        sys.stdout.write(f"{name}  {mark}".rstrip() + "\n")
    return 0


def _show_release(store: "ReleaseStore", release: str | None, *, as_json: bool) -> int:
    if release is None:
        current = store.current()
        if current is None:
            raise ConfigError(
                f"{store.root}: nothing is published; train a release with `afterclick train`, "
                "or publish one: afterclick releases publish ID"
            )
        release = current.release
    manifest = read_manifest(store.fetch(release))
    if as_json:
        sys.stdout.write(msgspec.json.encode(manifest).decode() + "\n")
    else:
        sys.stdout.write(_describe_release(manifest))
    return 0


def describe(user: str, answer: Top, title_of: dict[str, str]) -> str:
    """A list for people: where it comes from, then rank, item id and title."""
    if answer.source == "none":
        return f"{user}: no list, and no fallback either; is a worker running?\n"
    release = f"release {answer.release}, publication {answer.publication}"
    head = (
        f"{user}: {answer.source}, {release if answer.release else 'no release'}, "
        f"{_age(answer.age_ms)} old\n"
    )
    width = max((len(item) for item in answer.items), default=0)
    rows = [
        f"{rank:>4}  {item:<{width}}  {title_of.get(item, '')}".rstrip() + "\n"
        for rank, item in enumerate(answer.items, 1)
    ]
    return head + "".join(rows)


def titles(settings: ServingSettings, release: str) -> dict[str, str]:
    """Titles by item id, from the list's release where its folder is on this machine, else none.

    Items that arrived after the release was made have no title there.
    """
    root = settings.releases_cache if "://" in settings.releases else settings.releases
    try:
        data = (Path(root) / release / ITEMS_NAME).read_bytes()
        table = msgspec.json.decode(data, type=ItemTable)
    except (OSError, msgspec.MsgspecError):
        return {}  # titles are a comfort; the list is shown without them
    return {item.item_id: item.title for item in table.items}


def _describe_release(manifest: Manifest) -> str:
    state = ", ".join(f"{part.name} {part.layers}×{part.units}" for part in manifest.state)
    lines = [
        f"release   {manifest.release}",
        f"created   {manifest.created_at}",
        f"cell      {manifest.cell}, state {state}, {manifest.state_dtype}",
        f"items     {manifest.num_items}",
        f"snapshot  {manifest.snapshot.source}, {manifest.snapshot.num_events} events",
    ]
    for method, values in manifest.metrics.items():
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        lines.append(f"metrics   {method}: {shown}")
    return "\n".join(lines) + "\n"


def _age(age_ms: int) -> str:
    for limit_ms, unit_ms, unit in (
        (10_000, 1, "ms"),
        (600_000, 1000, "s"),
        (36_000_000, 60_000, "min"),
        (864_000_000, 3_600_000, "h"),
    ):
        if age_ms < limit_ms:
            return f"{age_ms // unit_ms} {unit}"
    return f"{age_ms // 86_400_000} d"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
