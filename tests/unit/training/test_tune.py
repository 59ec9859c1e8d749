"""A study finds, prunes, goes on where it was cut off, and leaves a file that `train` reads."""

import tomllib
from pathlib import Path
from typing import Any

import optuna
import pytest

from afterclick.serving.errors import ConfigError
from afterclick.serving.settings import ServingSettings
from afterclick.training.search_space import (
    Range,
    Space,
    check_space,
    grid_values,
    holds,
    read_space,
    widened,
)
from afterclick.training.settings import TrainingSettings, training_settings
from afterclick.training.sources import Source, source_of
from afterclick.training.tune import Found, tune
from tests.unit.training.worlds import quick, ring

RATES: Space = {"learning_rate": [1e-5, 0.02]}
"""One that learns nothing in two epochs, and one that learns the ring."""


def small(**given: Any) -> TrainingSettings:
    return quick(**{"units": 8, "dim": 8, "epochs": 2, "batch_events": 64, **given})


@pytest.fixture(scope="module")
def source() -> Source:
    return source_of("ring", ring(num_users=40, num_items=12))


def study(
    source: Source, folder: Path, base: TrainingSettings | None = None, **given: Any
) -> Found:
    chosen = {"space": RATES, "method": "grid", **given}
    return tune(source, base or small(), ServingSettings(), folder, **chosen)


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(
        study_name="tune", storage=f"sqlite:///{folder / 'study.sqlite'}"
    ).trials


def test_the_better_setting_is_found_and_train_reads_it(source: Source, tmp_path: Path) -> None:
    """The whole way: trials, file, settings of the next training."""
    found = study(source, tmp_path)

    assert found.settings == {"learning_rate": 0.02}
    assert (found.completed, found.pruned, found.failed) == (2, 0, 0)
    settings = training_settings({}, Path(found.config), {})
    assert settings == small(learning_rate=0.02)
    for name in ("history.png", "settings.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_a_study_that_was_cut_off_goes_on(source: Source, tmp_path: Path) -> None:
    """One trial, then a process that died in the second, then the rest: nothing is done twice."""
    space: Space = {"learning_rate": Range(low=1e-3, high=2e-2, log=True)}
    first = study(source, tmp_path, space=space, method="random", trials=1)
    optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'study.sqlite'}").ask()

    whole = study(source, tmp_path, space=space, method="random", trials=3)

    assert (first.completed, whole.completed, whole.failed) == (1, 3, 1)
    rates = [trial.params["learning_rate"] for trial in trials_of(tmp_path) if trial.params]
    assert len(set(rates)) == 3
    assert study(source, tmp_path, space=space, method="random", trials=3).completed == 3
    with pytest.raises(ConfigError, match="name another folder"):
        study(source, tmp_path)


def test_hopeless_trials_are_given_up_early(source: Source, tmp_path: Path) -> None:
    """After an epoch below the median of five others; what was judged then is not the metric."""
    space: Space = {"dropout": [0.0, 0.02, 0.04, 0.06, 0.08], "clip": [1.0, 1e-9]}
    base = small(epochs=3, blend="off")
    told: list[str] = []
    study(source, tmp_path, base, space=space, trials=10, tell=told.append)

    pruned = [
        trial for trial in trials_of(tmp_path) if trial.state == optuna.trial.TrialState.PRUNED
    ]
    assert pruned
    assert all(len(trial.intermediate_values) < base.epochs for trial in pruned)
    assert {"mrr_20" in line for line in told if "pruned" in line} == {False}


def test_schedules_are_compared_at_the_same_share(source: Source, tmp_path: Path) -> None:
    """Two epochs of eight are not the half of four."""
    study(source, tmp_path, small(blend="off"), space={"epochs": [4, 8]}, prune=False)

    steps = {trial.params["epochs"]: [*trial.intermediate_values] for trial in trials_of(tmp_path)}
    assert steps == {4: [2, 5, 7, 10], 8: [1, 2, 3, 5, 6, 7, 8, 10]}


def test_the_blend_is_judged_where_a_release_would_have_one(tmp_path: Path) -> None:
    """Not the model alone: of two models the one is found on which the better blend stands, and
    the file says so. `blend_decay` is nothing to the model, so only the blend can tell them apart.
    """
    source = source_of("ring", ring(num_users=80))
    base = small(validation=0.4, blend="on", blend_epochs=4)
    found = study(source, tmp_path, base, space={"blend_units": [1, 32]}, metric="hit_rate_20")

    trials = trials_of(tmp_path)
    model = [trial.user_attrs["model"]["hit_rate_20"] for trial in trials]
    blend = {trial.params["blend_units"]: trial.value for trial in trials}
    assert model[0] == model[1]
    assert blend[32] != blend[1]
    assert found.value == max(blend.values()) > model[0]
    assert [trial.user_attrs["blend"]["blend"]["hit_rate_20"] for trial in trials] == [
        trial.value for trial in trials
    ]


def test_what_is_given_is_the_first_trial(source: Source, tmp_path: Path) -> None:
    """A study never ends below the settings that it began with, where the space holds them."""
    space: Space = {"learning_rate": Range(low=1e-6, high=2e-2, log=True), "units": [4, 8]}
    study(source, tmp_path / "held", space=space, method="tpe", trials=2)
    study(source, tmp_path / "not", space={**space, "units": [4]}, method="tpe", trials=1)

    first, second = trials_of(tmp_path / "held")
    assert first.params == {"learning_rate": 0.02, "units": 8}
    assert second.params["learning_rate"] != 0.02
    assert trials_of(tmp_path / "not")[0].params["learning_rate"] != 0.02
    assert not holds(Range(low=1, high=2), "lstm")


def test_the_default_space_holds_what_is_given(tmp_path: Path) -> None:
    """The default batch depends on the log (517 on serenade-toy), and no list of sizes holds it: a
    study without `--space` began with a draw by chance, and could end below the defaults.
    """
    base = small(epochs=2, blend="off", learning_rate=0.03)
    source = source_of("ring", ring(num_users=10, num_items=12))
    tune(source, base, ServingSettings(), tmp_path, trials=1)

    first = trials_of(tmp_path)[0].params
    assert {name: first[name] for name in ("units", "epochs", "batch_events", "learning_rate")} == {
        "units": 8,
        "epochs": 2,
        "batch_events": 64,
        "learning_rate": 0.03,
    }


def test_a_space_is_widened_by_what_it_lacks_alone() -> None:
    """Nothing that was there is lost."""
    space: Space = {"epochs": [3, 8], "units": [4, 8], "scale": Range(low=8.0, high=20.0)}
    wide = widened(space, {"epochs": 5, "units": 4, "scale": 25.0})
    assert wide == {"epochs": [3, 5, 8], "units": [4, 8], "scale": Range(low=8.0, high=25.0)}


@pytest.mark.parametrize(
    ("space", "word"),
    [
        ({}, "at least one"),
        ({"unitz": [1]}, "unitz"),
        ({"units": [1]}, "units"),
        ({"validation": [0.1, 0.2]}, "held out"),
        ({"final_epochs": [1, 2]}, "no effect"),
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


def test_the_file_of_the_best_is_plain_toml(source: Source, tmp_path: Path) -> None:
    """Its head says what made it."""
    found = study(source, tmp_path, command="afterclick tune --clicks x.csv")

    text = Path(found.config).read_text(encoding="utf-8")
    assert text.startswith("# afterclick tune --clicks x.csv\n# Best of 2 trials")
    assert tomllib.loads(text)["learning_rate"] == 0.02
