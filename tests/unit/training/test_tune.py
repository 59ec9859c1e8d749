"""A study finds, prunes, goes on where it was cut off, and leaves a file that `train` reads."""

import tomllib
from pathlib import Path
from typing import Any

import optuna
import pytest

from afterclick.serving.errors import ConfigError
from afterclick.serving.settings import ServingSettings
from afterclick.training.pipeline import Data, prepare
from afterclick.training.settings import TrainingSettings, training_settings
from afterclick.training.sources import source_of
from afterclick.training.tune import Found, Range, Space, check_space, grid_values, read_space, tune
from tests.unit.training.worlds import quick, ring

RATES: Space = {"learning_rate": [1e-5, 0.02]}
"""One that learns nothing in two epochs, and one that learns the ring."""


def small(**given: Any) -> TrainingSettings:
    return quick(**{"units": 8, "dim": 8, "epochs": 2, "batch_events": 64, **given})


@pytest.fixture(scope="module")
def data() -> Data:
    source = source_of("ring", ring(num_users=40, num_items=12), None, None)  # type: ignore[arg-type]
    return prepare(source, small(), ServingSettings())


def study(data: Data, folder: Path, **given: Any) -> Found:
    return tune(data, small(), folder, **{"space": RATES, "method": "grid", **given})


def test_the_better_setting_is_found_and_train_reads_it(data: Data, tmp_path: Path) -> None:
    """The whole way: trials, file, settings of the next training."""
    found = study(data, tmp_path)

    assert found.settings == {"learning_rate": 0.02}
    assert (found.completed, found.pruned, found.failed) == (2, 0, 0)
    settings = training_settings({}, Path(found.config), {})
    assert settings == small(learning_rate=0.02)
    for name in ("history.png", "settings.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_a_study_that_was_cut_off_goes_on(data: Data, tmp_path: Path) -> None:
    """One trial, then a process that died in the second, then the rest: nothing is done twice."""
    space: Space = {"learning_rate": Range(low=1e-3, high=2e-2, log=True)}
    first = study(data, tmp_path, space=space, method="random", trials=1)
    left = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.sqlite'}")
    left.ask()

    whole = study(data, tmp_path, space=space, method="random", trials=3)

    assert (first.completed, whole.completed, whole.failed) == (1, 3, 1)
    trials = optuna.load_study(
        study_name="tune", storage=f"sqlite:///{tmp_path / 'study.sqlite'}"
    ).trials
    rates = [trial.params["learning_rate"] for trial in trials if trial.params]
    assert len(set(rates)) == 3
    assert study(data, tmp_path, space=space, method="random", trials=3).completed == 3
    with pytest.raises(ConfigError, match="name another folder"):
        study(data, tmp_path)


def test_hopeless_trials_are_given_up_early(data: Data, tmp_path: Path) -> None:
    """After an epoch below the median of five others."""
    space: Space = {"dropout": [0.0, 0.02, 0.04, 0.06, 0.08], "clip": [1.0, 1e-9]}
    base = small(epochs=3)
    tune(data, base, tmp_path, space=space, method="grid", trials=10)

    trials = optuna.load_study(
        study_name="tune", storage=f"sqlite:///{tmp_path / 'study.sqlite'}"
    ).trials
    pruned = [trial for trial in trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert pruned
    assert all(len(trial.intermediate_values) < base.epochs for trial in pruned)


@pytest.mark.parametrize(
    ("space", "word"),
    [
        ({}, "at least one"),
        ({"unitz": [1]}, "unitz"),
        ({"units": [1]}, "units"),
        ({"validation": [0.1, 0.2]}, "held out"),
        ({"dropout": Range(low=0.5, high=0.5)}, "not below"),
        ({"scale": Range(low=0, high=5, log=True)}, "above 0"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space: Space, word: str) -> None:
    """Before the first trial, not in the middle of the night."""
    with pytest.raises(ConfigError, match=word):
        check_space(space, TrainingSettings())


def test_the_space_is_a_small_file(tmp_path: Path) -> None:
    """Values or a range per setting; a misspelt one is named."""
    path = tmp_path / "space.toml"
    path.write_text("units = [64, 128]\nlearning_rate = {low = 0.001, high = 0.1, log = true}\n")

    space = read_space(path)

    assert space["units"] == [64, 128]
    rate = space["learning_rate"]
    assert isinstance(rate, Range)
    assert grid_values(rate) == pytest.approx([0.001, 0.01, 0.1])
    assert grid_values(Range(low=16, high=64, points=4)) == [16, 32, 48, 64]
    path.write_text("units = {lo = 1}\n")
    with pytest.raises(ConfigError, match="lo"):
        read_space(path)


def test_the_file_of_the_best_is_plain_toml(data: Data, tmp_path: Path) -> None:
    """Its head says what made it."""
    found = study(data, tmp_path, command="afterclick tune --clicks x.csv")

    text = Path(found.config).read_text(encoding="utf-8")
    assert text.startswith("# afterclick tune --clicks x.csv\n# Best of 2 trials")
    assert tomllib.loads(text)["learning_rate"] == 0.02
