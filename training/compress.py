"""Smaller releases from a release: static int8, magnitude pruning, distillation.

The result is a release of its own: it passes the self-test, its manifest says what it was made
from, and it is published like any other. Knows no command line. Shape letters: B users,
S floats of state.

`int8`: ONNX Runtime has no LSTM with static scales, so the recurrent weights are int8 in the file
and float32 once loaded (weight-only: a quarter of the bytes, no time); matrices of the query graph
are int8 with static scales from real histories. Dynamic scales are forbidden: they make a user's
result depend on who shares the batch. `prune` sets the smallest weights to zero: they compress,
but take as long. `distill` trains a smaller model that also imitates the release's scores, and is
the one that saves time and record bytes.
"""

import shutil
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from afterclick.serving.engine import Engine
from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.manifest import (
    MANIFEST_NAME,
    QUERY_NAME,
    SELF_TEST_NAME,
    STEP_NAME,
    Compression,
    Manifest,
    Publication,
    sha256_of,
)
from afterclick.serving.releases import LoadedRelease, ReleaseStore, replayed, self_test
from afterclick.serving.settings import ServingSettings
from afterclick.training.data import Columns, build_log
from afterclick.training.distillation import rows_of, teacher_guide
from afterclick.training.export import Histories, advance_whole, real_histories
from afterclick.training.pipeline import release_id, train_release
from afterclick.training.prepare import prepare
from afterclick.training.settings import TrainingSettings
from afterclick.training.smaller_graphs import matrices_int8, pruned, weights_int8
from afterclick.training.sources import Source
from afterclick.training.trial import evaluate_release

Method = Literal["int8", "prune", "distill"]
Graphs = dict[str, onnx.ModelProto]

CALIBRATION_STEPS = 64
"""Calls whose values set the scales of `int8`, each of `export.GATE_USERS` users at most."""

TIMED_CALLS = 200


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A release before the held-out clicks, on a scale and by the clock."""

    hit_rate_20: float
    mrr_20: float
    predictions: float
    graph_bytes: float
    """Of `step.onnx` and `query.onnx`."""
    packed_bytes: float
    """The same, deflated, as they travel."""
    release_bytes: float
    state_bytes: float
    """Of a user record."""
    step_us: float
    """Median of one step and query of one user alone."""
    step_64_us: float
    """Per user, of 64 together."""


class Compressed(msgspec.Struct, frozen=True, kw_only=True):
    """What came out; the last line of `afterclick compress --json`."""

    release: str
    of: str
    method: str
    detail: dict[str, str | int | float]
    before: Measured
    after: Measured
    publication: int | None
    seconds: float


class Job(NamedTuple):
    """What every method needs."""

    teacher: LoadedRelease
    folder: Path
    """Of the release."""
    source: Source
    """Clicks that it was trained on: calibration and distillation learn from them."""
    test: Columns
    serving: ServingSettings


def compress(
    job: Job,
    method: Method,
    *,
    share: float = 0.5,
    settings: TrainingSettings | None = None,
    publish: bool = False,
) -> Compressed:
    """Make a smaller release, measure both, and store it.

    Args:
        job: the release and the clicks.
        method: which.
        share: `prune`: of the weights of every matrix that become zero.
        settings: `distill`: of the smaller model's training.
        publish: make it the release to serve.

    Raises:
        ConfigError: a share outside (0, 1), `distill` without settings, or attention.
        ContractError: the new release fails a check; nothing is stored then.
    """
    started_s = time.monotonic()
    if job.teacher.manifest.inputs.past or (settings is not None and settings.past):
        raise ConfigError("compress: attention over the past is not compressed; set past to 0")
    before = measure(job, job.teacher, job.folder)
    if method == "distill":
        if settings is None:
            raise ConfigError("compress: distill needs the smaller model's settings")
        name, detail, after = _distilled(job, settings, before)
    else:
        if not 0 < share < 1:
            raise ConfigError(f"--share: expected a share between 0 and 1, got {share:g}")
        detail = {"share": share} if method == "prune" else {"scales": "static"}
        make = _pruner(share) if method == "prune" else _quantiser(job)
        name, after = _rewritten(job, method, detail, make, before)
    store = ReleaseStore(job.serving.releases, job.serving.releases_cache)
    return Compressed(
        release=name,
        of=job.teacher.manifest.release,
        method=method,
        detail=detail,
        before=before,
        after=after,
        publication=store.publish(name).number if publish else None,
        seconds=round(time.monotonic() - started_s, 1),
    )


def measure(job: Job, loaded: LoadedRelease, folder: Path) -> Measured:
    """Accuracy on the held-out clicks, bytes, and microseconds of a step."""
    found = evaluate_release(loaded, job.test, None, job.serving).test
    graphs = [(folder / name).read_bytes() for name in (STEP_NAME, QUERY_NAME)]
    return Measured(
        **found,
        graph_bytes=float(sum(map(len, graphs))),
        packed_bytes=float(sum(len(zlib.compress(data)) for data in graphs)),
        release_bytes=float(sum((folder / name).stat().st_size for name in loaded.manifest.files)),
        state_bytes=float(loaded.manifest.state_bytes),
        step_us=_step_us(loaded, 1),
        step_64_us=_step_us(loaded, 64),
    )


def describe(found: Compressed) -> str:
    """A table for people: before, after, and what was lost or gained."""
    before, after = found.before, found.after
    lines = [f"{found.release}: {found.method} of {found.of}, {found.detail}"]
    lines.append(f"{'':<26}{'before':>12}{'after':>12}{'change':>12}")
    for label, name, unit, digits in (
        ("HR@20, %", "hit_rate_20", 100, 2),
        ("MRR@20, %", "mrr_20", 100, 2),
        ("graphs, KB", "graph_bytes", 1e-3, 1),
        ("graphs deflated, KB", "packed_bytes", 1e-3, 1),
        ("release, KB", "release_bytes", 1e-3, 1),
        ("state in a record, bytes", "state_bytes", 1, 0),
        ("step, one user, µs", "step_us", 1, 1),
        ("step, per user of 64, µs", "step_64_us", 1, 2),
    ):
        old, new = unit * getattr(before, name), unit * getattr(after, name)
        change = f"{new - old:+.{digits}f}" if "%" in label else f"{100 * (new / old - 1):+.0f}%"
        lines.append(f"{label:<26}{old:12.{digits}f}{new:12.{digits}f}{change:>12}")
    return "\n".join(lines) + "\n"


def _pruner(share: float) -> Callable[[Graphs], Graphs]:
    return lambda graphs: {name: pruned(graph, share) for name, graph in graphs.items()}


def _quantiser(job: Job) -> Callable[[Graphs], Graphs]:
    def make(graphs: Graphs) -> Graphs:
        return {
            STEP_NAME: weights_int8(graphs[STEP_NAME]),
            QUERY_NAME: matrices_int8(graphs[QUERY_NAME], _query_feeds(job)),
        }

    return make


def _query_feeds(job: Job) -> list[dict[str, Any]]:
    """Inputs of the query graph after every number of steps of real histories."""
    engine = Engine(job.folder, job.teacher.manifest, provider="cpu", threads=1)
    histories = _histories(job)
    if histories is None:
        return []
    feeds = []
    for steps in range(1, min(int(histories.lens_B.max()), CALIBRATION_STEPS) + 1):
        lens_B = np.minimum(histories.lens_B, steps).astype(np.int32)
        cut = _cut(histories, steps, slice(None), lens_B)
        state_BS = advance_whole(engine, job.teacher.catalog.step_vectors_NE, cut)
        feeds.append(engine.query_feed(state_BS))
    return feeds


def _rewritten(
    job: Job,
    method: Method,
    detail: dict[str, str | int | float],
    make: Callable[[Graphs], Graphs],
    before: Measured,
) -> tuple[str, Measured]:
    """The release with other graphs and all else as it was, stored once it passed every check."""
    store = ReleaseStore(job.serving.releases, job.serving.releases_cache)
    now = datetime.now(UTC)
    folder = store.staging(release_id(now))
    try:
        for name in job.teacher.manifest.files:
            shutil.copyfile(job.folder / name, folder / name)
        graphs = {name: onnx.load(str(folder / name)) for name in (STEP_NAME, QUERY_NAME)}
        for name, graph in make(graphs).items():
            onnx.checker.check_model(graph)
            onnx.save(graph, str(folder / name))
        manifest = msgspec.structs.replace(
            job.teacher.manifest,
            release=folder.name,
            created_at=now.isoformat(timespec="seconds").replace("+00:00", "Z"),
        )
        engine = Engine(folder, manifest, provider="cpu", threads=1)
        _record_again(folder, engine)
        _check_batches(job, folder, engine)
        _write_manifest(folder, manifest)
        after = measure(job, _loaded(folder, job.serving), folder)
        _write_manifest(folder, _told(manifest, job, method, detail, before, after))
        self_test(folder, engine)
        store.add(folder)
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    return manifest.release, after


def _record_again(folder: Path, engine: Engine) -> None:
    """The recorded inputs with what the new graphs give for them."""
    with np.load(folder / SELF_TEST_NAME, allow_pickle=False) as recorded:
        data = {name: recorded[name] for name in recorded.files}
    np.savez(folder / SELF_TEST_NAME, **{**data, **replayed(data, engine)})


def _check_batches(job: Job, folder: Path, engine: Engine) -> None:
    """Bits of users together and alone; only static scales pass."""
    histories = _histories(job)
    if histories is None:
        return
    step_NE = job.teacher.catalog.step_vectors_NE
    state_BS = advance_whole(engine, step_NE, histories)
    query_BD = engine.query(state_BS)
    for user, length in enumerate(histories.lens_B.tolist()):
        own = _cut(histories, length, slice(user, user + 1), histories.lens_B[user : user + 1])
        state_1S = advance_whole(engine, step_NE, own)
        same = np.array_equal(state_1S[0], state_BS[user])
        if not (same and np.array_equal(engine.query(state_1S)[0], query_BD[user])):
            raise ContractError(
                f"release {folder.name}: a user's result depends on who shares the batch; "
                "expected the same bits; not stored",
                reason="export-gate",
            )


def _distilled(
    job: Job, settings: TrainingSettings, before: Measured
) -> tuple[str, dict[str, str | int | float], Measured]:
    teacher = job.teacher
    detail: dict[str, str | int | float] = {
        "units": settings.units,
        "dim": settings.dim,
        "layers": settings.layers,
    }
    told = Compression(
        method="distill",
        of=teacher.manifest.release,
        detail=detail,
        metrics={"before": msgspec.structs.asdict(before)},
    )
    item_ids = prepare(job.source, settings, job.serving).item_ids
    outcome = train_release(
        job.source,
        settings,
        job.serving,
        test=job.test,
        publish=False,
        guide=teacher_guide(teacher, item_ids, settings.seed),
        compression=told,
    )
    folder = ReleaseStore(job.serving.releases, job.serving.releases_cache).fetch(outcome.release)
    after = measure(job, _loaded(folder, job.serving), folder)
    return outcome.release, detail, after


def _told(
    manifest: Manifest,
    job: Job,
    method: Method,
    detail: dict[str, str | int | float],
    before: Measured,
    after: Measured,
) -> Manifest:
    found = {
        name: msgspec.structs.asdict(one) for name, one in (("before", before), ("after", after))
    }
    return msgspec.structs.replace(
        manifest,
        compression=Compression(
            method=method, of=job.teacher.manifest.release, detail=detail, metrics=found
        ),
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {name: sha256_of(folder / name) for name in manifest.files}
    data = msgspec.json.encode(msgspec.structs.replace(manifest, files=files))
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.format(data))


def _loaded(folder: Path, serving: ServingSettings) -> LoadedRelease:
    digest = sha256_of(folder / MANIFEST_NAME)
    return LoadedRelease(Publication(number=1, release=folder.name, sha256=digest), folder, serving)


def _histories(job: Job) -> Histories | None:
    """Real histories of the training clicks, as rows of the catalogue."""
    serving = job.serving
    log = build_log(job.source.columns, history=serving.history, idle_ttl_s=serving.idle_ttl_s)
    row_N = rows_of(job.teacher, log.item_ids)
    known = log.sequences._replace(item_P=row_N[log.sequences.item_P])
    return real_histories(known, job.teacher.manifest.history)


def _cut(
    histories: Histories, steps: int, users: slice, lens_B: npt.NDArray[np.int32]
) -> Histories:
    """The first steps of some users."""
    item, event, gap, hour = (column[:steps, users] for column in histories[:4])
    return Histories(item, event, gap, hour, lens_B)


def _step_us(loaded: LoadedRelease, num_users: int) -> float:
    """Median microseconds per user of a step and a query."""
    manifest = loaded.manifest
    rng = np.random.default_rng(0)
    rows = rng.integers(0, manifest.num_items, (1, num_users))
    histories = Histories(
        rows,
        np.full_like(rows, 2),
        np.zeros_like(rows),
        np.zeros_like(rows),
        np.ones(num_users, np.int32),
    )
    times = []
    for _ in range(TIMED_CALLS):
        begun_s = time.perf_counter()
        loaded.engine.query(advance_whole(loaded.engine, loaded.catalog.step_vectors_NE, histories))
        times.append(time.perf_counter() - begun_s)
    return round(float(np.median(times)) / num_users * 1e6, 2)
