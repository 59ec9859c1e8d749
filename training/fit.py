"""The training loop: epochs, early stopping, checkpoints that resume exactly.

Knows no files but its checkpoint, and nothing of ONNX or releases. Every epoch draws its random
numbers from (seed, epoch), so that a run that was cut off goes on as if it had not been.
"""

# ruff: noqa: N815 - fields carry shape suffixes, too

import hashlib
import math
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch.nn import functional

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.training import peers
from afterclick.training.batch import batch_of, keeping, next_purchases
from afterclick.training.data import I64, Held, Mask, Sequences, batches, windows
from afterclick.training.denormals import flushed
from afterclick.training.evaluate import model_ranks
from afterclick.training.losses import F32, Candidates, Drawn, Scored, next_item_loss
from afterclick.training.metrics import rates
from afterclick.training.model import Recommender, Steps, Vectors
from afterclick.training.optimiser import Optimiser, one_cycle
from afterclick.training.settings import TrainingSettings
from afterclick.training.text import Content

FINAL = 1 << 20
"""Added to the epoch's number in the seed of the last passes over all data."""


MASKED_WINDOWS = 8
"""Times as many windows in a batch of a masked warm-up, because a fifth of the inner steps is all
that it predicts. From the few that are left of an ordinary one Adam's steps are noise, which the
vectors do not recover from: on serenade-toy the whole run ended at 12% HR@20 instead of 52.
"""


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass over the training part gave."""

    epoch: int
    """From 1."""
    loss: float
    """Mean over predictions, in nats; over a sample of the catalogue where that is larger than
    `softmax_items`.
    """
    hit_rate_20: float | None = None
    """On the validation part; None without one."""
    mrr_20: float | None = None
    seconds: float
    final: bool = False
    """A pass over all data, after the best epoch."""


class Fitted(NamedTuple):
    """A trained model and how it came about."""

    model: Recommender
    curve: list[Epoch]
    best_epoch: int
    validation: dict[str, float]
    """Rates of the best epoch, before the last passes over all data; empty without validation."""
    validation_state: dict[str, torch.Tensor]
    """Weights of the best epoch."""


Guide = Callable[[Recommender, torch.Tensor, Sequences, I64], torch.Tensor]
"""From the model, hidden states (X, H), the part learnt from and the positions (X) of what each
predicts: a loss that is added to a batch's own.
"""


class _Run:
    """Everything a checkpoint holds."""

    def __init__(
        self,
        num_items: int,
        settings: TrainingSettings,
        num_batches: int,
        content: Content | None,
    ) -> None:
        self.model = Recommender(num_items, settings, content).to(device_of(settings))
        self.optimiser = Optimiser(self.model, settings)
        masked = min(settings.masked_epochs, settings.epochs)
        plain = settings.epochs - masked
        self.total_steps = max(1, plain * num_batches + masked * -(-num_batches // MASKED_WINDOWS))
        self.step = 0
        self.curve: list[Epoch] = []
        self.best_epoch = 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_rates: dict[str, float] = {}

    def dump(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "curve": [msgspec.structs.asdict(epoch) for epoch in self.curve],
            "best_epoch": self.best_epoch,
            "best": self.best,
            "best_rates": self.best_rates,
        }

    def load(self, data: dict[str, Any]) -> None:
        self.model.load_state_dict(data["model"])
        self.optimiser.load_state_dict(data["optimiser"])
        self.step = data["step"]
        self.curve = [Epoch(**epoch) for epoch in data["curve"]]
        self.best_epoch = data["best_epoch"]
        self.best = data["best"]
        self.best_rates = data["best_rates"]


def fit(
    train: Sequences,
    held: Held | None,
    num_items: int,
    settings: TrainingSettings,
    *,
    content: Content | None = None,
    everything: Sequences | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    until_epoch: int | None = None,
    start: Callable[[Recommender], None] = lambda model: None,
    guide: Guide | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_batch: Callable[[float], None] = lambda share: None,
) -> Fitted:
    """Train a model.

    Args:
        train: part to learn from; codes below `num_items`.
        held: validation part, whose items the training part knows, or say something, or are
            `UNKNOWN`.
        num_items: rows of the item table.
        settings: the run's settings, `settled`.
        content: what the items say about themselves; None for ids alone.
        everything: training and validation part for the last passes, or for training once more;
            None leaves them out.
        checkpoint: file written after every epoch; None keeps none.
        resume: go on from the checkpoint where there is one.
        until_epoch: stop after this epoch, as if cut off: no last passes follow.
        start: sets the weights to begin with; a resumed run has its own.
        guide: a further loss; the curve does not count it.
        on_epoch: told of every epoch.
        on_batch: told which share of an epoch is done, after every mini-batch.

    Raises:
        ConfigError: CUDA was asked for and is not there, or the checkpoint to resume belongs to
            other settings or other data.
        ContractError: there is nothing to learn from, or the loss is not finite.
    """
    _prepare(settings)
    if not len(windows(train, settings.history)[0]):
        raise ContractError(
            "training: no user has two clicks on known items, so there is nothing to learn from",
            reason="no-transitions",
        )

    def begun(part: Sequences) -> _Run:
        # One epoch's number of batches hardly varies; the schedule needs it beforehand.
        steps = int((windows(part, settings.history)[1] - 1).sum())
        torch.manual_seed(settings.seed)
        run = _Run(num_items, settings, -(-steps // settings.batch_events), content)
        start(run.model)
        return run

    run = begun(train)
    name = _fingerprint(train, held, num_items, settings, content)
    if checkpoint is not None and resume and checkpoint.is_file():
        _restore(run, checkpoint, name)
    last = settings.epochs if until_epoch is None else min(until_epoch, settings.epochs)
    while len(run.curve) < last and not _exhausted(run, settings, held):
        started_s = time.monotonic()
        number = len(run.curve) + 1
        rate_at = one_cycle(settings, run.total_steps)
        loss = _epoch(
            run,
            train,
            settings,
            seed=number,
            rate_at=rate_at,
            masked=number <= settings.masked_epochs,
            guide=guide,
            on_batch=on_batch,
        )
        found = rates(model_ranks(run.model, held)) if held is not None else {}
        epoch = Epoch(
            epoch=number,
            loss=loss,
            hit_rate_20=found.get("hit_rate_20"),
            mrr_20=found.get("mrr_20"),
            seconds=round(time.monotonic() - started_s, 3),
        )
        run.curve.append(epoch)
        if not found or found["mrr_20"] > run.best_rates.get("mrr_20", -1.0):
            run.best_epoch, run.best_rates = number, found
            run.best = {key: value.clone() for key, value in run.model.state_dict().items()}
        if checkpoint is not None and not peers.rank():
            _save(run, checkpoint, name)
        on_epoch(epoch)
    run.model.load_state_dict(run.best)
    best = {key: value.clone() for key, value in run.best.items()}
    if everything is not None and until_epoch is None and held is not None:
        if settings.retrain == "on":
            again = begun(everything)
            passes = _passes_again(again, run.best_epoch, everything, settings, guide, on_batch)
            run.model = again.model
        else:
            passes = _last_passes(run, everything, settings, on_batch)
        started_s = time.monotonic()
        for loss in passes:
            seconds = round(time.monotonic() - started_s, 3)
            epoch = Epoch(epoch=len(run.curve) + 1, loss=loss, seconds=seconds, final=True)
            run.curve.append(epoch)
            on_epoch(epoch)
            started_s = time.monotonic()
    run.model.eval()
    return Fitted(run.model, run.curve, run.best_epoch, run.best_rates, best)


def recency_weights(time_P: I64 | None, half_life_h: float) -> F32 | None:
    """(P,) weights of mean 1 that halve with age; None weighs all alike."""
    if time_P is None or not half_life_h:
        return None
    age_h = (time_P.max() - time_P) / 3_600_000
    weight_P = np.exp2(-age_h / half_life_h)
    result: F32 = (weight_P / weight_P.mean()).astype(np.float32)
    return result


def device_of(settings: TrainingSettings) -> torch.device:
    """Where torch computes.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if settings.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if settings.device == "cuda":
        raise ConfigError(
            "device: asked for 'cuda', but torch finds no GPU here; set device to 'cpu' or 'auto'"
        )
    return torch.device("cpu")


def _prepare(settings: TrainingSettings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)


@flushed()
def _epoch(
    run: _Run,
    part: Sequences,
    settings: TrainingSettings,
    *,
    seed: int,
    rate_at: Callable[[int], float],
    masked: bool = False,
    guide: Guide | None = None,
    on_batch: Callable[[float], None],
) -> float:
    """One pass; returns the mean loss per prediction."""
    rng = np.random.default_rng([settings.seed, seed])
    torch.manual_seed(int(rng.integers(1 << 62)))
    model, device = run.model, run.model.bias.device
    model.train()
    count_N = np.bincount(part.item_P, minlength=model.num_items)
    model.set_trained(count_N > 0)
    candidates = Candidates(count_N, settings.softmax_items)
    weight_P = recency_weights(part.time_P, settings.recency_half_life_h)
    begin_W, size_W = windows(part, settings.history)
    total, count = torch.zeros((), device=device), 0
    done, steps_all = 0, int((size_W - 1).sum())
    half = _is_half(settings, device)
    budget = settings.batch_events * (MASKED_WINDOWS if masked else 1)
    for members in batches(size_W - 1, budget, rng):
        batch = batch_of(part, begin_W[members], size_W[members], rng if masked else None)
        drawn = candidates.draw(part.item_P[batch.at_TB[batch.inside_TB]], rng)
        rows = run.optimiser.rows(torch.from_numpy(drawn.item_C).to(device))
        # The same for all processes; each goes on with its own columns.
        own = slice(peers.rank(), None, peers.size())
        shape = (len(batch.at_TB) - 1, len(members))
        keep_TBD, keep_TBH = (
            keeping((*shape, width), share, device)[:, own]
            for width, share in (
                (settings.dim, settings.dropout),
                (settings.units, settings.dropout_hidden),
            )
        )
        vectors = model.vectors(rows)
        num = int(batch.predicts_TB.sum())
        at_TB, mine_TB = batch.at_TB[:, own], batch.predicts_TB[:, own]
        target_X = batch.target_TB[:, own][mine_TB]
        done += int((size_W[members] - 1).sum())
        if len(target_X):
            column_TB = np.searchsorted(drawn.item_C, part.item_P[at_TB[:-1]])
            steps = Steps(
                *(
                    torch.from_numpy(column).to(device)
                    for column in (
                        column_TB,
                        part.event_P[at_TB[:-1]],
                        part.gap_P[at_TB[:-1]],
                        part.hours(at_TB[:-1]),
                    )
                )
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                x_TBD = functional.embedding(steps.item_TB, vectors.step_XD)
                seen_TB = steps.item_TB
                if masked:
                    hidden_TB = torch.from_numpy(batch.masked_TB[:, own]).to(device)
                    x_TBD = x_TBD.masked_fill(hidden_TB[:, :, None], 0.0)
                    seen_TB = seen_TB.masked_fill(hidden_TB, -1)
                h_TBH = model.hidden(x_TBD, steps, keep_TBD) * keep_TBH
                stepped = _Stepped(part, vectors, drawn, candidates, weight_P, seen_TB, h_TBH)
                h_XH, loss = _asked(model, stepped, mine_TB, target_X, "click")
                mean = loss / num
                if model.buy is not None and not masked:
                    bought_TB, bought_at_TB = next_purchases(part, batch)
                    bought_TB, at_TB = bought_TB[:, own], bought_at_TB[:, own]
                    if bought_TB.any():
                        bought_X = at_TB[bought_TB]
                        bought = _asked(model, stepped, bought_TB, bought_X, "purchase")[1]
                        mean = mean + settings.purchase_weight * bought / num
            if guide is not None:
                mean = mean + guide(model, h_XH, part, target_X) * (len(target_X) / num)
            mean.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        count += num
        gradients = run.optimiser.gradients(rows)
        peers.add_up(gradients)
        run.optimiser.step(rows, gradients, rate_at(run.step))
        run.step += 1
        on_batch(done / steps_all)
    peers.add_up([total])
    per_prediction = float(total) / max(count, 1)
    if not math.isfinite(per_prediction):
        raise ContractError(
            f"training: the loss became {per_prediction}; lower the learning rate "
            f"(now {settings.learning_rate:g})",
            reason="non-finite",
        )
    return per_prediction


class _Stepped(NamedTuple):
    """A batch whose states are there."""

    part: Sequences
    vectors: Vectors
    drawn: Drawn
    candidates: Candidates
    weight_P: F32 | None
    seen_TB: torch.Tensor
    h_TBH: torch.Tensor


def _asked(
    model: Recommender, stepped: _Stepped, predicts_TB: Mask, target_X: I64, head: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict something, and the summed loss of what the head makes of them."""
    part, vectors, drawn, candidates, weight_P, seen_TB, h_TBH = stepped
    device = h_TBH.device
    at_TB = torch.from_numpy(predicts_TB).to(device)
    h_XH = h_TBH[at_TB]
    step_X, column_X = at_TB.nonzero(as_tuple=True)
    scored = Scored(
        model.query(h_XH, model.past(vectors.step_XD, seen_TB, step_X + 1, column_X), head),
        vectors.item_XD,
        vectors.bias_X,
        torch.from_numpy(np.searchsorted(drawn.item_C, part.item_P[target_X])).to(device),
        torch.from_numpy(drawn.log_inclusion_C).to(device),
        candidates.num_clicked,
        None if weight_P is None else torch.from_numpy(weight_P[target_X]).to(device),
    )
    return h_XH, next_item_loss(scored, model.settings)


def _is_half(settings: TrainingSettings, device: torch.device) -> bool:
    if settings.precision != "auto":
        return settings.precision == "bf16"
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # nowhere public


def _last_passes(
    run: _Run,
    everything: Sequences,
    settings: TrainingSettings,
    on_batch: Callable[[float], None],
) -> Iterator[float]:
    """Learn from all data, the newest included, from the best epoch on; yields each loss."""
    start = settings.learning_rate * settings.final_rate
    run.optimiser = Optimiser(run.model, settings)
    run.step = 0
    steps = int((windows(everything, settings.history)[1] - 1).sum()) / settings.batch_events
    total = max(1.0, settings.final_epochs * steps)
    for number in range(1, settings.final_epochs + 1):
        yield _epoch(
            run,
            everything,
            settings,
            seed=FINAL + number,
            rate_at=lambda step: start * max(1e-3, 1 - step / total),
            on_batch=on_batch,
        )


def _passes_again(
    run: _Run,
    num_epochs: int,
    everything: Sequences,
    settings: TrainingSettings,
    guide: Guide | None,
    on_batch: Callable[[float], None],
) -> Iterator[float]:
    """Learn from all data as the best epoch's weights came about; yields each loss."""
    for number in range(1, num_epochs + 1):
        yield _epoch(
            run,
            everything,
            settings,
            seed=FINAL + number,
            rate_at=one_cycle(settings, run.total_steps),
            masked=number <= settings.masked_epochs,
            guide=guide,
            on_batch=on_batch,
        )


def _exhausted(run: _Run, settings: TrainingSettings, held: Held | None) -> bool:
    return held is not None and len(run.curve) - run.best_epoch >= settings.patience


def _fingerprint(
    train: Sequences,
    held: Held | None,
    num_items: int,
    settings: TrainingSettings,
    content: Content | None,
) -> str:
    """Names settings and data; a constant rate leaves the number of epochs open."""
    if settings.rate_schedule == "constant":
        settings = msgspec.structs.replace(settings, epochs=1)
    digest = hashlib.sha256(msgspec.json.encode(settings))
    digest.update(str(num_items).encode())
    for part in (train, *(() if held is None else (held.sequences,))):
        for column in (part.start_S1, part.item_P, part.event_P, part.gap_P, part.hours()):
            digest.update(column.tobytes())
    for array in () if content is None else content:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _save(run: _Run, checkpoint: Path, name: str) -> None:
    """Replace the checkpoint in one step, so that a crash leaves the one before."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    fresh = checkpoint.with_suffix(".new")
    torch.save({"fingerprint": name, **run.dump()}, fresh)
    fresh.replace(checkpoint)


def _restore(run: _Run, checkpoint: Path, name: str) -> None:
    if not zipfile.is_zipfile(checkpoint):  # torch would take it for its oldest format
        raise ConfigError(f"checkpoint {checkpoint}: cannot be read; train without --resume")
    try:
        data = torch.load(checkpoint, weights_only=True, map_location=run.model.bias.device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"checkpoint {checkpoint}: cannot be read: {error}; train without --resume"
        ) from error
    if data.get("fingerprint") != name:
        raise ConfigError(
            f"checkpoint {checkpoint}: belongs to other settings or other data; repeat the command "
            "that wrote it, or train without --resume"
        )
    run.load(data)
