"""Search for training settings: optuna proposes, `fit` trains, the validation part judges.

A study is a folder: `study.sqlite` (every trial; a study that was cut off goes on there),
`best.toml` (what `afterclick train --config` reads) and two pictures. What is held out, and so what
is judged, is the same for every trial; settings that would change it cannot be searched. Knows no
command line and exports nothing.
"""

import hashlib
import logging
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import optuna
from msgspec import Meta
from optuna.trial import TrialState

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.training.fit import Epoch, fit
from afterclick.training.pipeline import Data
from afterclick.training.settings import TrainingSettings

Method = Literal["tpe", "grid", "random"]
Metric = Literal["mrr_20", "hit_rate_20"]
Value = str | int | float | bool

STUDY_NAME = "study.sqlite"
BEST_NAME = "best.toml"

UNTUNABLE = frozenset({
    "validation", "split", "validation_events_max", "item_min_count", "seed", "threads", "device",
})  # fmt: skip
"""They change what is held out, or are the machine's."""

START_TRIALS = 5
"""Trials before the first is pruned, and before TPE stops drawing at random: a median of fewer says
nothing.
"""

log = logging.getLogger(__name__)


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers from `low` to `high`; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Drawn by ratio, not by difference."""
    points: Annotated[int, Meta(ge=2, le=100)] = 3
    """Values that a grid takes from it, ends included."""


Space = dict[str, Range | list[Value]]
"""Per setting a range, or the values to choose from."""

DEFAULT_SPACE: Space = {
    "learning_rate": Range(low=1e-3, high=2e-2, log=True),
    "units": [64, 128, 192],
    "dropout": Range(low=0.0, high=0.5),
    "dropout_hidden": Range(low=0.0, high=0.5),
    "scale": Range(low=8.0, high=20.0),
    "batch_events": [512, 1024, 2048],
    "weight_decay": Range(low=1e-6, high=1e-2, log=True),
}
"""What mattered in the probes, around what worked on three data sets."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a study knows by now; the last line of `afterclick tune --json`."""

    metric: str
    value: float
    """Of the best epoch of the best trial, as a fraction."""
    trial: int
    """Its number, from 0."""
    settings: dict[str, Value]
    """The searched ones of the best trial."""
    completed: int
    pruned: int
    failed: int
    config: str
    """Path of the best settings' file."""
    seconds: float


def read_space(path: Path) -> Space:
    """Search space of a TOML file: `name = [values]` or `name = {low = …, high = …, log = …}`.

    Raises:
        ConfigError: it cannot be read, or is no search space.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Space)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"--space {path}: {error}; expected lines like units = [64, 128] or "
            "learning_rate = {low = 0.001, high = 0.02, log = true}"
        ) from error


def check_space(space: Space, base: TrainingSettings) -> None:
    """Try the ends of every range, and every value.

    Raises:
        ConfigError: an unknown setting, one that cannot be searched, or a value that it refuses.
    """
    if not space:
        raise ConfigError("search space: expected at least one setting, got none")
    for name, choice in space.items():
        if name in UNTUNABLE:
            raise ConfigError(
                f"search space: {name!r} decides what is held out or where it is computed, so "
                "trials could not be compared; give it by --config or its flag"
            )
        if isinstance(choice, Range) and not (0 if choice.log else -math.inf) < choice.low:
            raise ConfigError(f"search space: {name}: with log, low must be above 0")
        if isinstance(choice, Range) and not choice.low < choice.high:
            raise ConfigError(f"search space: {name}: low {choice.low} is not below {choice.high}")
        if not isinstance(choice, Range) and not choice:
            raise ConfigError(f"search space: {name}: expected at least one value")
        for value in grid_values(choice):
            _with(base, {name: value})


def tune(
    data: Data,
    base: TrainingSettings,
    folder: Path,
    *,
    space: Space | None = None,
    method: Method = "tpe",
    metric: Metric = "mrr_20",
    trials: int = 20,
    minutes: float | None = None,
    prune: bool = True,
    command: str = "afterclick tune",
    tell: Callable[[str], None] = lambda line: None,
) -> Found:
    """Run trials until there are so many, and write the best settings after each.

    Args:
        data: what `pipeline.prepare` made under `base`; a validation part is needed.
        base: settings that the space does not name.
        folder: of the study; one that is there already is gone on with.
        space: what is searched; None takes `DEFAULT_SPACE`.
        method: of choosing the next trial; a `grid` ends by itself.
        metric: of the validation part, which is made as large as possible.
        trials: finished ones that the study shall hold in all, pruned ones included.
        minutes: begin no trial after so many.
        prune: give a trial up after an epoch that lies below the median of the others' there.
        command: named in the file of the best settings.
        tell: given a line per trial.

    Raises:
        ConfigError: the space is not one, or the folder holds a study of something else.
        ContractError: there is no validation part, or no trial succeeded.
    """
    started_s = time.monotonic()
    space = DEFAULT_SPACE if space is None else space
    check_space(space, base)
    if data.held is None:
        raise ContractError(
            "tune: nothing is held out, so no trial can be judged; set validation above 0 or bring "
            "more clicks",
            reason="no-validation",
        )
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(folder, _fingerprint(data, base, space, metric), base.seed, space, method, prune)
    for cut_off in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)

    def objective(trial: optuna.Trial) -> float:
        settings = _with(base, {name: _suggest(trial, name, space[name]) for name in space})

        def on_epoch(epoch: Epoch) -> None:
            trial.report(_value(epoch, metric), epoch.epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        fitted = fit(data.train, data.held, len(data.item_ids), settings, on_epoch=on_epoch)
        trial.set_user_attr("best_epoch", fitted.best_epoch)
        return max(_value(epoch, metric) for epoch in fitted.curve)

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        value = "" if trial.value is None else f" {metric} {100 * trial.value:.2f}"
        tell(f"trial {trial.number}: {trial.state.name.lower()}{value} {trial.params}")
        if trial.state == TrialState.COMPLETE:
            _write_best(folder / BEST_NAME, study, base, metric, command)

    left = trials - len(_finished(study))
    if left > 0:
        study.optimize(
            objective,
            n_trials=left,
            timeout=None if minutes is None else minutes * 60,
            catch=(ContractError, RuntimeError),  # a rate that diverges is a bad trial, not the end
            callbacks=[after],
        )
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise ContractError(
            f"tune: no trial of {folder} succeeded; try a lower learning_rate", reason="no-trial"
        )
    _write_best(folder / BEST_NAME, study, base, metric, command)
    _draw(folder, study, metric)
    count = dict.fromkeys(TrialState, 0)
    for trial in study.get_trials(deepcopy=False):
        count[trial.state] += 1
    return Found(
        metric=metric,
        value=study.best_value,
        trial=study.best_trial.number,
        settings=study.best_params,
        completed=count[TrialState.COMPLETE],
        pruned=count[TrialState.PRUNED],
        failed=count[TrialState.FAIL],
        config=str(folder / BEST_NAME),
        seconds=round(time.monotonic() - started_s, 1),
    )


def describe(found: Found) -> str:
    """The best trial for people."""
    lines = [
        f"{found.completed} trials, {found.pruned} pruned, {found.failed} failed, "
        f"{found.seconds:.0f} s; best is {found.trial}: {found.metric} {100 * found.value:.2f}"
    ]
    lines += [f"  {name:<16} {value:.6g}" if isinstance(value, float) else f"  {name:<16} {value}"
              for name, value in found.settings.items()]  # fmt: skip
    return "\n".join([*lines, f"afterclick train --config {found.config}"]) + "\n"


def grid_values(choice: Range | Sequence[Value]) -> list[Value]:
    """What a grid takes: every value, or a range's `points`."""
    if not isinstance(choice, Range):
        return list(choice)
    ends = [choice.low, choice.high]
    low, high = (math.log(end) for end in ends) if choice.log else ends
    inner = [low + (high - low) * at / (choice.points - 1) for at in range(1, choice.points - 1)]
    values = [ends[0], *(math.exp(at) if choice.log else at for at in inner), ends[1]]
    if all(isinstance(end, int) for end in ends):
        return sorted({round(value) for value in values})
    return [float(value) for value in values]


def toml_of(settings: Mapping[str, Any]) -> str:
    """Settings as TOML lines; only numbers, strings and truth values occur."""
    return "".join(f"{name} = {msgspec.json.encode(value).decode()}\n"
                   for name, value in settings.items())  # fmt: skip


def _study(
    folder: Path, fingerprint: str, seed: int, space: Space, method: Method, prune: bool
) -> optuna.Study:
    assert method in get_args(Method)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / STUDY_NAME
    begun = 0
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        study = optuna.create_study(
            study_name="tune", storage=storage, direction="maximize", load_if_exists=True
        )
        known = study.user_attrs.get("fingerprint")
        begun = len(study.get_trials(deepcopy=False))
    except Exception as error:  # optuna and sqlalchemy raise kinds of their own
        raise ConfigError(f"{path}: is no study: {error}; name another folder") from error
    if known not in (None, fingerprint):
        raise ConfigError(
            f"{path}: a study of other data, settings, search space or metric; name another folder"
        )
    study.set_user_attr("fingerprint", fingerprint)
    # Not the draws of the run that was cut off once more.
    seed += begun
    if method == "grid":
        grid = {name: grid_values(choice) for name, choice in space.items()}
        study.sampler = optuna.samplers.GridSampler(grid, seed=seed)
    elif method == "random":
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=START_TRIALS)
    study.pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=START_TRIALS, n_warmup_steps=1)
        if prune
        else optuna.pruners.NopPruner()
    )
    return study


def _value(epoch: Epoch, metric: Metric) -> float:
    found = epoch.mrr_20 if metric == "mrr_20" else epoch.hit_rate_20
    assert found is not None, "there is a validation part"
    return found


def _suggest(trial: optuna.Trial, name: str, choice: Range | Sequence[Value]) -> Value:
    if not isinstance(choice, Range):
        chosen = trial.suggest_categorical(name, list(choice))
        assert chosen is not None, "None is no choice"
        return chosen
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)


def _with(base: TrainingSettings, given: Mapping[str, Value]) -> TrainingSettings:
    try:
        return msgspec.convert({**msgspec.structs.asdict(base), **given}, TrainingSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"search space: {dict(given)}: {error}") from error


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _fingerprint(data: Data, base: TrainingSettings, space: Space, metric: str) -> str:
    assert data.held is not None
    digest = hashlib.sha256(msgspec.json.encode([base, space, metric, data.item_ids]))
    for part in (data.train, data.held.sequences):
        digest.update(part.start_S1.tobytes() + part.item_P.tobytes())
    return digest.hexdigest()


def _write_best(
    path: Path, study: optuna.Study, base: TrainingSettings, metric: str, command: str
) -> None:
    """Replace the file whole: a study may be cut off at any time."""
    best, defaults = study.best_trial, msgspec.structs.asdict(TrainingSettings())
    chosen = msgspec.structs.asdict(_with(base, best.params))
    told = {name: value for name, value in chosen.items() if value != defaults[name]}
    seconds = sum(t.duration.total_seconds() for t in study.get_trials(deepcopy=False)
                  if t.duration is not None)  # fmt: skip
    head = (
        f"# {command}\n# Best of {len(_finished(study))} trials, number {best.number}: "
        f"{metric} {100 * study.best_value:.2f}% on the validation part, epoch "
        f"{best.user_attrs.get('best_epoch', '?')}; {seconds / 60:.1f} minutes in all.\n"
    )
    fresh = path.with_suffix(".new")
    fresh.write_text(head + toml_of(told), encoding="utf-8")
    fresh.replace(path)


def _draw(folder: Path, study: optuna.Study, metric: str) -> None:
    """`history.png`: trials and the best so far; `settings.png`: the metric over every setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = [100 * trial.value for trial in done if trial.value is not None]
    numbers = [trial.number for trial in done]
    best = [max(values[: at + 1]) for at in range(len(values))]
    names = sorted({name for trial in done for name in trial.params})
    history, settings = (
        Figure(figsize=(7, 4), layout="constrained"),
        Figure(figsize=(3.2 * len(names), 3.4), layout="constrained"),
    )
    for figure in (history, settings):
        FigureCanvasAgg(figure)
    axes = history.subplots()
    axes.plot(numbers, values, "o", color="0.55", label="trial")
    axes.step(numbers, best, where="post", color="black", label="best so far")
    axes.set_xlabel("trial")
    axes.set_title(f"{metric}, %, held out", loc="left")
    axes.legend(frameon=False)
    for name, panel in zip(names, settings.subplots(1, len(names), squeeze=False)[0], strict=True):
        panel.plot([trial.params[name] for trial in done], values, "o", color="black")
        panel.set_xlabel(name)
        if name in ("learning_rate", "weight_decay"):
            panel.set_xscale("log")
    for figure, name in ((history, "history.png"), (settings, "settings.png")):
        for panel in figure.axes:
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / name, format="png")
