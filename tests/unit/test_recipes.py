"""Recipes: settings that `train --config` takes as they are, under a head with the command."""

import itertools
from pathlib import Path

import pytest

from afterclick.training.settings import training_settings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_by_train_and_names_its_command(recipe: Path) -> None:
    """A setting that was renamed would otherwise be found by whoever repeats the figure."""
    training_settings({}, recipe, {})
    lines = recipe.read_text(encoding="utf-8").splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert "afterclick " in head, "the command"


def test_there_are_recipes() -> None:
    """An empty folder would pass every test above."""
    assert RECIPES
