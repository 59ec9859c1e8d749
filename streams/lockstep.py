"""Folds of several partitions beside each other: what they want at the same time is asked once.

A small chunk's cost is mostly fixed: a call of each graph, a pass over the catalogue, a way to
Redis and back. So folds are generators that say what they want and are sent the answer; this module
knows neither their rules nor threads. Each partition is still read as of one moment and written by
its own script.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from afterclick.serving.catalog import Catalog
from afterclick.serving.store import Commit, Read, Reading
from afterclick.streams.fold import Folded, Part
from afterclick.streams.inference import Release

T = TypeVar("T")


class Folding(NamedTuple):
    """Wants a part folded."""

    part: Part
    release: Release | None
    catalog: Catalog


Ask = Reading | Folding | Commit
Steps = Generator[Ask, Any, T]
"""Is sent a `Read` for a `Reading`, a `Folded` for a `Folding`; for a `Commit` None, or the head
that stands there.
"""
KINDS = (Reading, Folding, Commit)
"""What comes first is answered first, so that others catch up and share the next."""

Folder = Callable[..., list[Folded]]
"""`fold.fold`, or something around it."""


class LockstepStore(Protocol):
    """What this module needs of `serving.store.Store`."""

    def read_all(self, asked: Sequence[Reading]) -> list[Read]: ...  # noqa: D102
    def commit_all(self, commits: Sequence[Commit]) -> list[bytes | None]: ...  # noqa: D102


def in_step(
    running: Sequence[Steps[T]], store: LockstepStore, folding: Folder
) -> list[T | Exception]:
    """Run folds to their ends; what each returned or raised.

    An error of a call is an error of all who shared it.
    """
    outcomes: list[Any] = [None] * len(running)
    asks: dict[int, Ask] = {}

    def go_on(at: int, answer: Any) -> None:
        try:
            if isinstance(answer, Exception):
                asks[at] = running[at].throw(answer)
            else:
                asks[at] = running[at].send(answer)
        except StopIteration as stop:
            outcomes[at] = stop.value
        except Exception as error:  # noqa: BLE001 - whoever asked must hear of it
            outcomes[at] = error

    for at in range(len(running)):
        go_on(at, None)
    while asks:
        kind = next(kind for kind in KINDS if any(type(ask) is kind for ask in asks.values()))
        asked = {at: asks.pop(at) for at, ask in list(asks.items()) if type(ask) is kind}
        try:
            answers = _answers(kind, list(asked.values()), store, folding)
        except Exception as error:  # noqa: BLE001 - likewise
            answers = [error] * len(asked)
        for at, answer in zip(asked, answers, strict=True):
            go_on(at, answer)
    return outcomes


def _answers(
    kind: type[Ask], asked: Sequence[Any], store: LockstepStore, folding: Folder
) -> Sequence[Any]:
    if kind is Reading:
        return store.read_all(asked)
    if kind is Commit:
        return store.commit_all(asked)
    first = asked[0]
    return folding([one.part for one in asked], release=first.release, catalog=first.catalog)
