"""Small inputs for the trainer's tests: columns of clicks, and settings that train in a second."""

from typing import Any

import numpy as np

from afterclick.training.data import Columns
from afterclick.training.settings import TrainingSettings


def columns(*clicks: tuple[Any, ...], timed: bool = True) -> Columns:
    """Clicks as (user, item, time_ms[, event[, event_id]])."""

    def objects(values: list[Any]) -> Any:
        array = np.empty(len(values), object)
        array[:] = values
        return array

    full = [(*click, *("click", None)[len(click) - 3 :]) for click in clicks]
    users, items, times, events, ids = (list(column) for column in zip(*full, strict=True))
    return Columns(
        objects(users),
        objects(items),
        objects(events),
        np.array(times, np.int64) if timed else None,
        objects(ids) if any(ids) else None,
    )


def ring(num_users: int = 120, length: int = 12, num_items: int = 40, seed: int = 0) -> Columns:
    """Users who mostly click the item after the last one: what comes next can be learnt."""
    rng = np.random.default_rng(seed)
    clicks = []
    for user in range(num_users):
        item = int(rng.integers(num_items))
        for step in range(length):
            clicks.append(
                (f"u{user}", f"i{item:03d}", 1_700_000_000_000 + user * 60_000 + step * 7)
            )
            item = (item + 1) % num_items if rng.random() < 0.9 else int(rng.integers(num_items))
    return columns(*sorted(clicks, key=lambda click: click[2]))


def quick(**given: Any) -> TrainingSettings:
    """Settings for a model of a few thousand weights on one thread."""
    return TrainingSettings(
        **{
            "units": 16,
            "dim": 16,
            "epochs": 4,
            "batch_events": 128,
            "learning_rate": 0.02,
            "threads": 1,
            "device": "cpu",
            "patience": 10,
            "split": "sequences",
            **given,
        }
    )
