"""What `afterclick tune` may search: a range or a list of values per training setting.

Knows no study and trains nothing; draws one value at optuna's hand.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import optuna
from msgspec import Meta

from afterclick.serving.errors import ConfigError
from afterclick.training.settings import TrainingSettings

Value = str | int | float | bool

UNTUNABLE = frozenset({
    "validation", "split", "validation_events_max", "item_min_count", "content", "content_buckets",
    "blend", "blend_memory", "blend_events_max", "seed", "threads", "device",
})  # fmt: skip
"""They change what is asked or judged, or are the machine's."""

WITHOUT_EFFECT = frozenset({"final_epochs", "final_rate", "retrain", "warm_start", "warm_epochs"})
"""They come after the validation part was judged, or belong to the next release."""


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
    "batch_events": [128, 256, 512, 1024],
    "epochs": [3, 5, 8, 12],
    "weight_decay": Range(low=1e-6, high=1e-2, log=True),
}
"""What mattered in the probes, around what worked on three data sets. A schedule that is stopped
early never gets to its low rates, so the number of epochs is one of them.
"""


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
                f"search space: {name!r} decides what is held out, what is judged or where it is "
                "computed, so trials could not be compared; give it by --config or its flag"
            )
        if name in WITHOUT_EFFECT:
            raise ConfigError(
                f"search space: {name!r} has no effect on the validation part, so every value "
                "would be as good; give it by --config"
            )
        if isinstance(choice, Range) and not (0 if choice.log else -math.inf) < choice.low:
            raise ConfigError(f"search space: {name}: with log, low must be above 0")
        if isinstance(choice, Range) and not choice.low < choice.high:
            raise ConfigError(f"search space: {name}: low {choice.low} is not below {choice.high}")
        if not isinstance(choice, Range) and not choice:
            raise ConfigError(f"search space: {name}: expected at least one value")
        for value in grid_values(choice):
            with_values(base, {name: value})


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


def holds(choice: Range | Sequence[Value], value: Value) -> bool:
    """Whether it is one of the values that may be drawn."""
    if not isinstance(choice, Range):
        return value in choice
    return not isinstance(value, str) and choice.low <= value <= choice.high


def widened(space: Space, given: Mapping[str, Value]) -> Space:
    """The space with what is given in it: lists get one value more, ranges another end."""
    return {name: _with(choice, given[name]) for name, choice in space.items()}


def suggest(trial: optuna.Trial, name: str, choice: Range | Sequence[Value]) -> Value:
    """Draw a value for a trial."""
    if not isinstance(choice, Range):
        chosen = trial.suggest_categorical(name, list(choice))
        assert chosen is not None, "None is no choice"
        return chosen
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)


def with_values(base: TrainingSettings, given: Mapping[str, Value]) -> TrainingSettings:
    """The settings with some replaced.

    Raises:
        ConfigError: a setting refuses its value.
    """
    try:
        return msgspec.convert({**msgspec.structs.asdict(base), **given}, TrainingSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"search space: {dict(given)}: {error}") from error


def _with(choice: Range | list[Value], value: Value) -> Range | list[Value]:
    if holds(choice, value):
        return choice
    if not isinstance(choice, Range):
        return sorted([*choice, value])
    assert not isinstance(value, str), "a range is of numbers"
    low, high = min(choice.low, value), max(choice.high, value)
    return msgspec.structs.replace(choice, low=low, high=high)
