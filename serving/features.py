"""What the blend knows of a candidate: columns of numbers, most of them logarithms.

Every number depends on its own user, the memory and the model alone, never on who else is in the
batch; how each is counted stands in `describing.py`. The trainer fits on exactly these. Shape
letters: R rows (candidates, user after user), F features.
"""

import numpy as np

from afterclick.serving.candidates import Found, Past, Published
from afterclick.serving.describing import AT, describe_all
from afterclick.serving.describing import FEATURES as FEATURES
from afterclick.serving.engine import F32, I32
from afterclick.serving.memory import Memory

_HEATS = ("heat_30m", "heat_2h", "heat_6h", "heat_24h", "heat_72h", "heat_moves")

MODEL_FEATURES = ("model", "model_rank")
NEIGHBOUR_FEATURES = ("near", "near_share")
REACH_FEATURES = ("reach", "reach_day")
"""What came within three steps after any of the last items, and of that what is a day old or less:
for streams whose items change by the hour; elsewhere the neighbours say as much.
"""
TRANSITION_FEATURES = (
    *("next", "next_new", "skip", "older", "back", "pair", "next_day"),
    *REACH_FEATURES,
)
REPEAT_FEATURES = ("is_last", "is_second", "is_third", "is_older", "times")
POPULARITY_FEATURES = ("popular", *_HEATS, "untouched", "age")
PUBLICATION_FEATURES = ("published", "published_gap", "newer", "unclicked")
"""By the catalogue: since when, against the user's last item, and how many came out since."""

CONTEXT_FEATURES = ("length", "clicks", "last_count", "pair_count", "repeats", "idle")
"""Of the user alone: what the others are worth depends on them."""

TIMED = frozenset(
    {"next_day", *REACH_FEATURES, *_HEATS[:-1], "untouched", "age", "idle", *PUBLICATION_FEATURES}
)
"""These say nothing where a log has no times."""

_LOGARITHMS = (
    *("model_rank", "near", "near_share", *TRANSITION_FEATURES),
    *("times", "popular", "untouched", "age", "published", "newer"),
)
"""Columns whose logarithm is the feature: all taken together, in single precision."""


def _runs(names: tuple[str, ...]) -> list[slice]:
    """The same columns, as few slices."""
    is_one_F = np.isin(FEATURES, names)
    bounds = np.flatnonzero(np.diff(is_one_F, prepend=False, append=False)).tolist()
    return [slice(*pair) for pair in zip(bounds[::2], bounds[1::2], strict=True)]


_RUNS = _runs(_LOGARITHMS)


def describe(
    past: Past,
    found: Found,
    model_R: F32,
    memory: Memory,
    published: Published,
    row_N: I32,
    *,
    timed: bool = True,
    reach: bool = True,
) -> F32:
    """(R, F) all features of all candidates, in the order of `FEATURES`; column after column.

    Args:
        past: of the users.
        found: their candidates.
        model_R: the model's score of each; very low where it has no row, or is hidden.
        memory: as it is now.
        published: what the catalogue says.
        row_N: scratch, zeros before and after.
        timed: whether the columns of `TIMED` are wanted; else they say nothing.
        reach: the same for the columns of `REACH_FEATURES`.
    """
    next_, later, back = memory.next.read(), memory.later.read(), memory.back.read()
    value_FR = describe_all(
        past, found, model_R, next_, later, back, memory.items(), published, row_N, timed, reach
    )
    for run in _RUNS:
        # Never strided: one kernel for every place in an array.
        np.log(value_FR[run], out=value_FR[run])
    return value_FR.T


def columns_of(names: list[str]) -> list[int]:
    """Places of these features among all.

    Raises:
        KeyError: no such feature.
    """
    return [AT._asdict()[name] for name in names]
