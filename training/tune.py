"""Search for training settings: optuna proposes, `fit` trains, the validation part judges.

Judged is what a release would list: the blend on top of the trial's model where there is one, for
what repeats and transitions know anyway a model need not be good at. A study is a folder:
`study.sqlite` (every trial; a study that was cut off goes on there), `best.toml` (what `afterclick
train --config` reads) and two pictures. Knows no command line and exports nothing.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import optuna
from optuna.trial import TrialState

from afterclick.serving.errors import ConfigError, ContractError
from afterclick.serving.settings import ServingSettings
from afterclick.training.blended import blend_of
from afterclick.training.fit import Epoch, fit
from afterclick.training.prepare import Data, prepare, settled
from afterclick.training.progress import Silent
from afterclick.training.search_space import (
    DEFAULT_SPACE,
    Space,
    Value,
    check_space,
    grid_values,
    holds,
    suggest,
    widened,
    with_values,
)
from afterclick.training.settings import TrainingSettings
from afterclick.training.sources import Source

Method = Literal["tpe", "grid", "random"]
Metric = Literal["mrr_20", "hit_rate_20"]

STUDY_NAME = "study.sqlite"
BEST_NAME = "best.toml"

START_TRIALS = 5
"""Trials before the first is pruned, and before TPE stops drawing at random: a median of fewer says
nothing.
"""

log = logging.getLogger(__name__)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a study knows by now; the last line of `afterclick tune --json`."""

    metric: str
    value: float
    """Of the best trial, as a fraction."""
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


def tune(
    source: Source,
    base: TrainingSettings,
    serving: ServingSettings,
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

    The first trial has the settings of `base`, where the space holds them (not in a grid).

    Args:
        source: clicks and items.
        base: settings that the space does not name.
        serving: rules of the fold.
        folder: of the study; one that is there already is gone on with.
        space: what is searched; None takes `DEFAULT_SPACE`, and what `base` has beside it.
        method: of choosing the next trial; a `grid` ends by itself.
        metric: made as large as possible: of the blend on the newest fifth of what it is fitted
            on, or, without a blend, of the model's best epoch on the validation part.
        trials: finished ones that the study shall hold in all, pruned ones included.
        minutes: begin no trial after so many.
        prune: give a trial up after an epoch that lies below the median of the others' at the same
            tenth of their schedules: a long one has higher rates at its second epoch than a short
            one. Where a blend is judged, the hit rate of the model decides, which comes nearest.
        command: named in the file of the best settings.
        tell: given a line per trial.

    Raises:
        ConfigError: the space is not one, or the folder holds a study of something else.
        ContractError: nothing to learn from, no validation part, or no trial succeeded.
    """
    started_s = time.monotonic()
    if space is not None:
        check_space(space, base)
    data = prepare(source, base, serving)
    if data.held is None:
        raise ContractError(
            "tune: nothing is held out, so no trial can be judged; set validation above 0 or bring "
            "more clicks",
            reason="no-validation",
        )
    begin = settled(data, base)
    if space is None:
        space = widened(DEFAULT_SPACE, {name: getattr(begin, name) for name in DEFAULT_SPACE})
        check_space(space, base)
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(folder, _fingerprint(data, base, space, metric), base.seed, space, method, prune)
    for cut_off in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)

    if method != "grid" and not study.get_trials(deepcopy=False):
        given = {name: getattr(begin, name) for name in space}
        if all(holds(space[name], value) for name, value in given.items()):
            study.enqueue_trial(given)

    def objective(trial: optuna.Trial) -> float:
        drawn = {name: suggest(trial, name, space[name]) for name in space}
        settings = settled(data, with_values(base, drawn))

        def on_epoch(epoch: Epoch) -> None:
            tenth, before = (10 * at // settings.epochs for at in (epoch.epoch, epoch.epoch - 1))
            if tenth > before:
                trial.report(_value(epoch, metric if base.blend == "off" else "hit_rate_20"), tenth)
                if trial.should_prune():
                    raise optuna.TrialPruned

        fitted = fit(
            data.train,
            data.held,
            len(data.item_ids),
            settings,
            content=data.content,
            on_epoch=on_epoch,
        )
        trial.set_user_attr("best_epoch", fitted.best_epoch)
        trial.set_user_attr("model", fitted.validation)
        blend = blend_of(source, data, fitted, settings, serving, Silent())
        if blend is None:
            return max(_value(epoch, metric) for epoch in fitted.curve)
        trial.set_user_attr("blend", blend.judged)
        served = ("blend",) if base.blend == "on" else ("blend", "model_judged")
        return max(blend.judged[row][metric] for row in served)

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        complete = trial.state == TrialState.COMPLETE
        # A pruned trial's value is what it was pruned by: where a blend counts, the model's hits.
        value = f" {metric} {100 * trial.value:.2f}" if complete and trial.value is not None else ""
        tell(f"trial {trial.number}: {trial.state.name.lower()}{value} {trial.params}")
        if complete:
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
        optuna.pruners.MedianPruner(n_startup_trials=START_TRIALS, n_warmup_steps=2)
        if prune
        else optuna.pruners.NopPruner()
    )
    return study


def _value(epoch: Epoch, metric: Metric) -> float:
    found = epoch.mrr_20 if metric == "mrr_20" else epoch.hit_rate_20
    assert found is not None, "there is a validation part"
    return found


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
    chosen = msgspec.structs.asdict(with_values(base, best.params))
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
