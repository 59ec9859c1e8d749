"""One training run from a source to a published release: what `afterclick train` does.

Knows no command line. Order: fold's rules, split, fit, baselines, tables, files, gate, store,
report. Nothing is published before the gate has passed.
"""

import copy
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import Compression, ItemRow, Manifest
from afterclick.serving.memory import Memory, memory_of
from afterclick.serving.releases import ReleaseStore
from afterclick.serving.settings import ServingSettings
from afterclick.training import peers
from afterclick.training.baselines import evaluate_baselines
from afterclick.training.blending import (
    PREDICTIONS_MIN,
    Stage,
    asked_of,
    blend_rankings,
    fit_blend,
)
from afterclick.training.blending import Fitted as FittedBlend
from afterclick.training.cells import EXPORTED
from afterclick.training.data import (
    UNKNOWN,
    Columns,
    Held,
    Sequences,
    build_log,
    held_out,
    newest,
    recode,
    split,
)
from afterclick.training.evaluate import model_queries, model_ranks
from afterclick.training.export import Tables, build_tables, check_release, write_release
from afterclick.training.fit import Epoch, Fitted, Guide, fit
from afterclick.training.metrics import Ranking, rates
from afterclick.training.model import Recommender
from afterclick.training.progress import Silent, Teller
from afterclick.training.report import write_report
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import Source
from afterclick.training.text import Content, content_of
from afterclick.training.walk import STAGES, World, knowledge_of, questions_of, walk
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


class Data(NamedTuple):
    """What a run learns from and is judged by; codes are rows of `item_ids`."""

    item_ids: list[str]
    train: Sequences
    held: Held | None
    everything: Sequences
    content: Content | None
    num_duplicates: int
    asked: Held | None = None
    """`held`, but items that the training part lacks by their own codes."""


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
    blend = blend_of(source, data, fitted, settings, serving, teller)
    if blend is not None:
        metrics.update(blend.judged)
        blend = blend if blend.helps or settings.blend == "on" else None
    trained_N = _clicked(data.everything if settings.all_epochs else data.train, data)
    tables = build_tables(fitted.model, data.item_ids, trained_N, source.items)
    memory = None
    if blend is not None:
        memory = _memory(data.everything, data, settings)
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


def prepare(source: Source, settings: TrainingSettings, serving: ServingSettings) -> Data:
    """Apply the fold's rules, code the items, hold out the newest part.

    Raises:
        ContractError: no click is left, or no item has clicks enough.
    """
    whole = build_log(source.columns, history=serving.history, idle_ttl_s=serving.idle_ttl_s)
    item_ids = sorted({*whole.item_ids, *source.items})
    sequences = recode(whole, item_ids)
    count_N = np.bincount(sequences.item_P, minlength=len(item_ids))
    sequences = _forget_items(sequences, count_N >= settings.item_min_count)
    train, held = split(sequences, settings.validation, settings.split)
    train = train.select(train.item_P != UNKNOWN)
    everything = sequences.select(sequences.item_P != UNKNOWN)
    if not train.num_events:
        raise ContractError(
            f"training: no item has {settings.item_min_count} clicks (item_min_count) before the "
            "validation part",
            reason="no-transitions",
        )
    content = None
    if settings.content:
        rows = [source.items.get(item_id) or ItemRow(item_id=item_id) for item_id in item_ids]
        content = content_of(rows, settings.content_buckets)
    asked = None
    if held is not None:
        known_N = np.bincount(train.item_P, minlength=len(item_ids)) > 0
        if content is not None:
            known_N |= content.speaking(known_N)
        asked = newest(held, settings.validation_events_max)
        held = Held(_forget_items(asked.sequences, known_N), asked.target_P)
        held = held if held.target_P.any() else None
    return Data(item_ids, train, held, everything, content, whole.num_duplicates, asked)


def settled(data: Data, settings: TrainingSettings) -> TrainingSettings:
    """The settings with what the data decides of them."""
    share = 0.0
    if data.held is not None:
        item_X = data.held.sequences.item_P[data.held.target_P]
        share = float((item_X == UNKNOWN).mean())
    return settings.settled(data.train.num_events, share)


def _forget_items(sequences: Sequences, known_N: npt.NDArray[np.bool_]) -> Sequences:
    item_P = sequences.item_P
    known_P = (item_P != UNKNOWN) & known_N[np.maximum(item_P, 0)]
    return sequences._replace(item_P=np.where(known_P, item_P, UNKNOWN))


def _clicked(part: Sequences, data: Data) -> npt.NDArray[np.bool_]:
    return np.bincount(part.item_P, minlength=len(data.item_ids)) > 0


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
        return {}
    baselines = evaluate_baselines(
        data.train, data.held, len(data.item_ids), history=serving.history
    )
    # No `ewma` here: the last epochs have shown the item vectors what was held out.
    metrics = {"model": fitted.validation, **_rates(baselines)}
    teller.stage("baselines", **_flat(metrics))
    return metrics


def blend_of(
    source: Source,
    data: Data,
    fitted: Fitted,
    settings: TrainingSettings,
    serving: ServingSettings,
    teller: Teller,
) -> FittedBlend | None:
    """A blend fitted on what the model had not met; None where that is too little, or no wish.

    Raises:
        ConfigError: it was asked for and there are too few predictions.
    """
    held, asked = data.held, data.asked
    if settings.blend == "off":
        return None
    if held is None or asked is None or held.target_P.sum() < PREDICTIONS_MIN:
        if settings.blend == "on":
            raise ConfigError(
                f"blend: 'on' needs {PREDICTIONS_MIN} validation predictions, and there are "
                f"{0 if held is None else held.target_P.sum()}; raise `validation`, or set 'auto'"
            )
        log.info("no blend: fewer than %d validation predictions", PREDICTIONS_MIN)
        return None
    live = settings.blend_memory == "live" or (
        settings.blend_memory == "auto" and source.snapshot.source.startswith("kafka:")
    )
    # Of tails, what comes later in one sequence comes before the tail of another.
    live = live and data.train.time_P is not None and settings.split != "tails"
    world = World(data.everything, data.item_ids, source.items, data.content)
    if live:
        world = _begun(world, data, fitted)
        steps = walk(world, settings, history=serving.history, filter_seen=serving.filter_seen)
        try:
            stages = _told(steps.stages, teller)
            blend = fit_blend(stages, steps.num, settings, arrivals=steps.arrivals)
        except ContractError as error:
            if error.reason != "no-transitions" or settings.blend == "on":
                raise
            log.info("no blend: before its predictions no user has two clicks")
            return None
    else:
        question = _validation_question(world, data, asked, fitted, settings, serving)
        timed = question.asked.time_X is not None
        blend = fit_blend([question], len(question.asked.target_X), settings, timed=timed)
    teller.stage("blend", helps=blend.helps, **_flat(blend.judged))
    return blend


def _told(stages: Iterator[Stage], teller: Teller) -> Iterator[Stage]:
    for number, stage in enumerate(stages, 1):
        teller.stage("walk", number=number, stages=STAGES, predictions=len(stage.asked.target_X))
        yield stage


def _begun(world: World, data: Data, fitted: Fitted) -> World:
    """With the best epoch's model, where the training part is all that came before the rest."""
    time_P, oldest_P = data.everything.time_P, data.train.time_P
    assert time_P is not None
    assert oldest_P is not None
    if not np.array_equal(np.sort(time_P)[: len(oldest_P)], np.sort(oldest_P)):
        return world
    learnt = copy.deepcopy(fitted.model)
    learnt.load_state_dict(fitted.validation_state)
    return world._replace(learnt=learnt, num_learnt=len(oldest_P))


def _validation_question(
    world: World,
    data: Data,
    asked: Held,
    fitted: Fitted,
    settings: TrainingSettings,
    serving: ServingSettings,
) -> Stage:
    """What was held out, asked of the best epoch's model and the memory of the training part."""
    model = fitted.model
    final = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(fitted.validation_state)
    memory = _memory(data.train, data, settings)
    known_N = _clicked(data.train, data)
    question, tables = questions_of(
        model, asked, known_N, world, memory, serving.history, serving.filter_seen
    )
    model.load_state_dict(final)
    return Stage(question, knowledge_of(memory, tables))


def _memory(part: Sequences, data: Data, settings: TrainingSettings) -> Memory:
    return memory_of(
        data.item_ids, part.start_S1, part.item_P, part.time_P, per_item=settings.blend_sessions
    )


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
    teller.stage("test", **_flat(tested))
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
            metrics={**metrics, **{f"test/{name}": found for name, found in tested.items()}},
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


def _flat(metrics: dict[str, dict[str, float]]) -> dict[str, float | dict[str, float]]:
    """Per method HR@20 and MRR@20, and how many predictions stand behind them."""
    shown: dict[str, float | dict[str, float]] = {
        method: {name: values[name] for name in ("hit_rate_20", "mrr_20")}
        for method, values in metrics.items()
    }
    shown["predictions"] = next(iter(metrics.values()))["predictions"]
    return shown


def _store(serving: ServingSettings) -> ReleaseStore:
    return ReleaseStore(serving.releases, serving.releases_cache)


def _side_folder(serving: ServingSettings, name: str) -> Path:
    """Local folder beside the releases; a release itself holds exactly its contract's files."""
    is_remote = "://" in serving.releases
    return Path(serving.releases_cache if is_remote else serving.releases) / name
