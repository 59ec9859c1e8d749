"""One training run from a source to a published release: what `afterclick train` does.

Knows no command line. Order: fold's rules, split, fit, baselines, tables, files, gate, store,
report. Nothing is published before the gate has passed.
"""

import logging
import secrets
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import Compression, Manifest
from afterclick.serving.memory import Memory
from afterclick.serving.releases import ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.training import peers
from afterclick.training.baselines import evaluate_baselines
from afterclick.training.blended import blend_of, memory_for
from afterclick.training.blending import Fitted as FittedBlend
from afterclick.training.blending import (
    asked_of,
    blend_rankings,
)
from afterclick.training.cells import EXPORTED
from afterclick.training.data import (
    Columns,
    build_log,
    held_out,
    recode,
)
from afterclick.training.evaluate import model_queries, model_ranks
from afterclick.training.export import Tables, build_tables, check_release, write_release
from afterclick.training.fit import Epoch, Fitted, Guide, fit
from afterclick.training.metrics import OF_TEST, Ranking, headlines, rates
from afterclick.training.model import Recommender
from afterclick.training.prepare import Data, clicked, prepare, settled
from afterclick.training.progress import Silent, Teller
from afterclick.training.report import write_report
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import Source
from afterclick.training.walk import knowledge_of
from afterclick.training.warm import load_weights, save_weights

REPORTS = "reports"
CHECKPOINTS = "checkpoints"
WEIGHTS = "weights"

WEIGHTS_MAX = 3
"""Runs whose weights are kept for warm starts: a rollback by two releases still has its own."""

log = logging.getLogger(__name__)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run made; the last line of `afterclick train --json`."""

    release: str
    """Empty for a cell that is only compared, and in all processes of torchrun but the first."""
    publication: int | None
    """Number; None where the release was not published."""
    report: str
    """Path of the picture."""
    metrics: dict[str, dict[str, float]]
    """Rates on the validation part, by method."""
    test: dict[str, dict[str, float] | float]
    """On the test file: `hit_rate_20`, `mrr_20` and `predictions` of the release as served, and the
    same of `blend` (where it has one), `blend_without_…`, `model` and every baseline.
    """
    num_events: int
    num_items: int
    num_bad: int
    """Records of the topics that were left out because they are malformed."""
    num_duplicates: int
    curve: list[Epoch]
    seconds: float


def train_release(
    source: Source,
    settings: TrainingSettings,
    serving: ServingSettings,
    *,
    test: Columns | None = None,
    publish: bool = True,
    resume: bool = False,
    guide: Guide | None = None,
    compression: Compression | None = None,
    baselines: bool = True,
    on_blend: Callable[[FittedBlend], None] = lambda blend: None,
    teller: Teller | None = None,
) -> Outcome:
    """Train, export, check, store and publish.

    Args:
        source: clicks and items.
        settings: of the run.
        serving: where releases go, and the rules of the fold.
        test: clicks of held-out sequences, evaluated with the finished release.
        publish: make it the release to serve.
        resume: go on from the checkpoint beside the releases.
        guide: a further loss, see `fit`.
        compression: what the manifest says of it.
        baselines: rank the validation part by them, too.
        on_blend: told of the blend that goes into the release.
        teller: told of every stage.

    Raises:
        ContractError: nothing to learn from, or the export gate refused the release.
        ConfigError: see `fit`.
        UnavailableError: the place of the releases does not answer.
    """
    started_s = time.monotonic()
    teller = teller or Silent()
    if publish and settings.cell not in EXPORTED:
        raise ConfigError(
            f"training: cell {settings.cell!r} is for comparison and makes no release; "
            f"choose {' or '.join(EXPORTED)}, or train it with --no-publish"
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    data = prepare(source, settings, serving)
    from_chance = settled(data, settings)
    settings, start = _start(data, settings, serving)
    settings = settled(data, settings)
    teller.stage(
        "train",
        events=data.everything.num_events,
        sequences=data.everything.num_sequences,
        items=len(data.item_ids),
        epochs=settings.epochs + (settings.all_epochs if data.held is not None else 0),
        bad_records=source.num_bad,
    )
    fitted = _fit(data, settings, serving, start=start, guide=guide, resume=resume, teller=teller)
    metrics = _metrics(data, fitted, serving, teller) if baselines else {}
    # A walk's first model has no weights to begin with.
    blend = blend_of(source, data, fitted, from_chance, serving, teller)
    if blend is not None:
        metrics.update(blend.judged)
        blend = blend if blend.helps or settings.blend == "on" else None
    trained_N = clicked(data.everything if settings.all_epochs else data.train, data)
    tables = build_tables(fitted.model, data.item_ids, trained_N, source.items)
    memory = None
    if blend is not None:
        memory = memory_for(data.everything, data, settings)
        on_blend(blend)
    tested = _test(test, data, fitted, tables, blend, memory, serving, teller)
    release, publication, report = "", None, Path()
    if settings.cell in EXPORTED and not peers.rank():
        teller.stage("export")
        release = _export(
            source,
            data,
            fitted,
            tables,
            blend,
            memory,
            metrics,
            tested,
            settings,
            serving,
            compression,
        ).release
        _keep_weights(fitted, data, release, serving)
    if publish and release:
        publication = _store(serving).publish(release).number
        teller.stage("published", release=release, publication=publication)
    if not peers.rank():
        report = _side_folder(serving, REPORTS) / f"{release or settings.cell}.png"
        write_report(report, f"release {release or 'none'}", fitted.curve, metrics)
        teller.stage("report", path=str(report))
    return Outcome(
        release=release,
        publication=publication,
        report=str(report),
        metrics=metrics,
        test=_outcome_of(tested),
        num_events=data.everything.num_events,
        num_items=len(tables.rows),
        num_bad=source.num_bad,
        num_duplicates=data.num_duplicates,
        curve=fitted.curve,
        seconds=round(time.monotonic() - started_s, 3),
    )


def release_id(now: datetime) -> str:
    """Name of a release: when it was made, and four letters so that two never meet."""
    return f"{now:%Y-%m-%dT%H-%M-%SZ}-{secrets.token_hex(2)}"


def _start(
    data: Data, settings: TrainingSettings, serving: ServingSettings
) -> tuple[TrainingSettings, Callable[[Recommender], None]]:
    """What to train with, and where to begin: at the published weights if they are here."""
    published = _store(serving).current() if settings.warm_start else None
    if published is None:
        return settings, lambda model: None
    path = _side_folder(serving, WEIGHTS) / f"{published.release}.pt"
    if not path.is_file():
        log.warning("warm start: %s is not there; beginning by chance", path)
        return settings, lambda model: None
    rate = settings.learning_rate * settings.final_rate
    settings = msgspec.structs.replace(
        settings,
        epochs=settings.warm_epochs,
        learning_rate=rate,
        retrain="off" if settings.retrain == "auto" else settings.retrain,
    )

    def start(model: Recommender) -> None:
        known = load_weights(path, model, data.item_ids)
        log.info("warm start: %d of %d items known", known, len(data.item_ids))

    return settings, start


def _keep_weights(fitted: Fitted, data: Data, release: str, serving: ServingSettings) -> None:
    """Those of the best epoch, from before the last passes: these have met all clicks so far, and
    the next run must hold out some that its beginning has not met.
    """
    folder = _side_folder(serving, WEIGHTS)
    final = {name: value.clone() for name, value in fitted.model.state_dict().items()}
    fitted.model.load_state_dict(fitted.validation_state)
    save_weights(folder / f"{release}.pt", fitted.model, data.item_ids)
    fitted.model.load_state_dict(final)
    by_age = sorted(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    for path in by_age[:-WEIGHTS_MAX]:
        path.unlink()


def _fit(
    data: Data,
    settings: TrainingSettings,
    serving: ServingSettings,
    *,
    start: Callable[[Recommender], None],
    guide: Guide | None,
    resume: bool,
    teller: Teller,
) -> Fitted:
    total = settings.epochs + (settings.all_epochs if data.held is not None else 0)

    def on_epoch(epoch: Epoch) -> None:
        figures = msgspec.structs.asdict(epoch)
        if not epoch.final:
            figures.pop("final")
        teller.stage("fit", **{**figures, "epochs": total})

    return fit(
        data.train,
        data.held,
        len(data.item_ids),
        settings,
        content=data.content,
        everything=data.everything,
        checkpoint=_side_folder(serving, CHECKPOINTS) / "last.pt",
        resume=resume,
        start=start,
        guide=guide,
        on_epoch=on_epoch,
        on_batch=teller.share,
    )


def _metrics(
    data: Data, fitted: Fitted, serving: ServingSettings, teller: Teller
) -> dict[str, dict[str, float]]:
    """Rates on the validation part; empty without one."""
    if data.held is None:
        if data.everything.num_sequences < 2:
            log.warning(
                "all clicks belong to one user, so nothing can be held out and nothing measured; "
                "are users told apart (--user-column)?"
            )
        return {}
    baselines = evaluate_baselines(
        data.train, data.held, len(data.item_ids), history=serving.history
    )
    # No `ewma` here: the last epochs have shown the item vectors what was held out.
    metrics = {"model": fitted.validation, **_rates(baselines)}
    teller.stage("baselines", **headlines(metrics))
    return metrics


def _test(
    test: Columns | None,
    data: Data,
    fitted: Fitted,
    tables: Tables,
    blend: FittedBlend | None,
    memory: Memory | None,
    serving: ServingSettings,
    teller: Teller,
) -> dict[str, dict[str, float]]:
    """Rates of the finished tables on a test file; every item of the release may be stepped."""
    if test is None:
        return {}
    unseen = build_log(test, history=serving.history, idle_ttl_s=serving.idle_ttl_s)
    held = held_out(recode(unseen, data.item_ids), None)
    if not held.target_P.any():
        raise ContractError(
            "test file: no sequence has two clicks, so there is nothing to predict",
            reason="no-transitions",
        )
    device = fitted.model.bias.device
    rank_X = model_ranks(
        fitted.model,
        held,
        step_ND=torch.from_numpy(tables.step_ND).to(device),
        scan_ND=torch.from_numpy(tables.scan_ND).to(device),
    )
    baselines = evaluate_baselines(
        data.everything,
        held,
        len(data.item_ids),
        history=serving.history,
        vector_ND=tables.step_ND,
    )
    own = {}
    if blend is not None and memory is not None:
        query_XD = model_queries(fitted.model, held, torch.from_numpy(tables.step_ND).to(device))
        asked = asked_of(
            held, query_XD, memory, history=serving.history, filter_seen=serving.filter_seen
        )
        own = blend_rankings(asked, knowledge_of(memory, tables), blend.spec, blend.scorers)
    tested = {**_rates(own), "model": rates(rank_X), **_rates(baselines)}
    teller.stage("test", **headlines(tested))
    return tested


def _rates(rankings: dict[str, Ranking]) -> dict[str, dict[str, float]]:
    return {method: rates(ranking.rank_X) for method, ranking in rankings.items()}


def _export(
    source: Source,
    data: Data,
    fitted: Fitted,
    tables: Tables,
    blend: FittedBlend | None,
    memory: Memory | None,
    metrics: dict[str, dict[str, float]],
    tested: dict[str, dict[str, float]],
    settings: TrainingSettings,
    serving: ServingSettings,
    compression: Compression | None,
) -> Manifest:
    """Write the release, let it through the gate, and move it to its place."""
    now = datetime.now(UTC)
    store = _store(serving)
    folder = store.staging(release_id(now))
    try:
        manifest = write_release(
            folder,
            fitted.model,
            tables,
            created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
            history=settings.history,
            snapshot=source.snapshot,
            items_offset=source.items_offset,
            signals_offset=source.signals_offset,
            metrics={**metrics, **{OF_TEST + name: found for name, found in tested.items()}},
            seed=settings.seed,
            blend=blend,
            memory=memory,
            compression=compression,
        )
        real = data.held.sequences if data.held is not None else data.everything
        passed = check_release(folder, fitted.model, tables, real, seed=settings.seed, blend=blend)
        log.info("release %s: gate passed: %s", manifest.release, ", ".join(passed))
        store.add(folder)
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)  # half a release is of no use to anybody
        raise
    return manifest


def _outcome_of(tested: dict[str, dict[str, float]]) -> dict[str, dict[str, float] | float]:
    if not tested:
        return {}
    names = ("hit_rate_20", "mrr_20", "predictions")
    served = tested.get("blend", tested["model"])
    found: dict[str, dict[str, float] | float] = {name: served[name] for name in names}
    for method, values in tested.items():
        found[method] = {name: values[name] for name in names}
    return found


def _store(serving: ServingSettings) -> ReleaseStore:
    return ReleaseStore(serving.releases, serving.releases_cache)


def _side_folder(serving: ServingSettings, name: str) -> Path:
    """Local folder beside the releases; a release itself holds exactly its contract's files."""
    is_remote = "://" in serving.releases
    return Path(serving.releases_cache if is_remote else serving.releases) / name
