"""What several partitions fold together is what each would fold alone, and nobody waits for it."""

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from afterclick.serving.errors import ContractError, UnavailableError
from afterclick.serving.store import Commit
from afterclick.streams.events import Click
from afterclick.streams.fold import Folded, Part, fold
from afterclick.streams.gate import Gate
from afterclick.streams.lockstep import Steps, in_step
from afterclick.streams.partition import Moved, PartitionFold, Serving
from afterclick.streams.record import Chunk, LogEdges
from afterclick.streams.replica import Replica
from afterclick.streams.rounds import RECORDS_MAX, Rounds
from tests.doubles import cut, log_of
from tests.unit.streams.test_fold_laws import LIMITS, RULES, load, serving_of, some_clicks

PARTITIONS = 3
WAIT_S = 10.0


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    return serving_of(load(tmp_path_factory.mktemp("releases") / "r1", number=1, seed=1))


def folds_on(store: Replica, serving: Serving, limits: Any = LIMITS) -> list[PartitionFold]:
    folds = []
    for partition in range(PARTITIONS):
        batches = (f"b{partition}-{n}" for n in itertools.count())
        fold = PartitionFold(
            partition,
            store,
            RULES,
            limits,
            serving=lambda: serving,
            dead_letters=lambda letters: None,
            log_start=lambda: 0,
            batch_ids=batches,
        )
        fold.open(LogEdges("t", 0, 10**9), lambda offset: None)
        folds.append(fold)
    return folds


def logs(num: int = 120) -> list[list[Any]]:
    """Of users of each partition's own."""
    return [
        log_of([
            Click(
                user_id=f"p{partition}-{click.user_id}", item_id=click.item_id, event=click.event,
                timestamp_ms=click.timestamp_ms, event_id=click.event_id,
            )
            for click in some_clicks(num, seed=partition)
        ])
        for partition in range(PARTITIONS)
    ]  # fmt: skip


@pytest.mark.parametrize("with_release", [True, False])
def test_partitions_in_step_write_what_each_writes_alone(
    serving: Serving, with_release: bool
) -> None:
    """Who shares a scan is an accident of load, as the cut of a log is."""
    serving = serving if with_release else serving_of(None)
    alone, together = Replica(), Replica()
    for own, records in zip(folds_on(alone, serving), logs(), strict=True):
        for chunk in cut(records, [7]):
            own.process(chunk)
    rng = random.Random(2)
    limits = LIMITS._replace(users_max=5)  # some need several writes for a chunk
    folds = folds_on(together, serving, limits)
    left = [cut(records, [rng.randrange(1, 20) for _ in range(120)]) for records in logs()]
    while any(left):
        members = [at for at in range(PARTITIONS) if left[at] and rng.random() < 0.7]
        moved = in_step([folds[at].processing(left[at].pop(0)) for at in members], together, fold)
        assert all(isinstance(one, Moved) and one.seek is None for one in moved)
    assert together.snapshot() == alone.snapshot()


class Member:
    """A partition that always has the same chunk."""

    def __init__(self, fold: PartitionFold, chunk: Chunk) -> None:
        self.fold, self.chunk = fold, chunk

    @property
    def num_waiting(self) -> int:
        return len(self.chunk.records)

    def take(self) -> Callable[[], Steps[Moved]]:
        return partial(self.fold.processing, self.chunk)


def rounds_of(store: Any, folding: Any = fold, slots: int = 1) -> tuple[Rounds, ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(slots)
    return Rounds(store, folding, Gate(), threads, slots), threads


def test_what_one_partition_breaks_stops_nobody_else(serving: Serving) -> None:
    """A refused partition needs an operator; those whose chunks came at its time do not."""
    store, told = Replica(), list[list[int]]()

    def folding(parts: Sequence[Part], **rest: Any) -> list[Folded]:
        told.append([part.partition for part in parts])
        if any(part.partition == 1 for part in parts):
            raise ContractError("broken", reason="non-finite")
        return fold(parts, **rest)

    async def scenario() -> list[Any]:
        rounds, threads = rounds_of(store, folding)
        chunks = [cut(records, [200])[0] for records in logs(20)]
        members = map(Member, folds_on(store, serving), chunks)
        outcomes = await asyncio.gather(
            *(rounds.fold(member) for member in members), return_exceptions=True
        )
        threads.shutdown()
        return outcomes

    first, broken, last = asyncio.run(scenario())
    assert told[0] == [0, 1, 2]
    assert isinstance(broken, ContractError)
    assert (first.applied[0].records, last.applied[0].records) == (20, 20)
    assert sorted(store.heads) == [0, 2]
    alone = Replica()
    for at, own in enumerate(folds_on(alone, serving)):
        if at != 1:
            own.process(cut(logs(20)[at], [200])[0])
    assert store.lists == alone.lists
    assert store.hours == alone.hours, "clicks of the round that failed are counted once"


class AwayAfter(Replica):
    """Takes the first commit of several, then nobody answers."""

    away = True

    def commit_all(self, commits: Sequence[Commit]) -> list[bytes | None]:
        if self.away and len(commits) > 1:
            self.away = False
            self.commit(*commits[0])
            raise UnavailableError("no answer")
        return super().commit_all(commits)


def test_a_round_that_is_cut_in_the_middle_is_gone_through_again(serving: Serving) -> None:
    """Some scripts of a pipeline may have run when the connection breaks."""
    store = AwayAfter()

    async def scenario() -> None:
        rounds, threads = rounds_of(store)
        chunks = [cut(records, [200])[0] for records in logs(20)]
        members = list(map(Member, folds_on(store, serving), chunks))
        for turn in range(2):
            outcomes = await asyncio.gather(
                *(rounds.fold(member) for member in members), return_exceptions=True
            )
            assert all(isinstance(one, Moved if turn else UnavailableError) for one in outcomes)
        threads.shutdown()

    asyncio.run(scenario())
    alone = Replica()
    for own, records in zip(folds_on(alone, serving), logs(20), strict=True):
        own.process(cut(records, [200])[0])
    assert store.snapshot() == alone.snapshot()


def steps_of(told: list[str], name: str) -> Steps[Moved]:
    yield from ()
    told.append(name)
    return Moved([])


class Counted:
    """A partition with so many records, which waits in its round until it is let go."""

    def __init__(self, rounds: list[list[str]], name: str, num: int) -> None:
        self.rounds, self.name, self.num_waiting = rounds, name, num

    def take(self) -> Callable[[], Steps[Moved]]:
        self.rounds[-1].append(self.name)
        return partial(steps_of, [], self.name)


def test_a_round_takes_all_who_ask_while_the_one_before_runs() -> None:
    """The first waits for nobody; those who come meanwhile go together, as far as it gains."""
    rounds: list[list[str]] = []

    class Watched(Rounds):
        def _taken(self) -> Any:
            rounds.append([])
            return super()._taken()

    async def scenario() -> None:
        threads = ThreadPoolExecutor(1)
        own = Watched(Replica(), fold, Gate(), threads, 1)
        async with own.turn():
            asked = [
                asyncio.create_task(own.fold(Counted(rounds, name, num)))
                for name, num in (("a", 1), ("b", 2), ("c", RECORDS_MAX), ("d", 5))
            ]
            await asyncio.sleep(0)
            assert rounds == []
            asked[3].cancel()
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*asked[:3]), WAIT_S)
        threads.shutdown()

    asyncio.run(scenario())
    assert rounds == [["a", "b"], ["c"]]


def test_a_round_that_cannot_run_is_everybody_s_error() -> None:
    """A partition that is told nothing would stand still in silence."""

    async def scenario() -> None:
        rounds, threads = rounds_of(Replica())
        threads.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            await rounds.fold(Counted([[]], "a", 1))

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_who_leaves_waits_for_the_write_in_hand() -> None:
    """The partition's next owner must not meet a thread that still writes."""
    told: list[str] = []

    class Slow(Counted):
        def take(self) -> Callable[[], Steps[Moved]]:
            def begin() -> Steps[Moved]:
                started.set()
                go_on.wait(WAIT_S)
                return steps_of(told, "written")

            return begin

    async def scenario() -> None:
        rounds, threads = rounds_of(Replica())
        asked = asyncio.create_task(rounds.fold(Slow([[]], "a", 1)))
        await asyncio.to_thread(started.wait, WAIT_S)
        asked.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert told == ["written"]
        threads.shutdown()

    started, go_on = threading.Event(), threading.Event()
    asyncio.run(scenario())
