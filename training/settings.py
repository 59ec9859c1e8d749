"""What a training run is told once: model, data split, optimiser.

Read from `AFTERCLICK_TRAINING__*`, a TOML file and flags, the later ones winning, by the verb
`train` alone; nothing below reads the environment.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from afterclick.serving.errors import ConfigError
from afterclick.serving.settings import from_environment

EPOCH_STEPS = 200
"""Mini-batches of an epoch, where nothing else is asked for."""

RETRAIN_SHARE = 0.05


class TrainingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one training run; together with the data they decide the release."""

    cell: Literal["lstm", "gru", "rnn", "attention"] = "lstm"
    """Recurrent cell. An LSTM keeps two states per layer and user, a GRU one. `rnn` and `attention`
    (causal self-attention) are for comparison: they are trained and evaluated, and not exported.
    """

    layers: Annotated[int, Meta(ge=1, le=8)] = 1
    """Recurrent layers; each adds its states to every user record."""

    units: Annotated[int, Meta(ge=4, le=1024)] = 128
    """Hidden units of a layer."""

    state_dtype: Literal["fp32", "fp16"] = "fp32"
    """What workers round a user's states to after every step, and keep in the record. `fp16` makes
    a record of 128 units 512 bytes smaller and a rebuild slower; what it costs in accuracy is in
    docs/performance.md. Training itself does not round.
    """

    dim: Annotated[int, Meta(ge=4, le=1024)] = 128
    """Length of an item's vector, shared by the input and the output of the model."""

    loss: Literal["cosine", "softmax", "bpr-max", "bce"] = "cosine"
    """`cosine`: cross-entropy over cosines times a learned scale; `softmax`: over plain dot
    products; `bpr-max`: rank above the hardest of the scored items; `bce`: binary, calibrated.
    docs/model.md compares them.
    """

    purchase_weight: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """Weight of a second task beside the next item: the next item bought, by events of the kind
    `purchase`. The release then has a head `purchase`; 0 leaves it out.
    """

    scale: Annotated[float, Meta(gt=0, le=100)] = 14.0
    """Where the learned scale of the cosine starts."""

    softmax_items: Annotated[int, Meta(ge=16)] = 4096
    """Items scored per mini-batch. A larger catalogue is sampled: its most frequent items always,
    the others by chance and corrected by their log inclusion probability.
    """

    event_vectors: bool = True
    """Learn a vector for each kind of event and add it to the item's."""

    gap_vectors: bool = True
    """Learn a vector for each bucket of the time since the interaction before."""

    hour_vectors: bool = False
    """Learn a vector for each hour of the day (UTC) and add it to the item's."""

    past: Annotated[int, Meta(ge=0, le=64)] = 0
    """Let the query attend to so many of the last interactions, too; they stand in the record
    anyway. 0 for none: docs/model.md says what it brought.
    """

    content: bool = True
    """Learn from what items say about themselves, too: title, text, categories, domain, a given
    vector; then a new item is scored from them the moment it arrives. Without effect where the
    catalogue says nothing.
    """

    content_buckets: Annotated[int, Meta(ge=16, le=1 << 24)] = 1 << 18
    """Words, their pairs, categories and domains are hashed into so many buckets. Only those that
    training meets cost memory, so more of them only mean fewer collisions.
    """

    id_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Share of a batch's items that have to do without a vector of their own."""

    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.25
    """Share of the step vector's entries dropped in training; also between layers."""

    dropout_hidden: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    """Share of the hidden state's entries dropped before it is compared with items."""

    epochs: Annotated[int, Meta(ge=1, le=1000)] = 8
    """Passes over the training part at most."""

    final_epochs: Annotated[int, Meta(ge=0, le=100)] = 1
    """Passes over all data, validation part included, after the best epoch: the newest clicks are
    the most valuable ones. The validation figures are those from before.
    """

    final_rate: Annotated[float, Meta(gt=0, le=1)] = 0.25
    """Learning rate at the start of these last passes, as a share of `learning_rate`."""

    retrain: Literal["auto", "on", "off"] = "auto"
    """Instead of these last passes train once more from the beginning, on all data, for as many
    epochs as the best one. It costs as much again; where new items appear all the time, it is worth
    it: one pass is too few for what only the validation part holds. `auto` is on where at least 5%
    of the validation predictions ask for items that the training part knows nothing of, unless the
    run started warm.
    """

    masked_epochs: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Warm-up without a next item: in so many of the epochs, the first ones, a fifth of the items
    is hidden, and the state one step later has to name them.
    """

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the products in training; sums, weights and evaluation stay fp32. `auto` is bf16 where the
    CPU has AMX, else fp32.
    """

    batch_events: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    """Next-item predictions per mini-batch, about. 0 takes a 200th of the training part's events,
    between 128 and 1,024: a short log needs its steps, too.
    """

    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 4e-3
    """Peak learning rate of AdamW."""

    rate_schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """`one-cycle` warms up for a tenth of the run and falls to zero at its end; a run with
    `constant` may be resumed with more epochs.
    """

    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 1e-4
    """Weight decay of AdamW; item biases and the scale are left out."""

    clip: Annotated[float, Meta(gt=0)] = 1.0
    """Largest norm of a gradient; a longer one is shortened."""

    patience: Annotated[int, Meta(ge=1)] = 2
    """Epochs without a better validation MRR@20 after which training stops."""

    validation: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    """Newest share of the data held out to choose the epoch; 0 trains every epoch on all of it."""

    split: Literal["auto", "events", "sequences", "tails"] = "auto"
    """Hold out the newest events, whole sequences that started last, or the newest events of each
    sequence (`tails`: as leave-one-out asks; one at least). `auto` takes events where there are
    times and most of the newest events are of users who were there before.
    """

    validation_events_max: Annotated[int, Meta(ge=100)] = 20_000
    """Validation predictions scored per epoch at most; the newest are kept."""

    history: Annotated[int, Meta(ge=2, le=1000)] = 50
    """Longest stretch of a sequence that the model learns from at once; workers keep as many
    interactions (`AFTERCLICK_SERVING__HISTORY`).
    """

    recency_half_life_h: Annotated[float, Meta(ge=0)] = 0.0
    """Hours of event time after which a click counts half in the loss; 0 weighs all alike. Where
    nothing has a time it has no effect.
    """

    warm_start: bool = False
    """Begin with the weights of the published release, by item id, where the run that made it left
    them beside the releases; otherwise by chance.
    """

    warm_epochs: Annotated[int, Meta(ge=1, le=1000)] = 2
    """Passes over the training part at most after a warm start; their peak rate is `final_rate` of
    `learning_rate`.
    """

    item_min_count: Annotated[int, Meta(ge=1)] = 1
    """Items with fewer clicks are treated as never clicked."""

    blend: Literal["auto", "on", "off"] = "auto"
    """Fit a blend of the model with neighbours, transitions, repeats and popularity on the
    validation part, and ship it. `auto` leaves it out where it does not beat the model alone.
    """

    blend_memory: Literal["auto", "frozen", "live"] = "auto"
    """The memory that the blend is fitted with. `frozen`: that of the training part, asked about
    the validation part. `live`: one that takes clicks in as time goes on, asked about the newest
    `blend_events_max`. `auto` is live where clicks come from a topic, and in live evaluation.
    """

    blend_events_max: Annotated[int, Meta(ge=200)] = 50_000
    """Predictions that the blend is fitted on where the memory is live, in at most 70% of the log;
    they are answered by a model of what came before them, which goes on learning in between. Up to
    the validation part's size that is the run's own; beyond, another one is trained for it.
    """

    blend_units: Annotated[int, Meta(ge=1, le=1024)] = 64
    """Units of the blend's first hidden layer; the second has half of them."""

    blend_epochs: Annotated[int, Meta(ge=1, le=100)] = 8
    """Passes of the blend over its predictions."""

    blend_decay: Annotated[float, Meta(ge=0, le=1)] = 1e-2
    """Weight decay of the blend."""

    blend_sessions: Annotated[int, Meta(ge=0, le=10_000)] = 256
    """Newest past sessions that are looked at for an item of the user's, and kept in a release."""

    blend_ablations: bool = False
    """Fit the blend without neighbours, transitions, repeats and popularity, too, for the tables;
    without the model it is always fitted.
    """

    seed: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    """Same seed, settings, data, threads and machine: same loss curve."""

    threads: Annotated[int, Meta(ge=0, le=256)] = 1
    """Threads of torch; 0 means one per core. Threads that wait for each other suffer where other
    processes take the cores: on two busy ones an epoch took 4 s with one thread, 30 s with two.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where torch computes; `cuda` fails without a GPU."""

    def __post_init__(self) -> None:
        if self.state_dtype == "fp16" and self.units % 2:
            raise ValueError(f"state_dtype fp16 needs an even number of units, got {self.units}")

    @property
    def all_epochs(self) -> int:
        """Passes over all data, validation part included, at most."""
        return self.epochs if self.retrain == "on" else self.final_epochs

    def settled(self, num_events: int, share_unknown: float) -> "TrainingSettings":
        """With what the data decides where nobody else did.

        Args:
            num_events: of the training part.
            share_unknown: of the validation predictions, on items that the training part knows
                nothing of.
        """
        retrain = self.retrain
        if retrain == "auto":
            retrain = "on" if share_unknown >= RETRAIN_SHARE else "off"
        batch_events = self.batch_events or min(max(num_events // EPOCH_STEPS, 128), 1024)
        return msgspec.structs.replace(self, retrain=retrain, batch_events=batch_events)


def training_settings(
    environ: Mapping[str, str], config: Path | None, flags: Mapping[str, Any]
) -> TrainingSettings:
    """Join the three sources: environment, then the file, then the flags that were given.

    Raises:
        ConfigError: an unknown name, a value out of its range, or a file that cannot be read.
    """
    settings = from_environment(TrainingSettings, "TRAINING", environ)
    given: dict[str, Any] = {}
    if config is not None:
        try:
            given.update(tomllib.loads(config.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--config {config}: {error}") from error
    given.update({name: value for name, value in flags.items() if value is not None})
    try:
        return msgspec.convert({**msgspec.structs.asdict(settings), **given}, TrainingSettings)
    except msgspec.ValidationError as error:
        where = f"--config {config}" if config is not None else "training settings"
        raise ConfigError(f"{where}: {error}") from error
