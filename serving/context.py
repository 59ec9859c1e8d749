"""A user as the blend sees one: the packed interactions of a record, read as codes of the memory.

Knows no candidates. Shape letters: B users, L places of the past, newest first, E interactions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afterclick.serving.candidates import I64, Past
from afterclick.serving.compiled import compiled
from afterclick.serving.memory import Memory
from afterclick.serving.records import INTERACTION_BYTES

RECENT = 32
"""L: interactions that are looked at."""

NOTHING = -1
"""Code of a place without an item, or with one that the memory does not know."""

_INTERACTION = np.dtype([("hash", "<u8"), ("tag", "<u4"), ("traits", "<u2")])
_RESET = 1 << 15
"""Highest bit of the traits."""


class Context(NamedTuple):
    """A user, as the blend sees one; the defaults are somebody without a past."""

    interactions: bytes = b""
    """Packed, as a record keeps them."""
    clicks: int = 0
    last_ms: int = 0
    now_ms: int = 0
    """Time of the event that the list answers, or the memory's clock where that is later."""


def past_of(contexts: Sequence[Context], memory: Memory) -> Past:
    """Pasts as codes, from the packed interactions."""
    tails = [context.interactions[-RECENT * INTERACTION_BYTES :] for context in contexts]
    packed_E = np.frombuffer(b"".join(tails), _INTERACTION)
    find = memory.code_of_hash.get
    code_E = np.array([find(hash_, NOTHING) for hash_ in packed_E["hash"].tolist()], np.int64)
    size_B = np.array([len(tail) // INTERACTION_BYTES for tail in tails], np.int64)
    item_BL, length_B = _newest_first(code_E, packed_E["traits"] >= _RESET, size_B)
    return Past(
        item_BL,
        length_B,
        np.array([context.clicks for context in contexts], np.int64),
        np.array([context.last_ms for context in contexts], np.int64),
        np.array([max(context.now_ms, memory.clock_ms) for context in contexts], np.int64),
    )


@compiled
def _newest_first(code_E: I64, reset_E: npt.NDArray[np.bool_], size_B: I64) -> tuple[I64, I64]:
    """(B, L) codes of what came since the last reset, and how many that are."""
    item_BL, length_B = np.full((len(size_B), RECENT), NOTHING), np.zeros(len(size_B), np.int64)
    end = 0
    for user in range(len(size_B)):
        end += size_B[user]
        for at in range(end - 1, end - size_B[user] - 1, -1):
            item_BL[user, length_B[user]] = code_E[at]
            length_B[user] += 1
            if reset_E[at]:  # what is older than the interaction that carries it is another session
                break
    return item_BL, length_B
