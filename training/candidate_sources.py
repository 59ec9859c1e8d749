"""Which sources of candidates a stream needs: what the others name costs time and tops no list.

Only those that offer everybody the same are in question. The user's own ones, and the model's, stay
whatever a log says: they are few, and each answers where another is silent. Judged by a first
network on predictions that it was not fitted on. Knows no network and no memory.
"""

from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from afterclick.serving.candidates import SOURCES
from afterclick.serving.engine import I64
from afterclick.serving.manifest import BlendSpec

F64 = npt.NDArray[np.float64]

ALL_SOURCES = (1 << len(SOURCES)) - 1

FOR_EVERYBODY: dict[str, dict[str, int | bool]] = {
    "popularity": {"popular": False, "touched": 0},
    "publication": {"newest": 0},
}
"""Sources that may be left out, and a spec without each."""

FALL_MAX = np.array([5e-4, 5e-4, 2.5e-3])
"""Of the rates of `_rates`, against those of all sources: in percent 0.05, 0.05 and 0.25."""


def needed(rank_X: Callable[[int], I64]) -> int:
    """Bits of the sources that are worth their candidates: one after the other goes, what harms
    least first, while lists are as good as those of all.

    Args:
        rank_X: ranks of what was clicked, from 1, among the candidates that these sources name.
    """
    kept, whole = ALL_SOURCES, _rates(rank_X(ALL_SOURCES))
    while True:
        found: dict[int, F64] = {}
        for bit in (1 << SOURCES.index(name) for name in FOR_EVERYBODY):
            if bit & kept:
                rates = _rates(rank_X(kept & ~bit))
                if (whole - rates <= FALL_MAX).all():
                    found[bit] = rates
        if not found:
            return kept
        kept &= ~max(found, key=lambda bit: found[bit].sum())


def names_of(sources: int) -> list[str]:
    """Of these bits."""
    return [name for at, name in enumerate(SOURCES) if sources >> at & 1]


def only(spec: BlendSpec, sources: int) -> BlendSpec:
    """The spec with the candidates of these sources; every feature stays."""
    for name in names_of(ALL_SOURCES & ~sources):
        spec = msgspec.structs.replace(spec, **FOR_EVERYBODY[name])
    return spec


def _rates(rank_X: I64) -> F64:
    """MRR@20, HR@20 and HR@50: what is shown first, and what a list of the default K holds."""
    reciprocal_X = np.where(rank_X <= 20, 1.0 / rank_X, 0.0)
    return np.array([reciprocal_X.mean(), (rank_X <= 20).mean(), (rank_X <= 50).mean()])
